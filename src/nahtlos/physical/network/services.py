"""Services of tenant networks on one host: addresses, names, metadata, each network from its own namespace.

Owns for each network of a compute host a namespace (stored as `netns.<network>`), the pair of devices
`sv<vni>` - `eth0` between the network's bridge and it, the units `dnsmasq.<network>` and
`metadata.<network>`, and their files. The host's own stack takes no part, so tenants' addresses may be
anything, also the hosts' own. Decides nothing about what is told: see `addressing`, `dhcp`, `metadata`.

    bridge br<vni> -- sv<vni> | eth0: anycast MAC, dhcp_ip, 169.254.169.254, fe80::a9fe:a9fe; two programs
"""

import asyncio
import hashlib
import os
import shutil
import signal
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig
from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import PortId
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import (
    addressing,
    dhcp,
    kernel,
    links,
    metadata,
    metadata_server,
    namespaces,
    netlink,
)
from nahtlos.physical.network.addressing import Inside, inside, service_name
from nahtlos.physical.network.dhcp import INTERFACE
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.plan import DELIVERING, Change, Item, Setting, anycast_mac, bridge_name, normal
from nahtlos.physical.ports import Supervisor, Unit, UnitStatus
from nahtlos.physical.settings import AgentSettings

ALIAS = "nahtlos-service/"
"""Not the driver's own prefix: these devices come and go with their far end, not by the plan."""
DHCP, METADATA, NAMESPACE = "dnsmasq.", "metadata.", "netns."
INDEX_GAP = 100
"""The near end of a pair takes an index the far one cannot have: the kernel mistakes equal ones for one
device and takes a second to note the carrier."""
SOURCES = Path(metadata_server.__file__).parents[3]
SETTINGS = {"accept_ra": "0", "autoconf": "0", "accept_dad": "0", "disable_ipv6": "0"}


