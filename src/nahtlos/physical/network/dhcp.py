"""DHCP for the servers of a network: one dnsmasq per network and compute host, kept by the supervisor.

Owns the unit `dnsmasq.<network>`, its list of servers and its leases. Every host's dnsmasq knows all
ports of the network, so nothing changes for it when a server moves; the filter keeps each question on the
host of the server that asks (see nft). Gives addresses only to MACs it has been told. Serves no DNS.
"""

import hashlib
import ipaddress
import os
import shutil
import signal
import stat
from collections.abc import Iterable
from pathlib import Path

from nahtlos.model.config import NetworkConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import NetworkId
from nahtlos.physical.network.plan import bridge_name
from nahtlos.physical.ports import Supervisor, Unit, UnitStatus

LEASE = "30d"
"""Long: a server keeps its address for life, and need not ask while a host is upgraded."""
PREFIX = "dnsmasq."


def hosts_text(network: NetworkConfig) -> str:
    """One line per port as `--dhcp-hostsfile` wants it."""
    lines = sorted(f"{p.mac},{p.ip},{p.server},{LEASE}" for p in network.ports)
    return "".join(f"{line}\n" for line in lines)


def arguments(network: NetworkConfig, directory: Path, *, user: str) -> tuple[str, ...]:
    """dnsmasq's arguments: only DHCP, only on the network's bridge, nothing from files of the host."""
    spec = network.spec
    subnet = ipaddress.ip_network(spec.cidr)
    return (
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--log-facility=-",
        "--port=0",
        "--bind-interfaces",
        f"--interface={bridge_name(spec.vni)}",
        "--except-interface=lo",
        f"--user={user}",
        f"--dhcp-range={subnet.network_address},static,{subnet.netmask},{LEASE}",
        f"--dhcp-hostsfile={_hosts(directory, spec.id)}",
        f"--dhcp-leasefile={directory / f'{spec.id}.leases'}",
        "--dhcp-authoritative",
        "--no-ping",
        "--pid-file=",
        f"--dhcp-option=option:router,{spec.gateway_ip}",
        f"--dhcp-option=option:mtu,{spec.mtu}",
    )


def _hosts(directory: Path, network: str) -> Path:
    return directory / f"{network}.hosts"


class Dhcp:
    """The dnsmasq units of one host."""

    def __init__(self, run_dir: Path, log_dir: Path, supervisor: Supervisor) -> None:
        self._directory = run_dir / "dhcp"
        self._log_dir = log_dir
        self._supervisor = supervisor

    async def serve(self, networks: Iterable[NetworkConfig], reborn: frozenset[str]) -> tuple[str, ...]:
        """Exactly `networks` are served. `reborn` names bridges that were made anew: sockets bound to the
        old ones are deaf. Returns what was found different without having been asked for."""
        networks = tuple(networks)
        units = await self._supervisor.units()
        found: list[str] = []
        for network in networks:
            found += await self._serve(network, units, bridge_name(network.spec.vni) in reborn)
        wanted = {PREFIX + n.spec.id for n in networks}
        for name in sorted(n for n in units if n.startswith(PREFIX) and n not in wanted):
            await self._supervisor.stop(name, grace=1.0)
            self._forget(NetworkId(name.removeprefix(PREFIX)))
        return tuple(found)

    async def _serve(self, network: NetworkConfig, units: dict[str, UnitStatus], reborn: bool) -> list[str]:
        name, id_ = PREFIX + network.spec.id, network.spec.id
        self._directory.mkdir(parents=True, exist_ok=True)
        changed = _write_if_different(_hosts(self._directory, id_), hosts_text(network))
        argv = (_program(), *arguments(network, self._directory, user=self._user()))
        mark = self._directory / f"{id_}.unit"
        digest = hashlib.sha256("\0".join(argv).encode()).hexdigest()
        known = mark.exists()
        other = _write_if_different(mark, digest)
        unit = units.get(name)
        if unit is not None and unit.pid is not None and not other and not reborn:
            if changed:
                os.kill(unit.pid, signal.SIGHUP)
            return []
        if unit is not None:
            await self._supervisor.stop(name, grace=1.0)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        await self._supervisor.start(
            Unit(name=name, argv=argv, log=self._log_dir / f"{name}.log", restart=True)
        )
        lost = known and not other and not reborn
        return [f"DHCP of network {id_} was not served: started"] if lost else []

    def _user(self) -> str:
        """dnsmasq reads the list of servers again after giving up root, if the way there is open."""
        folders = (self._directory, *self._directory.parents)
        open_ = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
        return "nobody" if open_ else "root"

    def _forget(self, network: NetworkId) -> None:
        for suffix in ("hosts", "leases", "unit"):
            (self._directory / f"{network}.{suffix}").unlink(missing_ok=True)


def _program() -> str:
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        raise Unavailable("dnsmasq is not installed", field="network", remedy="apt-get install dnsmasq-base")
    return program


def _write_if_different(path: Path, text: str) -> bool:
    """In place, so that who reads it by name never finds it missing. Whether it was different."""
    try:
        if path.read_text() == text:
            return False
    except FileNotFoundError:
        pass
    path.write_text(text)
    path.chmod(0o644)
    return True
