"""Makes namespaces, their cables and their facts so, and says what was different.

Owns devices of the host whose alias begins with `nahtlos-routing/`, the namespaces of `namespaces` and the
file `routing.json` in the run directory: what was last made true, so that drift can be told from a change
of configuration. Losing it costs words in a report. Blocks; called from a worker thread. Decides nothing.
"""

import hashlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict, Error
from nahtlos.physical.network import links, nft_chains
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink, Request
from nahtlos.physical.network.routing import facts, tables
from nahtlos.physical.network.routing.facts import Cable, Change, Entry, Proxy, Setting, Space
from nahtlos.physical.network.routing.namespaces import Namespaces

ALIAS = "nahtlos-routing/"
"""Followed by the name of the namespace at the other end."""
INDEX_GAP = 100
"""The near end of a pair takes an index the far one cannot have: the kernel mistakes equal ones for one
device and takes a second to note the carrier."""


class Known(msgspec.Struct):
    """What was last made true of a namespace."""

    digest: str = ""
    """Of everything wanted of it."""
    rules: str = ""
    """Digest of its packet filter."""
    generation: int = 0
    """Of the kernel's rules there, right after they were applied."""
    prepared: bool = False
    """No configuration wants it yet, but one will: it is left alone until then."""


class Found(msgspec.Struct):
    """Result of one pass."""

    words: list[str] = []
    filters: list[Space] = []
    """Whose packet filter must be applied."""
    announce: list[Proxy] = []
    """What this host answers for since this pass."""
    failures: list[Error] = []


