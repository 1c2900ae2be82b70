"""Bandwidth of ports: what a server receives waits at its tap, what it sends waits at a device of its own.

    to the server     bridge -> tap [bucket] -> ring -> server
    from the server   server -> tap [ingress: everything to the ifb] -> ifb [bucket] -> tap -> bridge

Owns the root and ingress qdiscs of taps and the devices `ib*` (alias `nahtlos/shaper/<port>`), one for each
port that is limited in what it sends. A port without limits has none of them. Everything is in the kernel;
the file beside it only tells drift from a change of configuration.

A tap with an ifb shows no frame to a netdev ingress chain of nftables: what comes again from the ifb has
passed that point. Bridge and inet chains see everything.

A limit that changes is changed in place: what waits goes on waiting, at the new rate. One that goes is
lifted first and removed when nothing waits. Before a server is stopped at its source everything that waits
is let go (`release`), in both directions, so that nothing is left behind; the destination limits from the
port's birth, and what passes its bucket is parked in its tap's ring.
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import PortId
from nahtlos.model.networking import Rate
from nahtlos.physical.network import kernel, links
from nahtlos.physical.network.bandwidth import probe as shaping_probe
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.bandwidth.watch import Watch
from nahtlos.physical.network.device_names import OWNED
from nahtlos.physical.network.items import Setting
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink, Request
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.plan import Change
from nahtlos.physical.ports import MoveRole

ALIAS = f"{OWNED}shaper/"
ENOUGH_BURST = 6000
BURST_SHARE, QUEUE_SHARE = 100, 20
"""Parts of a second: 10 ms of the rate may pass at once, 50 ms of it may wait."""
LONGEST = 70_000
"""A queue that cannot take what a server sends in one piece (64 KiB, cut later) would lose all of it."""
FRAMING = 18
"""Bytes of an Ethernet header with a tag."""
EMPTIED_WITHIN, POLL_SECONDS = 0.2, 0.002


# --- what should be there ----------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    received: tc.Bucket | None = None
    sent: tc.Bucket | None = None

    @property
    def any(self) -> bool:
        return self.received is not None or self.sent is not None


def limits_of(port: PortConfig, network: NetworkConfig) -> Limits:
    return Limits(
        received=bucket(port.bandwidth.ingress, network.spec.mtu),
        sent=bucket(port.bandwidth.egress, network.spec.mtu),
    )


def bucket(rate: Rate | None, mtu: int) -> tc.Bucket | None:
    """A burst below one frame would let nothing pass."""
    if rate is None:
        return None
    per_second, frame = max(1, rate.bits_per_second // 8), mtu + FRAMING
    burst = rate.burst_bytes or max(per_second // BURST_SHARE, ENOUGH_BURST)
    return tc.Bucket(
        rate=per_second,
        burst=max(burst, frame),
        limit=max(per_second // QUEUE_SHARE, LONGEST),
    )


def shaper_name(tap: str) -> str:
    return "ib" + tap.removeprefix("tp")


# --- what is there, and what to change ---------------------------------------------------------------


class Root(msgspec.Struct, frozen=True):
    """What somebody has put at the root of a device."""

    qdisc: tc.Qdisc
    bucket: tc.Bucket | None
    """None: it is something else."""


class Found(msgspec.Struct, frozen=True):
    """What the kernel has for one tap."""

    tap: str
    index: int
    root: Root | None = None
    """None: nobody has put one there."""
    ingress: bool = False
    leads_to: int = 0
    """Device that its ingress sends everything to."""
    shaper: LinkInfo | None = None
    shaper_root: Root | None = None


class Todo(msgspec.Struct):
    """For any number of ports; the lists are carried out in this order."""

    puts: list[Request]
    lifts: list[Request]
    emptying: list[int]
    """Devices whose queue is to be empty before the removals."""
    removals: list[Request]

    @classmethod
    def nothing(cls) -> "Todo":
        return cls([], [], [], [])


def differences(wanted: Limits, found: Found, port: PortId) -> list[str]:
    """In words; nothing if all is right."""
    words: list[str] = []
    if not _root_is(wanted.received, found.root):
        words.append(_word(f"limit of what {port} receives", wanted.received, found.root is not None))
    if not _sending_is(wanted.sent, found, port):
        there = found.ingress or found.shaper_root is not None
        words.append(_word(f"limit of what {port} sends", wanted.sent, there))
    return words


def _word(what: str, wanted: tc.Bucket | None, there: bool) -> str:
    if wanted is None:
        return f"{what} was not asked for: removed"
    return f"{what} was {'different' if there else 'missing'}: put right"


def _root_is(wanted: tc.Bucket | None, root: Root | None) -> bool:
    if wanted is None:
        return root is None
    return root is not None and wanted.like(root.bucket)


def _sending_is(wanted: tc.Bucket | None, found: Found, port: PortId) -> bool:
    if wanted is None:
        return not found.ingress and found.shaper is None
    return (
        _device_is(found, port)
        and found.shaper is not None
        and found.leads_to == found.shaper.index
        and _root_is(wanted, found.shaper_root)
    )


def _device_is(found: Found, port: PortId) -> bool:
    return found.shaper is not None and found.shaper.up and found.shaper.alias == ALIAS + port


def plan_port(todo: Todo, wanted: Limits, found: Found) -> None:
    """Its ifb is there if one is needed."""
    _plan_root(todo, wanted.received, found.index, found.root, found.tap)
    shaper = found.shaper
    if wanted.sent is not None and shaper is not None:
        _plan_root(todo, wanted.sent, shaper.index, found.shaper_root, shaper.name)
        if found.leads_to != shaper.index:
            if found.ingress:
                todo.puts.append(tc.remove_ingress(found.index, found.tap))
            todo.puts += [
                tc.put_ingress(found.index, found.tap),
                tc.redirect(found.index, shaper.index, found.tap),
            ]
    if wanted.sent is None:
        if shaper is not None:
            _lift(todo, shaper.index, found.shaper_root, shaper.name)
        if found.ingress:
            todo.removals.append(tc.remove_ingress(found.index, found.tap))
        if shaper is not None:
            todo.removals.append(links.delete(shaper.name))


def _plan_root(todo: Todo, wanted: tc.Bucket | None, index: int, root: Root | None, what: str) -> None:
    if _root_is(wanted, root):
        return
    if wanted is None:
        _lift(todo, index, root, what)
        todo.removals.append(links.no_queue(index, what))
    elif root is not None and root.qdisc.is_bucket:
        todo.puts += tc.change_bucket(index, wanted, what)
    else:
        if root is not None and root.qdisc.ours:
            todo.puts.append(links.no_queue(index, what))  # of another kind under our handle
        todo.puts += tc.put_bucket(index, wanted, what)


def _lift(todo: Todo, index: int, root: Root | None, what: str) -> None:
    if root is not None and root.qdisc.is_bucket:
        todo.lifts += tc.lift(index, what)
        todo.emptying.append(index)


# --- reading -----------------------------------------------------------------------------------------


def observe(netlink: Netlink, taps: Iterable[str]) -> tuple[dict[str, Found], tuple[str, ...]]:
    """What there is for each of `taps`, and shapers whose tap is gone."""
    devices = links.read_links(netlink)
    qdiscs = tc.read_qdiscs(netlink)
    at_root, queues, ingresses = tc.roots(qdiscs), tc.only_queues(qdiscs), tc.ingresses(qdiscs)

    def root_of(index: int) -> Root | None:
        qdisc = at_root.get(index)
        return Root(qdisc, tc.read_bucket(netlink, qdisc, queues.get(index, ()))) if qdisc else None

    found: dict[str, Found] = {}
    for tap in taps:
        device, shaper = devices.get(tap), devices.get(shaper_name(tap))
        if device is not None:
            ingress = device.index in ingresses
            found[tap] = Found(
                tap,
                device.index,
                root_of(device.index),
                ingress,
                _leads_to(netlink, device.index) if ingress else 0,
                shaper,
                root_of(shaper.index) if shaper else None,
            )
    alive = {shaper_name(device) for device, _ in kernel.taps_of(devices).values()}
    orphans = [d.name for d in devices.values() if d.alias.startswith(ALIAS) and d.name not in alive]
    return found, tuple(sorted(orphans))


def observe_one(netlink: Netlink, tap: str) -> Found | None:
    """The same for one tap; costs nothing that grows with the number of ports."""
    index = _index(tap)
    if not index:
        return None
    shaper = links.read_link(netlink, shaper_name(tap))
    ingress = tc.read_ingress(netlink, index) is not None
    return Found(
        tap,
        index,
        _read_root(netlink, index),
        ingress,
        _leads_to(netlink, index) if ingress else 0,
        shaper,
        _read_root(netlink, shaper.index) if shaper else None,
    )


def _read_root(netlink: Netlink, index: int) -> Root | None:
    qdisc = tc.read_root(netlink, index)
    if qdisc is None or not qdisc.put:
        return None
    queue = tc.read_only_queue(netlink, index) if qdisc.is_bucket else None
    return Root(qdisc, tc.read_bucket(netlink, qdisc, (queue,) if queue else ()))


def _leads_to(netlink: Netlink, index: int) -> int:
    entries = tc.read_filters(netlink, index, tc.INGRESS_HANDLE)
    if len(entries) != 1 or entries[0].protocol != tc.ANY_PROTOCOL:
        return 0
    return entries[0].to_device if tc.matches_everything(entries[0]) else 0


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


# --- the part ----------------------------------------------------------------------------------------


class Applied:
    """What was last made true, in a file of the run directory: port to its limits in words."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.limits = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            self.limits: dict[str, str] = {}
        self._written = dict(self.limits)

    def note(self, port: PortId, limits: Limits) -> None:
        if limits.any:
            self.limits[port] = str(limits)
        else:
            self.limits.pop(port, None)

    def agrees(self, port: PortId, limits: Limits) -> bool:
        """Nothing else was asked for last time."""
        return self.limits.get(port, "") == (str(limits) if limits.any else "")

    def save(self) -> None:
        if self.limits == self._written:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self.limits))
        new.replace(self._path)
        self._written = dict(self.limits)