class Services(Part):
    name = "services"

    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._serving = settings.role is HostRole.COMPUTE
        self._folder = settings.run_dir / "dhcp"
        self._log_dir = settings.state_dir / "log"
        self._supervisor = supervisor

    async def capabilities(self) -> dict[str, str]:
        missing = [name for name in ("dnsmasq", "nsenter", "setpriv") if _find(name) is None]
        words = f"missing: {', '.join(missing)} (apt-get install dnsmasq-base util-linux)" if missing else ""
        return {"addresses and names": words or "used: dnsmasq in a namespace per network"}

    def items(self, config: HostConfig) -> Iterable[Item]:
        if self._serving:
            for network in config.networks:
                yield from addressing.service_neighbours(network.spec)

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        """Every network that can be served is, before the first that cannot be is raised."""
        networks = tuple(map(normal, config.networks)) if self._serving else ()
        units = await self._supervisor.units()
        words: list[str] = []
        failed: Error | None = None
        for network in networks:
            try:
                words += await self._serve(network, networks, config, units)
            except Error as error:
                failed = failed or error
        await self._retire(frozenset(n.spec.id for n in networks), units)
        if failed is not None:
            raise failed
        return tuple(words)

    # --- one network ---------------------------------------------------------------------------------

    async def _serve(
        self,
        network: NetworkConfig,
        networks: tuple[NetworkConfig, ...],
        config: HostConfig,
        units: dict[str, UnitStatus],
    ) -> list[str]:
        fd = await self._namespace(network.spec.id, units)
        try:
            place = f"{namespaces.identity(fd)}.{await asyncio.to_thread(_wire, network, fd)}"
        finally:
            os.close(fd)
        self._folder.mkdir(parents=True, exist_ok=True)
        files = _Files(self._folder, network.spec.id)
        spec = network.spec
        content = (addressing.dhcp_hosts(network, dhcp.LEASE), addressing.dns_names(network))
        for path, text in zip((files.hosts, files.names), content, strict=True):
            _write_if_different(path, text)
        _write_if_different(files.metadata, metadata.directory(network, networks, config.routers), mode=0o600)
        told = dhcp.arguments(
            spec, hosts=files.hosts, names=files.names, leases=files.leases, user=self._user()
        )
        argv = (dhcp.program(), *told)
        words = await self._run(DHCP, spec.id, argv, units, _Mark(_digest(place, *argv), _digest(*content)))
        argv = _metadata_argv(network, files)
        words += await self._run(METADATA, spec.id, argv, units, _Mark(_digest(place, str(SOURCES), *argv)))
        return words

    async def _namespace(self, network: str, units: dict[str, UnitStatus]) -> int:
        """A descriptor of the network's namespace: the stored one, else that of a unit which is still in it
        (the supervisor lost it), else a new one."""
        name = NAMESPACE + network
        fd = await self._supervisor.fetch_fd(name)
        if fd is not None:
            return fd
        pids = [u.pid for prefix in (DHCP, METADATA) if (u := units.get(prefix + network)) and u.pid]
        fd = next((found for pid in pids if (found := namespaces.of_process(pid)) is not None), None)
        fd = namespaces.create() if fd is None else fd
        await self._supervisor.store_fd(name, fd)
        return fd

    async def _run(
        self, prefix: str, network: str, argv: tuple[str, ...], units: dict[str, UnitStatus], wanted: "_Mark"
    ) -> list[str]:
        """The unit as it should be: started again only if it should be another one or serve in another
        place. What was done is noted after it was done, so an agent that dies in between does it again."""
        name = prefix + network
        mark = self._folder / f"{name}.unit"
        known, unit = _Mark.read(mark), units.get(name)
        running = unit is not None and unit.pid is not None
        if running and known == wanted:
            return []
        if running and known is not None and known.unit == wanted.unit:
            assert unit is not None and unit.pid is not None
            os.kill(unit.pid, signal.SIGHUP)
        else:
            if unit is not None:
                await self._supervisor.stop(name, grace=1.0)
            await self._start(name, NAMESPACE + network, argv)
        _write_if_different(mark, wanted.text)
        lost = not running and known is not None and known.unit == wanted.unit
        what = "DHCP" if prefix == DHCP else "metadata"
        return [f"{what} of network {network} was not served: started"] if lost else []

    async def _start(self, name: str, namespace: str, argv: tuple[str, ...]) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        entered = (_program("nsenter"), f"--net=/proc/self/fd/{{fd:{namespace}}}", "--", *argv)
        await self._supervisor.start(
            Unit(
                name=name,
                argv=entered,
                environment={"PYTHONPATH": str(SOURCES)},
                fds=(namespace,),
                log=self._log_dir / f"{name}.log",
                restart=True,
            )
        )

    def _user(self) -> str:
        """dnsmasq reads its lists again after giving up root, if the way there is open."""
        folders = (self._folder, *self._folder.parents)
        open_ = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
        return "nobody" if open_ else "root"

    # --- what is no longer wanted --------------------------------------------------------------------

    async def _retire(self, wanted: frozenset[str], units: dict[str, UnitStatus]) -> None:
        for name in sorted(units):
            prefix, _, network = name.partition(".")
            if f"{prefix}." in (DHCP, METADATA) and network not in wanted:
                await self._supervisor.stop(name, grace=1.0)
                (self._folder / f"{name}.unit").unlink(missing_ok=True)
        for name in sorted(await self._supervisor.stored()):
            network = name.removeprefix(NAMESPACE)
            if name.startswith(NAMESPACE) and network not in wanted:
                await self._supervisor.drop_fd(name)
                _Files(self._folder, network).remove()
        await asyncio.to_thread(_unplug_others, wanted)


class _Mark(msgspec.Struct, frozen=True):
    """What a unit was last made to be: which arguments in which place, and what it has read."""

    unit: str
    content: str = ""

    @property
    def text(self) -> str:
        return f"{self.unit} {self.content}"

    @staticmethod
    def read(path: Path) -> "_Mark | None":
        try:
            unit, _, content = path.read_text().partition(" ")
        except FileNotFoundError:
            return None
        return _Mark(unit, content)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class _Files(msgspec.Struct, frozen=True):
    folder: Path
    network: str

    @property
    def hosts(self) -> Path:
        return self.folder / f"{self.network}.hosts"

    @property
    def names(self) -> Path:
        return self.folder / f"{self.network}.names"

    @property
    def leases(self) -> Path:
        return self.folder / f"{self.network}.leases"

    @property
    def metadata(self) -> Path:
        return self.folder / f"{self.network}.json"

    def remove(self) -> None:
        for path in (self.hosts, self.names, self.leases, self.metadata):
            path.unlink(missing_ok=True)