class Spaces:
    def __init__(self, run_dir: Path) -> None:
        self.namespaces = Namespaces(run_dir)
        self._file = run_dir / "routing.json"
        self._known: dict[str, Known] | None = None
        self.writes = 0
        """Requests so far that could change something."""

    # --- memory --------------------------------------------------------------------------------------

    @property
    def known(self) -> dict[str, Known]:
        if self._known is None:
            try:
                self._known = msgspec.json.decode(self._file.read_bytes(), type=dict[str, Known])
            except (OSError, msgspec.DecodeError):
                self._known = {}
        return self._known

    def _save(self, before: bytes) -> None:
        data = msgspec.json.encode(self.known, order="sorted")
        if data == before:
            return
        new = self._file.with_suffix(".new")
        new.write_bytes(data)
        new.replace(self._file)

    # --- one pass ------------------------------------------------------------------------------------

    def surplus(self, wanted: Iterable[Space]) -> tuple[str, ...]:
        """Namespaces that are there and neither wanted nor prepared for."""
        names = {space.name for space in wanted} | self._prepared()
        return tuple(n for n in self.namespaces.names() if n not in names)

    def _prepared(self) -> set[str]:
        return {name for name, known in self.known.items() if known.prepared}

    def abandon(self, name: str) -> None:
        before = msgspec.json.encode(self.known, order="sorted")
        if name in self.known:
            self.known[name].prepared = False
            self._save(before)

    def remove(self, names: Iterable[str]) -> None:
        """Cables first: an interface that waits for its namespace to end would keep its name."""
        with Netlink() as host:
            devices = links.read_links(host)
            for name in names:
                cables = [d.name for d in devices.values() if d.alias == ALIAS + name]
                host.change([links.delete(cable) for cable in cables])
                self.namespaces.destroy(name)

    def make(self, wanted: Sequence[Space], *, silent: str = "") -> Found:
        """Everything but packet filters (see Found). What fails of one namespace does not keep the others
        from being made. Nothing leads to the one named `silent`: it is prepared."""
        before, found = msgspec.json.encode(self.known, order="sorted"), Found()
        digests = {space.name: _digest(space) for space in wanted}
        with Netlink() as host:
            for space in wanted:
                try:
                    self._exists(space, found, digests[space.name])
                except Error as error:
                    found.failures.append(error)
            self._cables(host, wanted, found, digests)
            for space in wanted:
                try:
                    self._inside(space, found, digests[space.name])
                except Error as error:
                    found.failures.append(error)
            self._outside(host, wanted, found, digests, silent)
            self.writes += host.writes
        for space in wanted:
            known = self.known.setdefault(space.name, Known())
            known.digest, known.prepared = digests[space.name], space.name == silent
        for name in set(self.known) - set(digests) - self._prepared():
            del self.known[name]
        self._save(before)
        return found

    def _say(self, space: str, found: Found, digests: str, words: Iterable[object]) -> None:
        """Only if nothing else was wanted of it the last time."""
        known = self.known.get(space)
        if known is not None and known.digest == digests:
            found.words += [f"{space}: {word}" for word in words]

    def _exists(self, space: Space, found: Found, digest: str) -> None:
        if self.namespaces.exists(space.name):
            return
        self._say(space.name, found, digest, ["its namespace was missing: made again"])
        self.known.pop(space.name, None)
        self.namespaces.create(space.name)
        settings = [Change(f) for f in space.inside if isinstance(f, Setting)]
        self.namespaces.within(space.name, lambda: _write_settings(settings))

    def _cables(
        self, host: Netlink, wanted: Sequence[Space], found: Found, digests: Mapping[str, str]
    ) -> None:
        """All of them in three requests' batches: remove, create, configure."""
        devices = links.read_links(host)
        spaces = {cable.outer: space for space in wanted for cable in space.cables}
        cables = {cable.outer: cable for space in wanted for cable in space.cables}
        there = {s.name: self._inner_devices(s) for s in wanted if self.namespaces.exists(s.name)}
        born: list[str] = []
        kept = self._prepared() - {s.name for s in wanted}
        gone = [
            links.delete(d.name)
            for d in devices.values()
            if _owned(d) and d.name not in cables and _space_of(d) not in kept
        ]
        for outer, cable in cables.items():
            space, device = spaces[outer], devices.get(outer)
            if space.name not in there:
                continue
            if device is not None and not _owned(device):
                found.failures.append(_foreign(outer))
            elif device is None or _space_of(device) != space.name or cable.inner not in there[space.name]:
                gone += [links.delete(outer)] if device is not None else []
                born.append(outer)
        host.change(gone)
        self._bear(host, [(cables[name], spaces[name]) for name in born])
        for name in born:
            self._say(
                spaces[name].name, found, digests[spaces[name].name], [f"cable {name} was missing: made"]
            )
        self._settle(host, cables, spaces, found, digests, frozenset(born))

    def _inner_devices(self, space: Space) -> frozenset[str]:
        return self.namespaces.within(space.name, _device_names)

    def _bear(self, host: Netlink, born: Sequence[tuple[Cable, Space]]) -> None:
        if not born:
            return
        index = INDEX_GAP + max(link.index for link in links.read_links(host).values())
        for number, (cable, space) in enumerate(born):
            with self.namespaces.opened(space.name) as fd:
                create = links.create_veth(
                    cable.outer, cable.inner, cable.mtu, peer_namespace=fd, index=index + number
                )
                host.change([create, links.configure(cable.outer, alias=ALIAS + space.name)])

    def _settle(
        self,
        host: Netlink,
        cables: Mapping[str, Cable],
        spaces: Mapping[str, Space],
        found: Found,
        digests: Mapping[str, str],
        born: frozenset[str],
    ) -> None:
        """Bridge, size, flooding, up."""
        devices = links.read_links(host)
        requests: list[Request] = []
        for name, cable in cables.items():
            device = devices.get(name)
            if device is None or not _owned(device):
                continue
            wrong = _configuration(device, cable, devices)
            if wrong and name not in born:
                name_ = spaces[name].name
                self._say(name_, found, digests[name_], [f"cable {name} was different: put right"])
            requests += wrong
        host.change(requests)

    def _inside(self, space: Space, found: Found, digest: str) -> None:
        if not self.namespaces.exists(space.name):
            return
        known = self.known.get(space.name)
        changes, generation_, writes = self.namespaces.within(space.name, lambda: _put_inside(space))
        self.writes += writes
        self._say(space.name, found, digest, _summary(changes))
        wanted = hashlib.sha256(space.rules.encode()).hexdigest() if space.rules else ""
        known = known or Known()
        if (space.rules or known.rules) and (known.rules, known.generation) != (wanted, generation_):
            if known.rules == wanted:
                self._say(space.name, found, digest, ["its packet filter was different: put right"])
            found.filters.append(space)

    def _outside(
        self,
        host: Netlink,
        wanted: Sequence[Space],
        found: Found,
        digests: Mapping[str, str],
        silent: str,
    ) -> None:
        kept = self._prepared() - {s.name for s in wanted}
        devices = {
            name: d for name, d in links.read_links(host).items() if not (_owned(d) and _space_of(d) in kept)
        }
        own = {d.name for d in devices.values() if _owned(d)}
        owner = {fact: space.name for space in wanted for fact in space.outside}
        facts_ = {f for f, space in owner.items() if space != silent or not isinstance(f, Proxy | Entry)}
        settings = [f for f in owner if isinstance(f, Setting)]
        present = tables.outside(host, devices, own, settings)
        todo = facts.changes(facts_, present)
        tables.make(host, todo, devices)
        for change in todo:
            space = owner.get(change.fact, "")
            self._say(space, found, digests.get(space, ""), [change])
        found.announce = [c.fact for c in todo if isinstance(c.fact, Proxy) and not c.remove]

    # --- packet filters ------------------------------------------------------------------------------

    def filtered(self, space: Space) -> None:
        """Its packet filter has just been applied."""
        before = msgspec.json.encode(self.known, order="sorted")
        known = self.known.setdefault(space.name, Known())
        known.rules = hashlib.sha256(space.rules.encode()).hexdigest() if space.rules else ""
        known.generation = self.namespaces.within(space.name, nft_chains.generation)
        self._save(before)


