"""An outside network for tests: a switch that learns, a cable of every host to it, a client behind it.

Owns two namespaces (`nlt-out<n>-*`) and the interface `phys0` of each host. The client speaks with a tag if
it is told to; the driver's own programs do it, so what is on the wire is looked at apart (`tags_seen`).
"""

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from network_namespaces import TENANT, Cloud

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig
from nahtlos.model.ids import HostId
from nahtlos.model.networking import NetworkSpec, ProviderLink
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import links
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.provider import tagging

INTERFACE = "phys0"
CLIENT_IP, CLIENT_IPV6, CLIENT_MAC = "10.77.0.200", "fd00:77::200", "02:00:00:00:c1:01"
SOL_PACKET, PACKET_AUXDATA, TAG_IS_VALID = 263, 8, 0x10


class OutsideCloud(Cloud):
    """Hosts whose network `tenant` is one with the outside one. Nobody leads out of it but that."""

    def __init__(self, folder: Path, vlan: int = 0, *, without: Iterable[str] = ()) -> None:
        super().__init__(folder)
        self.vlan = vlan
        self.switch, self.outside = (f"nlt-out{os.getpid()}-{name}" for name in ("sw", "client"))
        for name in (self.switch, self.outside):
            _ip("netns", "add", name)
        _ip("-n", self.switch, "link", "add", "sw0", "type", "bridge", "forward_delay", "0")
        _ip("-n", self.switch, "link", "set", "sw0", "up")
        for host in self.compute:
            if host not in without:
                self.cable(host)
        self._lay("client", self.outside, "c0", CLIENT_MAC)
        device = self._tagged_client() if vlan else "c0"
        for cidr in (f"{CLIENT_IP}/24", f"{CLIENT_IPV6}/64"):
            _ip("-n", self.outside, "address", "add", cidr, "dev", device)
        self.device = device

    @property
    def compute(self) -> list[str]:
        return [n for n, host in self.hosts.items() if host.settings.role is HostRole.COMPUTE]

    def cable(self, host: str) -> None:
        self._lay(host, self.hosts[host].node.namespace, INTERFACE)

    def _lay(self, name: str, space: str, device: str, mac: str = "") -> None:
        far = f"p-{name}"
        own = ("address", mac) if mac else ()
        _ip("-n", self.switch, "link", "add", far, "type", "veth", "peer", "name", device, "netns", space)
        _ip("-n", self.switch, "link", "set", far, "master", "sw0", "up")
        _ip("-n", space, "link", "set", device, *own, "up")

    def _tagged_client(self) -> str:
        lines = [f"link add t0 address {CLIENT_MAC} type veth peer t1", "link set t0 up", "link set t1 up"]
        for line in lines:
            _ip("-n", self.outside, *line.split())

        def attach() -> None:
            with Netlink() as netlink:
                found = links.read_links(netlink)
                near, far = found["t0"].index, found["c0"].index
                for program in (
                    tagging.tag_on(near, far, self.vlan),
                    tagging.tag_off(far, near, self.vlan),
                ):
                    with tagging.put(program) as request:
                        netlink.change([tagging.put_qdisc(program.index), request])

        topology.within(self.outside, attach)
        return "t0"

    def knows(self, ip: str, mac: str) -> None:
        """Nobody at the end of a tap answers ARP."""
        _ip("-n", self.outside, "neigh", "replace", ip, "lladdr", mac, "dev", self.device)

    # --- what the orchestrator would say ---

    @property
    def spec(self) -> NetworkSpec:
        provider = ProviderLink(interface=INTERFACE, vlan=self.vlan)
        nowhere = {"gateway_mac": "", "gateway_host": HostId("")}
        return msgspec.structs.replace(TENANT, provider=provider, **nowhere)

    @property
    def network(self) -> NetworkConfig:
        ports = tuple(self.port(guest) for guest in self.guests.values())
        vteps = tuple(self.hosts[h].node.address for h in self.compute)
        return NetworkConfig(spec=self.spec, ports=ports, gateway_vtep="", vteps=vteps)

    def config(self, host: str, *, networks: bool = True) -> HostConfig:
        config = super().config(host, networks=networks and host in self.compute)
        return msgspec.structs.replace(config, uplinks=())

    # --- what the outside sees ---

    def learnt(self, mac: str) -> str:
        """The host that the switch would send frames for `mac` to; empty: to all."""
        shown = _ip_out("bridge", "-n", self.switch, "fdb", "show", "br", "sw0")
        ports = [line.split()[2] for line in shown.splitlines() if line.startswith(mac) and "master" in line]
        return ports[0].removeprefix("p-") if ports else ""

    @contextlib.contextmanager
    def watched(self, host: str) -> Iterator[socket.socket]:
        """What passes between the switch and a host."""

        def listen() -> socket.socket:
            found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            found.bind((f"p-{host}", 0))
            found.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            found.settimeout(0.05)
            return found

        with topology.within(self.switch, listen) as watching:
            yield watching

    def close(self) -> None:
        super().close()
        for name in (self.switch, self.outside):
            _ip("netns", "delete", name)


def tags_seen(watching: socket.socket, seconds: float) -> set[int]:
    """Tags of frames that carry UDP between IPv4 hosts; 0 for those without."""
    found: set[int] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            frame, extra, _, _ = watching.recvmsg(2048, 128)
        except TimeoutError:
            continue
        inner = frame[16:] if frame[12:14] == b"\x81\x00" else frame[12:]
        if inner[:2] != b"\x08\x00" or inner[11] != 17:
            continue
        status, *_, tci, _ = struct.unpack("IIIHHHH", extra[0][2])
        found.add(tci & 0xFFF if status & TAG_IS_VALID else 0)
    return found


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True, timeout=10)


def _ip_out(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
