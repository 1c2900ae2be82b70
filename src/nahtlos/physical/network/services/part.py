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
from nahtlos.model.ids import NetworkId, PortId
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import namespaces
from nahtlos.physical.network.items import Item
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.plan import normal
from nahtlos.physical.network.programs import Programs
from nahtlos.physical.network.services import addressing, dhcp, metadata, metadata_server
from nahtlos.physical.network.services.wiring import unplug_others, wire
from nahtlos.physical.ports import Supervisor, Unit, UnitStatus
from nahtlos.physical.settings import AgentSettings

DHCP, METADATA, NAMESPACE = "dnsmasq.", "metadata.", "netns."
SOURCES = Path(metadata_server.__file__).parents[4]


class Services(Part):
    name = "services"

    def __init__(self, settings: AgentSettings, supervisor: Supervisor, programs: Programs) -> None:
        self._serving = settings.role is HostRole.COMPUTE
        self._folder = settings.run_dir / "dhcp"
        self._log_dir = settings.state_dir / "log"
        self._supervisor = supervisor
        self._programs = programs
        self._plugged: frozenset[str] | None = None
        """Networks beside which no others are left plugged in."""

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
        places, failures = await self._places(networks, units)
        words: list[str] = []
        for network in networks:
            if network.spec.id in places:
                try:
                    words += await self._serve(network, networks, config, units, places[network.spec.id])
                except Error as error:
                    failures.append(error)
        await self._retire(frozenset(n.spec.id for n in networks), units)
        if failures:
            raise failures[0]
        return tuple(words)

    async def _places(
        self, networks: tuple[NetworkConfig, ...], units: dict[str, UnitStatus]
    ) -> tuple[dict[NetworkId, str], list[Error]]:
        """Where each network is served from: other if what listens there would be deaf now."""
        fds: dict[NetworkId, int] = {}
        failures: list[Error] = []
        try:
            for network in networks:
                try:
                    fds[network.spec.id] = await self._namespace(network.spec.id, units)
                except Error as error:
                    failures.append(error)
            wired = await asyncio.to_thread(wire, [n for n in networks if n.spec.id in fds], fds)
            failures += [found for found in wired.values() if isinstance(found, Error)]
            places = {
                id_: f"{namespaces.identity(fds[id_])}.{found}"
                for id_, found in wired.items()
                if isinstance(found, int)
            }
            return places, failures
        finally:
            for fd in fds.values():
                os.close(fd)

    # --- one network ---------------------------------------------------------------------------------

    async def _serve(
        self,
        network: NetworkConfig,
        networks: tuple[NetworkConfig, ...],
        config: HostConfig,
        units: dict[str, UnitStatus],
        place: str,
    ) -> list[str]:
        self._folder.mkdir(parents=True, exist_ok=True)
        files = _Files(self._folder, network.spec.id)
        spec = network.spec
        content = (addressing.dhcp_hosts(network, dhcp.LEASE), addressing.dns_names(network))
        for path, text in zip((files.hosts, files.names), content, strict=True):
            _write_if_different(path, text)
        user_data = {server.spec.id: server.spec.user_data for server in config.servers}
        directory = metadata.directory(network, networks, config.routers, user_data)
        _write_if_different(files.metadata, directory, mode=0o600)
        told = dhcp.arguments(
            spec, hosts=files.hosts, names=files.names, leases=files.leases, user=self._user()
        )
        argv = (*self._programs.words("dnsmasq"), *told)
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
        if wanted != self._plugged:
            await asyncio.to_thread(unplug_others, wanted)
            self._plugged = wanted


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