def _metadata_argv(network: NetworkConfig, files: _Files) -> tuple[str, ...]:
    """Root without root's rights, but to listen where web servers do and to speak for routers."""
    addresses = [addressing.METADATA]
    if addressing.has_ipv6(network.spec):
        addresses.append(addressing.METADATA_IPV6)
    rights = ("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_bind_service,+net_raw")
    program = (sys.executable, "-S", "-s", "-m", metadata_server.__name__)
    return (_program("setpriv"), *rights, "--", *program, str(files.metadata), *addresses)


# --- devices -----------------------------------------------------------------------------------------


def _wire(network: NetworkConfig, fd: int) -> int:
    """The pair of devices, and everything on both of its ends. Returns the index of the inner one."""
    wanted, near = inside(network.spec), service_name(network.spec.vni)
    with Netlink() as host:
        devices = links.read_links(host)
        within = namespaces.within(fd, _devices_inside)
        if near not in devices or INTERFACE not in within:
            host.change([links.delete(near)])
            index = INDEX_GAP + max(link.index for link in devices.values())
            pair = links.create_veth(near, INTERFACE, wanted.mtu, peer_namespace=fd, index=index)
            host.change([pair, links.configure(near, alias=f"{ALIAS}{network.spec.id}")])
            devices = links.read_links(host)
        inner = namespaces.within(fd, lambda: _settle_inside(wanted))
        _plug(host, network, devices)
    return inner


def _plug(host: Netlink, network: NetworkConfig, devices: dict[str, links.LinkInfo]) -> None:
    """The near end: a silent, then delivering port of the bridge, and the entry that leads to it."""
    vni, mtu = network.spec.vni, network.spec.mtu
    near, bridge = devices[service_name(vni)], devices[bridge_name(vni)]
    if near.master != bridge.index:
        host.change([links.configure(near.name, master=bridge.index)])
    if near.master != bridge.index or near.flood != DELIVERING:
        host.change([links.set_flood(near.index, DELIVERING, near.name)])
    if near.mtu != mtu or not near.up:
        host.change([links.configure(near.name, mtu=mtu, up=True)])
    mac = anycast_mac(vni)
    if host.forwarding_of(bridge.index, mac) != near.index:
        host.change([netlink.forward_to_port(near.index, mac)])


def _devices_inside() -> dict[str, links.LinkInfo]:
    with Netlink() as socket:
        return links.read_links(socket)


def _settle_inside(wanted: Inside) -> int:
    """Runs inside. Addresses are there at once, and none is the kernel's own idea."""
    with Netlink() as socket:
        devices = links.read_links(socket)
        own, loopback = devices[INTERFACE], devices["lo"]
        if not loopback.up:
            socket.change([links.configure("lo", up=True)])
        settings = [Setting(f"net/ipv6/conf/{INTERFACE}/{name}", value) for name, value in SETTINGS.items()]
        settings.append(Setting(f"net/ipv6/conf/{INTERFACE}/addr_gen_mode", "1"))
        kernel.write_settings([Change(s) for s in settings if kernel.setting(s.path) not in (None, s)])
        if (own.mac, own.mtu) != (wanted.mac, wanted.mtu):
            socket.change([links.configure(INTERFACE, mac=wanted.mac, mtu=wanted.mtu)])
        if not own.up:
            socket.change([links.configure(INTERFACE, up=True)])
        there = {cidr for index, cidr, _ in kernel.addresses(socket) if index == own.index}
        socket.change([netlink.remove_address(own.index, cidr) for cidr in sorted(there - wanted.addresses)])
        socket.change([netlink.address(own.index, cidr) for cidr in sorted(wanted.addresses - there)])
        socket.change([netlink.link_route(own.index, cidr, wanted.source) for cidr in sorted(wanted.links)])
        return own.index


def _unplug_others(wanted: frozenset[str]) -> None:
    with Netlink() as host:
        for link in links.read_links(host).values():
            if link.alias.startswith(ALIAS) and link.alias.removeprefix(ALIAS) not in wanted:
                host.change([links.delete(link.name)])


# --- files and programs ------------------------------------------------------------------------------


def _find(name: str) -> str | None:
    return shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")


def _program(name: str) -> str:
    found = _find(name)
    if found is None:
        raise Unavailable(f"{name} is not installed", field="network", remedy="apt-get install util-linux")
    return found


def _write_if_different(path: Path, text: str, *, mode: int = 0o644) -> None:
    """At once and whole, so that who reads it finds the old or the new."""
    try:
        if path.read_text() == text:
            return
    except FileNotFoundError:
        pass
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=mode)
    new.chmod(mode)
    new.write_text(text)
    new.replace(path)
