"""The usual way to move a server's network, for comparison: bridges that learn, and an announcement.

What users of libvirt have: on every host a learning bridge with its interface in it, and the switch between
them learns too; the tap at the destination is there before the server, the one at the source goes with the
process that held it. When the server runs again its VMM announces it five times by RARP (as QEMU does) and,
for those who asked by ARP, by a gratuitous one.
"""

import asyncio
import os
import struct
import time

from benchmarks import network_load as load
from benchmarks.network_hosts import EDGE, GATEWAY_IP, GATEWAY_MAC, run
from benchmarks.network_moves import Leg
from nahtlos.lab import topology
from nahtlos.model.config import PortConfig
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import tap

ANNOUNCEMENTS_SECONDS = (0.0, 0.05, 0.15, 0.35, 0.65)
"""After the start: QEMU's defaults are five rounds, 50 ms at first and 100 ms more each time, up to 550."""
BRIDGE = "br0"


class Learning:
    """Implements `network_moves.Way` on the cables of a lab that has no drivers."""

    def __init__(self, cables: topology.Topology) -> None:
        self._nodes = {node.name: node for node in cables.nodes if node.role is not None}
        self._ports: dict[str, PortConfig] = {}
        self._taps: dict[tuple[str, str], int] = {}
        self._announcing: set[asyncio.Task[None]] = set()

    async def open(self, ports: dict[str, PortConfig], places: dict[str, str]) -> dict[str, int]:
        self._ports = ports
        for node in self._nodes.values():
            self._bridge(node)
        neighbours = [
            f"neigh replace {p.ip} lladdr {p.mac} dev {BRIDGE} nud permanent" for p in ports.values()
        ]
        run(*self._nodes[EDGE].enter, "ip", "-batch", "-", text="\n".join(neighbours))
        return {name: self._plug(name, places[name]) for name in ports}

    def _bridge(self, node: topology.Node) -> None:
        address = ["address", GATEWAY_MAC] if node.role is HostRole.EDGE else []
        lines = [
            " ".join(["link add", BRIDGE, *address, "type bridge forward_delay 0 mcast_snooping 0"]),
            f"link set eth0 master {BRIDGE}",
            f"link set {BRIDGE} up",
        ]
        if node.role is HostRole.EDGE:
            lines.append(f"addr add {GATEWAY_IP}/16 dev {BRIDGE}")
        run(*node.enter, "ip", "-batch", "-", text="\n".join(lines))
        if node.role is HostRole.EDGE:
            run(*node.enter, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def _plug(self, server: str, host: str) -> int:
        node, name = self._nodes[host], server.replace("mover", "m").replace("peer-host", "p")
        fd = topology.within(node.namespace, lambda: tap.open_tap(name))
        text = f"link set {name} txqueuelen {tap.QUEUE} master {BRIDGE} up"
        run(*node.enter, "ip", "-batch", "-", text=text)
        self._taps[server, host] = fd
        return fd

    async def move(self, leg: Leg, load_: load.Load) -> float:
        fd = await asyncio.to_thread(self._plug, leg.server, leg.destination)
        await load_.tell(load.Wait(leg.server + " (waiting)"), fd)
        await asyncio.sleep(0.02)
        began = time.monotonic()
        await load_.tell(load.Stop(leg.server))
        took = (time.monotonic() - began) * 1000
        await asyncio.sleep(leg.blackout)
        await load_.tell(load.Run(leg.server), fd)
        os.close(self._taps.pop((leg.server, leg.source)))
        task = asyncio.create_task(self._announce(leg.server, fd))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)
        return took

    async def _announce(self, server: str, fd: int) -> None:
        port, passed = self._ports[server], 0.0
        own = os.dup(fd)
        try:
            for due in ANNOUNCEMENTS_SECONDS:
                await asyncio.sleep(due - passed)
                passed = due
                os.write(own, bytes(10) + announcement(port.mac, port.ip, reverse=True))
                os.write(own, bytes(10) + announcement(port.mac, port.ip, reverse=False))
        finally:
            os.close(own)

    async def settle(self) -> None:
        await asyncio.gather(*self._announcing)

    def close(self) -> None:
        for fd in self._taps.values():
            os.close(fd)


def announcement(mac: str, ip: str, *, reverse: bool) -> bytes:
    """A RARP question about oneself as QEMU sends it, or a gratuitous ARP."""
    own, address = bytes.fromhex(mac.replace(":", "")), bytes(int(part) for part in ip.split("."))
    kind, operation = (0x8035, 3) if reverse else (0x0806, 1)
    told = (own, bytes(4), own, bytes(4)) if reverse else (own, address, bytes(6), address)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + b"".join(told)
    return b"\xff" * 6 + own + struct.pack("!H", kind) + body + bytes(18)
