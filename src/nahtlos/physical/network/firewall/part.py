"""The firewall of a host, kept as it should be: acts on what `firewall` compiles.

Owns the tables `nahtlos-firewall` (bridge and inet), the settings connection tracking is strict by, and one
JSON file in the host's run directory: how each chain was left, which ports with groups take part in a move,
and by what standing connections were last judged. Never decides what is allowed.

Nothing is listed while nobody has made a transaction since the last look. Ports that come at the same time
share one transaction. Removing what a tap needed is left to the next reconcile: without its tap it means
nothing. When something was withdrawn, connections that no rule allows any more are forgotten; what has to be
judged is known again after a restart, because it is written down only once it was done.
"""

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import device_names, doctor, nft, nft_chains
from nahtlos.physical.network.firewall import bridge_hooks
from nahtlos.physical.network.firewall import flows as firewall_flows
from nahtlos.physical.network.firewall import layout as firewall
from nahtlos.physical.network.firewall.flows import Standing
from nahtlos.physical.network.firewall.layout import EMPTY, Moving, Policy, Tracking
from nahtlos.physical.network.firewall.tables import (
    BRIDGE,
    INET,
    TABLE,
    Chain,
    Changes,
    Comparison,
    Observed,
    ObservedTable,
    Table,
    Written,
    applied,
    chain_key,
    decode,
    digest,
    name_part,
)
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.ports import MoveRole

