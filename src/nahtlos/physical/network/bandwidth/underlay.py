"""Shares of a host's underlay interface: control, moves and tenants cannot starve one another.

    whole                rate = ceiling = bits_per_second
      control            what the host itself says: agents, orchestrator, volumes, ARP
      moves              streams of servers that move (TCP, the hypervisor's port range)
      tenants            tunnels (UDP 4789), and whatever else leaves the host

Owns the root qdisc of the underlay interface and the table `inet nahtlos-shares`, while a configuration
names shares; without, it touches neither. Each class is guaranteed its share and borrows what the others
leave, up to the whole. The table's output chain names the class in the packet's priority, so fragments and
both families are classified as what they were when they were sent. Shares change in place; what waits goes
on waiting.
"""

import asyncio
import hashlib
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, UnderlayShares
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import nft
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.bandwidth.watch import Watch
from nahtlos.physical.network.netlink import Netlink, Request
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.settings import MIGRATION_PORTS, AgentSettings

TABLE = "nahtlos-shares"
WHOLE, CONTROL, MOVES, TENANTS = 1, 0x10, 0x20, 0x30
TUNNEL_PORT = 4789
BURST_SHARE, QUEUE_SHARE = 100, 20
"""Parts of a second, as for ports: 10 ms of the rate at once, 50 ms of the whole may wait."""
ENOUGH_BURST, ENOUGH_QUEUE = 6000, 1 << 18
QUANTUM = 2000
"""Bytes per percent that a class may send of what others leave before the next one's turn."""


class Ports(msgspec.Struct, frozen=True):
    """How traffic is told apart."""

    control: tuple[int, ...]
    """TCP ports of agents, orchestrator and volumes."""
    moves: tuple[int, int]
    """First and last TCP port that streams of moves are received at."""


def ports_of(settings: AgentSettings) -> Ports:
    control = {settings.orchestrator_port, settings.peer_port, settings.nbd_port}
    return Ports(control=tuple(sorted(control)), moves=MIGRATION_PORTS)


# --- what should be there ----------------------------------------------------------------------------


class Tree(msgspec.Struct, frozen=True):
    classes: tuple[tc.Class, ...]
    """The whole first."""
    queues: dict[int, int]
    """Class to the bytes that may wait for it."""