class Shaping(Part):
    name = "shaping"

    def __init__(self, record: Path, fast: Callable[[], Netlink], bulk: Callable[[], Netlink]) -> None:
        """`fast` is the socket for verbs, `bulk` that of reconcile."""
        self._applied = Applied(record)
        self._probed = record.with_name("shaping-probe.json")
        self._fast = fast
        self._bulk = bulk
        self._watch = Watch(shaper_name(""))
        self._settled: dict[PortId, Limits] | None = None
        """Limits of every port here, as they were when nothing was left to do."""

    def close(self) -> None:
        self._watch.close()

    async def capabilities(self) -> dict[str, str]:
        return (await asyncio.to_thread(shaping_probe.remembered, self._probed)).words()

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        limits = {name: limits_of(port.port, port.network) for name, port in local.items()}
        looked_at, stirred = time.monotonic(), self._watch.stirred()
        if not stirred and limits == self._settled:
            return ()
        self._settled = None
        words = await self._look_and_put_right(local, limits)
        self._settled = limits
        self._watch.settle(looked_at)
        return tuple(words)

    async def _look_and_put_right(
        self, local: Mapping[PortId, LocalPort], limits: Mapping[PortId, Limits]
    ) -> list[str]:
        sock = self._bulk()
        taps = [port.tap for port in local.values()]
        found, orphans = await asyncio.to_thread(observe, sock, taps)
        wrong: list[LocalPort] = []
        words: list[str] = []
        for name, port in local.items():
            different = differences(limits[name], found[port.tap], name) if port.tap in found else []
            if different:
                wrong.append(port)
                words += different if self._applied.agrees(name, limits[name]) else []
        await self._put_right(sock, wrong, found)
        if orphans:
            sock.change([links.delete(name) for name in orphans])
        for name, wanted in limits.items():
            self._applied.note(name, wanted)
        self._applied.save()
        return words

    async def port_created(self, port: LocalPort) -> None:
        wanted = limits_of(port.port, port.network)
        if not wanted.any and port.port.id not in self._applied.limits:
            return  # never had one: reconcile will see what somebody else may have put there
        await self._shape(port, wanted)

    async def _shape(self, port: LocalPort, wanted: Limits) -> None:
        sock = self._fast()
        found = observe_one(sock, port.tap)
        if found is not None and differences(wanted, found, port.port.id):
            await self._put_right(sock, [port], {port.tap: found})
        self._applied.note(port.port.id, wanted)
        self._applied.save()

    async def port_deleted(self, port: PortId, tap: str) -> None:
        name = shaper_name(tap)
        if _index(name):
            self._fast().change([links.delete(name)])
        self._applied.limits.pop(port, None)
        self._applied.save()

    async def move_reverted(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.SOURCE:
            await self._shape(port, limits_of(port.port, port.network))

    def release(self, port: PortId, tap: str) -> None:
        sock, todo = self._fast(), Todo.nothing()
        for name in (tap, shaper_name(tap)):
            index = _index(name)
            if index:
                root = tc.read_root(sock, index)
                _lift(todo, index, Root(root, None) if root else None, name)
        if todo.lifts:
            sock.change(todo.lifts)
            self._applied.limits[port] = "lifted"

    async def move_settled(self, port: LocalPort, role: MoveRole) -> None:
        """What the server had sent before it was stopped goes before the device that holds it."""
        shaper = _index(shaper_name(port.tap)) if role is MoveRole.SOURCE else 0
        if shaper:
            await _emptied(self._fast(), [shaper])

    # --- acting ---

    async def _put_right(self, sock: Netlink, ports: Sequence[LocalPort], found: Mapping[str, Found]) -> None:
        """In a few batches, however many ports."""
        seen = dict(found)
        self._give_birth(sock, ports, seen)
        todo = Todo.nothing()
        for port in ports:
            plan_port(todo, limits_of(port.port, port.network), seen[port.tap])
        for batch in (todo.puts, todo.lifts):
            if batch:
                sock.change(batch)
        if todo.removals:
            await _emptied(sock, todo.emptying)
            sock.change(todo.removals)

    def _give_birth(self, sock: Netlink, ports: Sequence[LocalPort], seen: dict[str, Found]) -> None:
        """Shapers that are needed and missing, or not as they should be."""
        missing = [
            port
            for port in ports
            if limits_of(port.port, port.network).sent is not None
            and not _device_is(seen[port.tap], port.port.id)
        ]
        if not missing:
            return
        names = {port.tap: shaper_name(port.tap) for port in missing}
        sock.change([links.create_ifb(name) for name in names.values()])
        kernel.write_settings(
            [Change(Setting(f"net/ipv6/conf/{n}/disable_ipv6", "1")) for n in names.values()]
        )
        sock.change([links.configure(names[p.tap], up=True, alias=ALIAS + p.port.id) for p in missing])
        for tap, name in names.items():
            seen[tap] = msgspec.structs.replace(seen[tap], shaper=links.read_link(sock, name))


async def _emptied(sock: Netlink, indexes: Sequence[int]) -> None:
    """Waits until nothing waits there, or long enough: what was lifted needs a moment."""
    deadline = time.monotonic() + EMPTIED_WITHIN
    while tc.waiting(sock, indexes) and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