def _put_inside(space: Space) -> tuple[tuple[Change, ...], int, int]:
    with Netlink() as sock:
        settings = [f for f in space.inside if isinstance(f, Setting)]
        changes = facts.changes(space.inside, tables.inside(sock, settings))
        if changes:
            tables.make(sock, changes, links.read_links(sock))
        return changes, nft_chains.generation(), sock.writes


def _owned(device: LinkInfo) -> bool:
    return device.alias.startswith(ALIAS)


def _space_of(device: LinkInfo) -> str:
    return device.alias.removeprefix(ALIAS)


def _device_names() -> frozenset[str]:
    return frozenset(name for _, name in socket.if_nameindex())


def _write_settings(settings: Iterable[Change]) -> None:
    for change in settings:
        path = tables.SYSCTL / change.fact.path if isinstance(change.fact, Setting) else None
        if path is not None and path.exists() and isinstance(change.fact, Setting):
            path.write_text(change.fact.value)


def _configuration(device: LinkInfo, cable: Cable, devices: Mapping[str, LinkInfo]) -> list[Request]:
    master = devices[cable.bridge].index if cable.bridge in devices else 0
    requests: list[Request] = []
    mac = cable.outer_mac if cable.outer_mac and cable.outer_mac != device.mac else None
    mtu = cable.mtu if cable.mtu != device.mtu else None
    enslaved = device.master == master
    if mac or mtu or not enslaved:
        requests.append(links.configure(device.name, mtu=mtu, mac=mac, master=None if enslaved else master))
    if master and (not enslaved or device.flood != cable.flood):
        requests.append(links.set_flood(device.index, cable.flood, device.name))
    if not device.up:
        requests.append(links.configure(device.name, up=True))
    return requests


def _summary(changes: Sequence[Change], most: int = 5) -> list[str]:
    """In words; many of a kind are counted."""
    words = [str(change) for change in changes]
    if len(words) <= most:
        return words
    return [*words[:most], f"and {len(words) - most} more"]


def _digest(space: Space) -> str:
    parts = [space.name, *map(repr, space.cables), space.rules]
    parts += sorted(map(repr, space.inside)) + sorted(map(repr, space.outside))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _foreign(name: str) -> Conflict:
    return Conflict(
        f"interface {name} exists and was not made by nahtlos",
        field="network",
        remedy=f"remove or rename {name}",
    )
