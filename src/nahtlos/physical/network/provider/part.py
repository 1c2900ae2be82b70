"""Networks that are one with an outside network: connected on this host, and told where servers are.

Owns the programs that tag frames (see `tagging`), what is asked of the interfaces they hang at (up, every
frame taken), one JSON file in the host's run directory that says where programs were put, and announcements.
Devices and entries are the driver's own (see `plan`). Never decides what a network is connected to.

A host without the interface takes no part: it has no server of such a network, and none is let in.

After a move the outside still sends to the old host until it hears the server's MAC from the new one. The old
host passes on what comes there, so nothing hangs on the moment; the new one speaks at the switch if no
firewall remembers anything of the port, and in any case once the server runs there, and again with the next
reconciles, in case nobody heard. (With groups not at the switch: the old host judges until then.)

Before, the old host speaks: switches that know nothing of a silent server would send its frames to both
hosts, and what comes in the moment of the switch would be had twice.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import NetworkId, PortId
from nahtlos.model.networking import NetworkSpec
from nahtlos.physical.network import device_names, kernel, links, namespaces, packet, plan
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import KernelRefused, Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.provider import announcement, tagging, ways
from nahtlos.physical.network.provider.tagging import Program
from nahtlos.physical.network.provider.ways import Interface, Way
from nahtlos.physical.ports import MoveRole

REPEATS = 2
"""Reconciles after a move that announce the server once more."""
REMEDY = "connect the interface, give it a fitting MTU and nothing else to do, or move the server elsewhere"


class Record(msgspec.Struct):
    """Where programs are or are about to be put: interface to tags."""

    tags: dict[str, set[int]] = {}


class Provider(Part):
    name = "provider networks"

    def __init__(self, path: Path, underlay: str, socket_: Callable[[], Netlink]) -> None:
        self._path = path
        self._underlay = underlay
        self._socket = socket_
        self._tagging: tuple[Way | None, str] | None = None
        self._obstacles: dict[NetworkId, str] = {}
        self._ways: dict[NetworkId, Way] = {}
        self._again: dict[PortId, int] = {}
        self._unheard: list[str] = []

    # --- what there is -------------------------------------------------------------------------------

    async def capabilities(self) -> dict[str, str]:
        _, words = self._tagged_by()
        return {self.name: words}

    def _tagged_by(self) -> tuple[Way | None, str]:
        if self._tagging is None:
            self._tagging = examine(self._socket())
        return self._tagging

    def ways(
        self, networks: Iterable[NetworkConfig], devices: Mapping[str, LinkInfo]
    ) -> dict[NetworkId, Way]:
        """How each network that can be connected here is. The others are remembered with the reason."""
        specs = [network.spec for network in networks if network.spec.provider is not None]
        found: dict[NetworkId, Way] = {}
        self._obstacles = {}
        addresses = self._addresses() if specs else {}
        for spec in specs:
            why = self._obstacle(spec, devices, addresses)
            way = ways.way_of(spec, self._tagged_by()[0])
            if why or way is None:
                self._obstacles[spec.id] = why
            else:
                found[spec.id] = way
        self._ways = found
        return found

    def port(self, spec: NetworkSpec) -> str:
        """Of the network's bridge, towards the outside; empty if there is none here."""
        return plan.leads_out(spec, self._ways.get(spec.id))

    def check(self, spec: NetworkSpec) -> None:
        """Unavailable if no server of the network can be here."""
        if spec.provider is None:
            return
        names = (spec.provider.interface, device_names.bridge_name(spec.vni))
        asked = (links.read_link(self._socket(), name) for name in names)
        devices = {link.name: link for link in asked if link is not None}
        _raise(spec, self._obstacle(spec, devices, self._addresses()))

    def _addresses(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for index, cidr, _ in kernel.addresses(self._socket()):
            if not cidr.startswith("fe80:"):
                found.setdefault(index, []).append(cidr)
        return found

    def _obstacle(
        self, spec: NetworkSpec, devices: Mapping[str, LinkInfo], addresses: Mapping[int, list[str]]
    ) -> str:
        assert spec.provider is not None
        link = devices.get(spec.provider.interface)
        found = None if link is None else _interface(link, devices.values(), addresses)
        tagging_ = self._tagged_by()[0] if spec.provider.vlan else None
        return ways.obstacle(spec, found, tagging_, self._underlay)

    # --- converge ------------------------------------------------------------------------------------

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        words = self._put_programs([n.spec for n in config.networks])
        self._announce_again(local)
        words, self._unheard = words + self._unheard, []
        occupied = {port.network.spec.id for port in local.values()}
        for network in config.networks:
            why = self._obstacles.get(network.spec.id, "")
            if why and (network.spec.id in occupied or "has no interface" not in why):
                _raise(network.spec, why)
        return tuple(words)

    def _put_programs(self, specs: Iterable[NetworkSpec]) -> list[str]:
        tagged = [s for s in specs if self._ways.get(s.id) is Way.PROGRAMS]
        before = self._read()
        if not tagged and not before.tags:
            return []
        devices = links.read_links(self._socket())
        wanted = [p for spec in tagged for p in _programs(spec, devices)]
        after = Record()
        for spec in tagged:
            assert spec.provider is not None
            after.tags.setdefault(spec.provider.interface, set()).add(spec.provider.vlan)
        names = before.tags.keys() | after.tags.keys()
        both = {name: before.tags.get(name, set()) | after.tags.get(name, set()) for name in names}
        self._write(Record(both))
        words = self._make(wanted, devices, before)
        self._remove_surplus(wanted, devices, both)
        self._write(after)
        return words

    def _make(self, wanted: list[Program], devices: Mapping[str, LinkInfo], before: Record) -> list[str]:
        sock = self._socket()
        names = {link.index: name for name, link in devices.items()}
        words: list[str] = []
        for program in wanted:
            name = names[program.index]
            there = {p.place: p.name for p in tagging.read(sock, program.index, program.where)}
            if there.get(program.place) != program.name:
                with tagging.put(program) as request:
                    sock.change([tagging.put_qdisc(program.index), request])
                if program.vlan in before.tags.get(name, ()):
                    words.append(f"program for VLAN {program.vlan} at {name} was missing: put right")
            link = devices[name]
            if program.where == tagging.INGRESS and not (link.up and link.promiscuous):
                sock.change([links.configure(link.name, up=True, promiscuous=True)])
        return words

    def _remove_surplus(
        self, wanted: list[Program], devices: Mapping[str, LinkInfo], tags: Mapping[str, set[int]]
    ) -> None:
        places = {program.place for program in wanted}
        for name in tags:
            if name in devices:
                found = tagging.read(self._socket(), devices[name].index, tagging.INGRESS)
                gone = [tagging.remove(p) for p in found if p.place not in places]
                if gone:
                    self._socket().change(gone)
                if len(gone) == len(found) and gone:
                    self._socket().change([links.configure(name, promiscuous=False)])

    def _read(self) -> Record:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return Record()

    def _write(self, record: Record) -> None:
        if record == self._read():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(record))
        new.replace(self._path)

    # --- announcements -------------------------------------------------------------------------------

    async def move_prepared(self, port: LocalPort, role: MoveRole, *, marked: bool = False) -> None:
        if role is MoveRole.SOURCE:
            self._announce(port)

    def move_switched(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.DESTINATION and not port.port.security_groups:
            self._announce(port)

    async def move_settled(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.DESTINATION and self._announce(port):
            self._again[port.port.id] = REPEATS

    async def move_reverted(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.SOURCE and self._announce(port):
            self._again[port.port.id] = REPEATS

    async def port_deleted(self, port: PortId, tap: str) -> None:
        self._again.pop(port, None)

    def _announce_again(self, local: Mapping[PortId, LocalPort]) -> None:
        for port, left in tuple(self._again.items()):
            self._again.pop(port)
            if port in local and self._announce(local[port]) and left > 1:
                self._again[port] = left - 1

    def _announce(self, port: LocalPort) -> bool:
        """False if the network is one with no other."""
        provider = port.network.spec.provider
        if provider is None:
            return False
        device = device_names.provider_name(port.network.spec.vni) if provider.vlan else provider.interface
        try:
            packet.send(device, announcement.frames(port.port))
        except OSError as error:
            self._unheard.append(f"port {port.port.id} could not be announced by {device}: {error.strerror}")
        return True


def _raise(spec: NetworkSpec, why: str) -> None:
    if why:
        raise Unavailable(f"network {spec.id}: {why}", field="provider", remedy=REMEDY)


def _interface(link: LinkInfo, devices: Iterable[LinkInfo], addresses: Mapping[int, list[str]]) -> Interface:
    prefix = device_names.provider_alias("")
    lent = link.alias.removeprefix(prefix) if device_names.is_lent(link.alias) else ""
    master = next((d for d in devices if d.index == link.master), None)
    foreign = link.master and (master is None or not master.alias.startswith(device_names.OWNED))
    return Interface(
        mtu=link.mtu,
        addresses=tuple(addresses.get(link.index, ())),
        lent_to=lent,
        master=(master.name if master else "another device") if foreign else "",
    )


def _programs(spec: NetworkSpec, devices: Mapping[str, LinkInfo]) -> list[Program]:
    assert spec.provider is not None
    near, far = devices.get(device_names.provider_name(spec.vni)), devices.get(spec.provider.interface)
    if near is None or far is None:
        return []
    vlan = spec.provider.vlan
    return [tagging.tag_on(near.index, far.index, vlan), tagging.tag_off(far.index, near.index, vlan)]


# --- what this kernel offers -------------------------------------------------------------------------


def examine(netlink: Netlink) -> tuple[Way | None, str]:
    """What there is for VLANs, and in words. Changes nothing."""
    flat = "used: without tags by the interface in the bridge; "
    try:
        netlink.change([links.impossible("vlan")])
    except KernelRefused as refused:
        if refused.code != errno.EOPNOTSUPP:
            return Way.VLAN_DEVICE, f"{flat}VLANs by VLAN devices (8021q)"
    why = _programs_refused()
    if not why:
        return Way.PROGRAMS, f"{flat}VLANs by programs at tc (cls_bpf), as this kernel has no 8021q"
    return None, f"{flat}no VLANs: this kernel has no 8021q, and no programs at tc ({why})"


def _programs_refused() -> str:
    """Why programs cannot be attached, tried in a namespace that goes at once."""

    def attach() -> str:
        with Netlink() as inside:
            index = links.read_links(inside)["lo"].index
            try:
                for program in (tagging.tag_on(index, index, 1), tagging.tag_off(index, index, 1)):
                    with tagging.put(program) as request:
                        inside.change([tagging.put_qdisc(index), request])
            except Unavailable as refused:
                return refused.message
        return ""

    try:
        fd = namespaces.create()
    except Unavailable as refused:
        return refused.message
    try:
        return namespaces.within(fd, attach)
    finally:
        os.close(fd)