def tree_of(shares: UnderlayShares) -> Tree:
    """Nothing is left over: shares that add up to more than the whole are cut in proportion."""
    whole = max(1, shares.bits_per_second // 8)
    total = max(100, shares.control + shares.moves + shares.tenants)
    parts = ((CONTROL, shares.control), (MOVES, shares.moves), (TENANTS, shares.tenants))
    root = _class(WHOLE, tc.ROOT, whole, whole, 0, 100)
    leaves = [
        _class(
            minor, tc.HANDLE | WHOLE, max(1, whole * percent // total), whole, int(minor != CONTROL), percent
        )
        for minor, percent in parts
    ]
    waiting = max(whole // QUEUE_SHARE, ENOUGH_QUEUE)
    return Tree((root, *leaves), {leaf.handle: waiting for leaf in leaves})


def _class(minor: int, parent: int, rate: int, ceiling: int, priority: int, percent: int) -> tc.Class:
    return tc.Class(
        handle=tc.HANDLE | minor,
        parent=parent,
        rate=rate,
        ceiling=ceiling,
        burst=max(rate // BURST_SHARE, ENOUGH_BURST),
        ceiling_burst=max(ceiling // BURST_SHARE, ENOUGH_BURST),
        priority=priority,
        quantum=max(1, percent) * QUANTUM,
    )


def queue_handle(owner: int) -> int:
    """Handle of the queue of a class."""
    return (tc.OURS + (owner & 0xFFFF)) << 16


def rules_of(interface: str, ports: Ports) -> str:
    """The last word counts: what the host says is control unless it is a stream or a tunnel, and what goes
    from or to a port of control is that, whatever its other port."""
    control = ", ".join(str(port) for port in ports.control)
    streams = f"{ports.moves[0]}-{ports.moves[1]}"
    name = {minor: f"meta priority set {tc.OURS:x}:{minor:x}" for minor in (CONTROL, MOVES, TENANTS)}
    lines = [
        f"table inet {TABLE}",
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
        "  chain output {",
        "    type filter hook output priority -150; policy accept;",
        f'    oifname != "{interface}" accept',
        f"    {name[CONTROL]}",
        f"    tcp sport {streams} {name[MOVES]}",
        f"    tcp dport {streams} {name[MOVES]}",
        f"    tcp sport {{ {control} }} {name[CONTROL]}",
        f"    tcp dport {{ {control} }} {name[CONTROL]}",
        f"    udp dport {TUNNEL_PORT} {name[TENANTS]}",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


# --- what is there, and what to change ---------------------------------------------------------------


class Found(msgspec.Struct, frozen=True):
    index: int
    root: tc.Qdisc | None
    """None: nobody has put one there."""
    classes: dict[int, tc.Class]
    queues: dict[int, tc.Qdisc]
    """By the class whose queue it is."""
    filters: tuple[tc.Filter, ...]

    @property
    def divided(self) -> bool:
        return self.root is not None and self.root.ours and self.root.kind == "htb"


def observe(netlink: Netlink, index: int) -> Found:
    qdiscs = [q for q in tc.read_qdiscs(netlink) if q.index == index]
    root = tc.roots(qdiscs).get(index)
    bare = Found(index, root, {}, {}, ())
    if not bare.divided:
        return bare
    return Found(
        index=index,
        root=root,
        classes={c.handle: c for c in tc.read_classes(netlink, index)},
        queues={q.parent: q for q in qdiscs},
        filters=tc.read_filters(netlink, index, tc.HANDLE),
    )


def changes(wanted: Tree, found: Found, interface: str) -> list[Request]:
    """In order; nothing if all is right. Only what is no tree of ours is taken down."""
    requests: list[Request] = []
    grown = found.divided and found.root is not None and found.root.default == TENANTS
    classified = grown and _classified(found.filters)
    if not grown or (found.filters and not classified):
        if found.root is not None and found.root.ours:
            requests.append(tc.remove_root(found.index, interface))
        requests.append(tc.put_htb(found.index, TENANTS, interface))
        found, classified = Found(found.index, None, {}, {}, ()), False
    wrong = [item for item in wanted.classes if not item.like(found.classes.get(item.handle))]
    requests += [tc.put_class(found.index, item, interface) for item in wrong]
    for owner, limit in wanted.queues.items():
        queue = found.queues.get(owner)
        if queue is None or (queue.kind, queue.limit) != ("bfifo", limit):
            requests.append(tc.put_queue(found.index, queue_handle(owner), owner, limit, interface))
    if not classified:
        requests.append(tc.classify(found.index, tc.ARP, tc.HANDLE | CONTROL, interface))
    return requests


def _classified(filters: tuple[tc.Filter, ...]) -> bool:
    """ARP is no packet that a rule could name."""
    return len(filters) == 1 and (
        filters[0].protocol,
        filters[0].to_class,
        tc.matches_everything(filters[0]),
    ) == (tc.ARP, tc.HANDLE | CONTROL, True)


# --- the part ----------------------------------------------------------------------------------------


class Applied(msgspec.Struct):
    """What was last made true."""

    shares: UnderlayShares | None = None
    rules: str = ""
    """Digest of the table as composed."""
    listed: str = ""
    """Digest of what the kernel listed after that."""


class Shares(Part):
    name = "shares"

    def __init__(self, interface: str, ports: Ports, record: Path, bulk: Callable[[], Netlink]) -> None:
        """`bulk` is the socket for reconcile."""
        self._interface = interface
        self._ports = ports
        self._record = record
        self._applied = _read(record)
        self._bulk = bulk
        self._watch = Watch(self._interface)
        self._settled: UnderlayShares | None = None
        """As they were when nothing was left to do."""

    def close(self) -> None:
        self._watch.close()

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        shares = config.underlay
        if shares is None:
            self._settled = None
            await self._leave_alone()
            return ()
        asked_before = self._applied.shares == shares
        self._note(msgspec.structs.replace(self._applied, shares=shares))  # before: it must be found again
        words = [*await self._divide(shares), *await self._classify()]
        return tuple(words) if asked_before else ()

    async def _divide(self, shares: UnderlayShares) -> list[str]:
        looked_at, stirred = time.monotonic(), self._watch.stirred()
        if not stirred and self._settled == shares:
            return []
        self._settled = None
        words = await self._look_and_divide(shares)
        self._settled = shares
        self._watch.settle(looked_at)
        return words

    async def _look_and_divide(self, shares: UnderlayShares) -> list[str]:
        sock = self._bulk()
        found = await asyncio.to_thread(observe, sock, self._index())
        requests = changes(tree_of(shares), found, self._interface)
        if not requests:
            return []
        sock.change(requests)
        word = "different" if found.divided else "missing"
        return [f"shares of {self._interface} were {word}: put right"]

    async def _classify(self) -> list[str]:
        text = rules_of(self._interface, self._ports)
        digest = _digest(text.encode())
        if (digest, await _listed()) == (self._applied.rules, self._applied.listed):
            return []
        drift = digest == self._applied.rules
        await nft.apply(text)
        self._note(msgspec.structs.replace(self._applied, rules=digest, listed=await _listed()))
        return [f"rules for the shares of {self._interface} were different: put right"] if drift else []

    async def _leave_alone(self) -> None:
        """Takes down what an earlier configuration had put there, and nothing else."""
        if self._applied == Applied():
            return
        sock, index = self._bulk(), _index(self._interface)
        if index and (await asyncio.to_thread(observe, sock, index)).divided:
            sock.change([tc.remove_root(index, self._interface)])
        await nft.apply(f"table inet {TABLE}\ndelete table inet {TABLE}\n")
        self._note(Applied())

    def _index(self) -> int:
        index = _index(self._interface)
        if not index:
            raise Unavailable(
                f"underlay interface {self._interface} does not exist on this host",
                field="underlay_interface",
                remedy="name the interface that carries this host's underlay address",
            )
        return index

    def _note(self, applied: Applied) -> None:
        if applied == self._applied:
            return
        self._applied = applied
        self._record.parent.mkdir(parents=True, exist_ok=True)
        new = self._record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(applied))
        new.replace(self._record)


async def _listed() -> str:
    """Digest of the table as the kernel lists it; empty if it is not there."""
    try:
        return _digest(await nft.run(("-s", "list", "table", "inet", TABLE)))
    except Unavailable:
        return ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> Applied:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Applied)
    except (OSError, msgspec.DecodeError):
        return Applied()


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