SYSCTL = Path("/proc/sys")
STRICT = {
    # No connection is picked up in its middle; and of one that is known, whoever missed a part of it (the
    # other host of a move, a table that was flushed) does not take the rest for a forgery.
    "net/netfilter/nf_conntrack_tcp_loose": "0",
    "net/netfilter/nf_conntrack_tcp_be_liberal": "1",
}
UNTRACKED = {
    # Only bridges that are asked to hand their packets on do so.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


class State(msgspec.Struct):
    chains: dict[str, Written] = {}
    moving: dict[PortId, Moving] = {}
    judged: str = ""
    """Digest of the standing that connections were last judged by."""
    sets: str = ""
    """Digest of all elements as of the last reconcile; empty if a verb has changed some since."""
    settings: bool = False
    """The settings were made before: a difference is drift."""


class Firewall(Part):
    name = "firewall"

    def __init__(
        self, role: HostRole, path: Path, on_own: Callable[[int, int], None] = lambda before, after: None
    ) -> None:
        """`on_own` hears of transactions that were nobody else's: the generations before and after."""
        self._on_own = on_own
        self._compute = role is HostRole.COMPUTE
        self._path = path
        self._lock = asyncio.Lock()
        self._loaded: State | None = None
        self._config: HostConfig | None = None
        self._local: dict[PortId, LocalPort] = {}
        self._waiting: dict[PortId, LocalPort] = {}
        """Ports that have come and are not programmed yet."""
        self._observed: Observed | None = None
        self._generation = -1
        """Of the namespace's tables when `_observed` was true."""
        self._standing: Standing | None = None
        self._judged_by: tuple[Policy, dict[PortId, tuple[PortConfig, int]]] | None = None
        self._digests: dict[tuple[str, str], tuple[Mapping[str, str], str]] = {}
        """Of the elements of each set as they were last: only those that differ are digested again."""
        self._tracking: Tracking | None = None

    # --- what there is -------------------------------------------------------------------------------

    async def init(self) -> None:
        if self._compute and not doctor.BRIDGE_SETTINGS.exists():
            await _load("br_netfilter")

    async def _way(self) -> Tracking:
        if self._tracking is None:
            self._tracking = await doctor.tracking() or Tracking.NETFILTER
        return self._tracking

    def _state(self) -> State:
        if self._loaded is None:
            try:
                self._loaded = msgspec.json.decode(self._path.read_bytes(), type=State)
            except (OSError, msgspec.DecodeError):
                self._loaded = State()
        return self._loaded

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self._state()))
        new.replace(self._path)

    async def _look(self, *, again: bool) -> Observed:
        """The tables as they are; `again`: unless nobody can have changed them."""
        generation = nft_chains.generation() if again or self._observed is None else self._generation
        if self._observed is None or generation != self._generation:
            self._observed = decode(await nft.list_families(BRIDGE, INET))
            self._generation = generation
            self._look_at_chains(self._observed)
        return self._observed

    def _look_at_chains(self, observed: Observed) -> None:
        for family, table in observed.items():
            table.chains = nft_chains.fingerprints(family, TABLE)

    # --- converge ------------------------------------------------------------------------------------

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        if not self._compute:
            return ()
        async with self._lock:
            self._config = config
            taps = frozenset(name for _, name in socket.if_nameindex() if name.startswith("tp"))
            ports = {**local, **self._come_meanwhile(local, config, taps)}
            self._local = ports
            held = self._policy(ports.values())
            moving = self._still_moving(config)
            words = self._settings(config)
            foreign = _foreign_taps(ports.values(), taps)
            desired: tuple[Table, ...] = ()
            if ports or foreign:
                desired = firewall.tables(held, ports.values(), moving, await self._way())
            words += await self._converge(desired, foreign)
            words += self._hand_on(ports.values(), held, config.networks)
            await self._judge(held, ports)
            return tuple(words)

    def _come_meanwhile(
        self, local: Mapping[PortId, LocalPort], config: HostConfig, taps: frozenset[str]
    ) -> dict[PortId, LocalPort]:
        """Ports whose tap came after the driver has looked."""
        known = {port.id for network in config.networks for port in network.ports}
        return {i: p for i, p in self._local.items() if i not in local and i in known and p.tap in taps}

    def _policy(self, ports: Iterable[LocalPort]) -> Policy:
        moving = [move.port for move in self._state().moving.values()]
        if self._config is None:
            return EMPTY
        return firewall.policy(self._config, [*(p.port for p in ports), *moving])

    def _still_moving(self, config: HostConfig) -> list[Moving]:
        """Moves of ports that exist. One ends by its verb only, whatever the configuration says of it."""
        known = {port.id for network in config.networks for port in network.ports}
        state = self._state()
        state.moving = {i: move for i, move in state.moving.items() if i in known}
        return list(state.moving.values())

    def _settings(self, config: HostConfig) -> list[str]:
        wanted = {**UNTRACKED, **(STRICT if config.security_groups else {})}
        words: list[str] = []
        for path, value in wanted.items():
            file = SYSCTL / path
            if file.exists() and file.read_text().strip() != value:
                file.write_text(value)
                if self._state().settings:
                    words.append(f"sysctl {path.replace('/', '.')} was different: put right")
        self._state().settings = bool(config.security_groups)
        return words

    async def _converge(self, desired: tuple[Table, ...], kept: frozenset[str]) -> list[str]:
        state = self._state()
        elements = self._elements_digest(desired)
        trusted = elements == state.sets
        before = msgspec.json.encode(state)
        observed = await self._look(again=True)
        changes = Comparison(desired, observed, state.chains, trusted=trusted, kept=kept).changes()
        if changes.text:
            await self._write(desired, changes, kept)
        names = {f"{table.family}/{name}" for table in desired for name in table.chains}
        state.chains = {name: written for name, written in state.chains.items() if name in names}
        state.sets = elements
        if msgspec.json.encode(state) != before:
            self._save()
        return list(changes.words)

    async def _write(self, desired: tuple[Table, ...], changes: Changes, kept: frozenset[str]) -> None:
        """Makes `changes`; if they do not fit what is there, everything anew."""
        state = self._state()
        if changes.chains:
            state.chains.update({name: Written(what) for name, what in changes.chains.items()})
            self._save()
        try:
            await nft.apply(changes.text)
        except Unavailable:
            self._observed = None
            changes = Comparison(desired, {}, {}).changes()
            state.chains = {name: Written(what) for name, what in changes.chains.items()}
            gone = (f"table {t.family} {TABLE}\ndelete table {t.family} {TABLE}\n" for t in desired)
            await nft.apply("".join(gone) + changes.text)
        if self._observed is None:
            await self._look(again=True)
            self._note_chains(changes)
        else:
            applied(desired, self._observed, kept=kept)
            self._follow(changes)

    def _follow(self, changes: Changes) -> None:
        """One transaction of ours was made since `_observed` was true, and its sets say so."""
        assert self._observed is not None
        generation = nft_chains.generation()
        if generation == self._generation + 1:
            self._on_own(self._generation, generation)
            self._generation = generation
        else:
            self._generation = -1
        if changes.chains:
            self._look_at_chains(self._observed)
            self._note_chains(changes)

    def _note_chains(self, changes: Changes) -> None:
        for name in changes.chains:
            family, chain = name.split("/")
            listed = _chains(self._observed or {}, family).get(chain, "")
            self._state().chains[name] = Written(changes.chains[name], listed)

    # --- connections ---------------------------------------------------------------------------------

    def _hand_on(
        self, ports: Iterable[LocalPort], held: Policy, networks: Iterable[NetworkConfig]
    ) -> list[str]:
        """Bridges on which connections are remembered give their packets to be tracked, others do not."""
        if self._tracking is not Tracking.NETFILTER:
            return []
        tracked = firewall.zones_of((p for p in ports if p.port.security_groups), held)
        words: list[str] = []
        with Netlink() as netlink:
            for network in networks:
                bridge = device_names.bridge_name(network.spec.vni)
                if bridge_hooks.handed_on(netlink, bridge) not in (None, bridge in tracked):
                    netlink.change([bridge_hooks.hand_on(bridge, on=bridge in tracked)])
        return words

    async def _judge(self, held: Policy, ports: Mapping[PortId, LocalPort]) -> None:
        """Cuts what is not allowed any more. Not drift: the configuration has asked for it."""
        tracked = {
            i: (p.port, device_names.tracking_zone(p.network.spec.vni))
            for i, p in ports.items()
            if p.port.security_groups and firewall.is_stateful(p.port, held)
        }
        if self._state().judged and (held, tracked) == self._judged_by:
            return
        now = Standing.of(held, tracked)
        standing = now.digest()
        if standing != self._state().judged:
            zones = firewall_flows.narrowed(self._standing if self._state().judged else None, now)
            if zones:
                judge = partial(firewall.Judge, held, [ports[i] for i in tracked])
                await asyncio.to_thread(firewall_flows.cut, zones, judge)
            self._state().judged = standing
            self._save()
        self._standing, self._judged_by = now, (held, tracked)

    # --- verbs ---------------------------------------------------------------------------------------

    async def port_created(self, port: LocalPort) -> None:
        if not self._compute:
            return
        self._waiting[port.port.id] = port
        async with self._lock:
            if port.port.id in self._waiting:
                batch, self._waiting = self._waiting, {}
                try:
                    await self._admit(batch)
                except BaseException:
                    del batch[port.port.id]
                    self._waiting = {**batch, **self._waiting}
                    raise

    async def _admit(self, batch: Mapping[PortId, LocalPort]) -> None:
        self._local.update(batch)
        await self._add(tuple(batch.values()), ())
        held = self._groups_only()
        filtered = [p for p in batch.values() if p.port.security_groups]
        self._hand_on_now(p for p in filtered if firewall.is_stateful(p.port, held))

    def _hand_on_now(self, ports: Iterable[LocalPort]) -> None:
        bridges = {device_names.bridge_name(p.network.spec.vni) for p in ports}
        if self._tracking is Tracking.NETFILTER and bridges:
            with Netlink() as netlink:
                off = [b for b in sorted(bridges) if bridge_hooks.handed_on(netlink, b) is False]
                netlink.change([bridge_hooks.hand_on(bridge, on=True) for bridge in off])

    async def _add(self, ports: tuple[LocalPort, ...], moving: tuple[Moving, ...]) -> None:
        """What these need besides what is there. Chains that are there are right, or reconcile's business."""
        way = await self._way()
        observed = await self._look(again=False)
        bare = firewall.tables(self._groups_only(), ports, moving, way)
        if any(name not in _chains(observed, t.family) for t in bare for name in t.chains):
            bare = firewall.tables(self._policy(ports), ports, moving, way)
        written = self._state().chains
        needed = tuple(_without_present(table, observed, written) for table in bare)
        self._touch()
        try:
            await self._apply_additions(needed, observed)
        except Unavailable:
            self._observed = None
            observed = await self._look(again=True)
            full = firewall.tables(self._policy(ports), ports, moving, way)
            await self._apply_additions(tuple(_without_present(t, observed, written) for t in full), observed)

    def _groups_only(self) -> Policy:
        """Without their members: enough for what chains there must be, and quick."""
        groups = self._config.security_groups if self._config is not None else ()
        return Policy({group.id: group for group in groups}, {})

    async def _apply_additions(self, needed: tuple[Table, ...], observed: Observed) -> None:
        changes = Comparison(needed, observed, {}, additive=True).changes()
        if not changes.text:
            return
        if changes.chains:
            self._state().chains.update({name: Written(what) for name, what in changes.chains.items()})
            self._save()
        await nft.apply(changes.text)
        applied(needed, observed, additive=True)
        self._follow(changes)
        if changes.chains:
            self._save()

    def _elements_digest(self, desired: Iterable[Table]) -> str:
        found: dict[tuple[str, str], tuple[Mapping[str, str], str]] = {}
        for table in desired:
            for name, elements in table.sets.items():
                items, of = self._digests.get((table.family, name), ({}, ""))
                if not of or items != elements.items:
                    of = digest(repr(sorted(elements.items.items())))
                found[table.family, name] = (elements.items, of)
        self._digests = found
        return digest(repr([(name, of) for name, (_, of) in sorted(found.items(), key=lambda i: i[0])]))

    def _touch(self) -> None:
        if self._state().sets:
            self._state().sets = ""
            self._save()

    async def port_deleted(self, port: PortId, tap: str) -> None:
        self._local.pop(port, None)
        self._waiting.pop(port, None)
        if self._state().moving.pop(port, None) is not None:
            self._save()

    async def move_prepared(self, port: LocalPort, role: MoveRole, *, marked: bool = False) -> None:
        if not self._compute or not port.port.security_groups:
            return
        async with self._lock:
            move = Moving(port.port, port.network.spec.vni, port.tap, role, marked)
            self._state().moving[port.port.id] = move
            self._save()
            self._local[port.port.id] = port
            await self._add((port,), (move,))

    async def move_committed(self, port: LocalPort) -> None:
        await self._ended(port)

    async def move_settled(self, port: LocalPort, role: MoveRole) -> None:
        await self._ended(port)

    async def move_reverted(self, port: LocalPort, role: MoveRole) -> None:
        await self._ended(port)

    async def _ended(self, port: LocalPort) -> None:
        """Judged as any other from here on. Should that fail, the next reconcile does it: nothing that a
        server waits for depends on it. Connections that came with it were judged by another host."""
        async with self._lock:
            move = self._state().moving.pop(port.port.id, None)
            if move is None:
                return
            if move.role is MoveRole.DESTINATION:
                self._state().judged = ""
            self._state().sets = ""
            self._save()
            with contextlib.suppress(Unavailable):
                await self._take_away(move)

    async def _take_away(self, move: Moving) -> None:
        observed = await self._look(again=False)
        sets = observed.get(BRIDGE, ObservedTable()).sets
        both = [firewall.move_elements(move, marked=marked) for marked in (False, True)]
        gone = {n: [k for k in items if k in sets.get(n, {})] for found in both for n, items in found.items()}
        lines = [f"delete element {BRIDGE} {TABLE} {n} {{ {', '.join(k)} }}" for n, k in gone.items() if k]
        if not lines:
            return
        try:
            await nft.apply("\n".join(lines) + "\n")
        except Unavailable:
            self._observed = None
            raise
        for name, keys in gone.items():
            for key in keys:
                del sets[name][key]
        self._follow(Changes("", (), {}))


async def _load(module: str) -> None:
    """Where it is not part of the kernel. One that is not there is doctor's to tell."""
    program = shutil.which("modprobe", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        return
    process = await asyncio.create_subprocess_exec(program, "--quiet", module)
    try:
        async with asyncio.timeout(nft.DEADLINE):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _chains(observed: Observed, family: str) -> Mapping[str, str]:
    return observed.get(family, ObservedTable()).chains


def _without_present(table: Table, observed: Observed, written: Mapping[str, Written]) -> Table:
    """Chains and sets that are new or ask too little, and elements."""
    there = _chains(observed, table.family)
    chains = {
        name: chain
        for name, chain in table.chains.items()
        if name not in there or _asks_too_little(table.family, name, chain, written)
    }
    return Table(table.family, chains, table.sets)


def _asks_too_little(family: str, name: str, chain: Chain, written: Mapping[str, Written]) -> bool:
    last = written.get(chain_key(family, name))
    return last is not None and firewall.is_too_fast(family, name, chain, last.digest)


def _foreign_taps(ports: Iterable[LocalPort], taps: frozenset[str]) -> frozenset[str]:
    """Parts of keys that name taps which are here and of which nothing is known: left alone."""
    known = {p.tap for p in ports}
    return frozenset(name_part(name) for name in taps - known)
