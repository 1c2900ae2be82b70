"""The move verbs: frames for a port change the host on which they are delivered, and none is lost.

Owns nothing that lasts: entries are in the kernel, descriptors in the supervisor's store.
"""

import asyncio
import time

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import kernel, links, netlink, nft, packet, plan, tap
from nahtlos.physical.network.endpoints import Endpoints
from nahtlos.physical.network.shared import Shared, index_of, local
from nahtlos.physical.ports import MoveRole

SACRIFICE_SECONDS = 0.3
POLL_SECONDS = 0.002
FLIGHT_SECONDS = 0.0005
"""Frames that had passed the old entry when it was flipped are in the ring after this."""
EMPTY_POLLS, EMPTY_POLL_SECONDS = 3, 0.0002


class Handover:
    def __init__(self, shared: Shared, endpoints: Endpoints) -> None:
        self._shared = shared
        self._endpoints = endpoints

    async def prepare(self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str) -> None:
        self._shared.touch(port)
        await self._shared.ensure_network(network)
        tunnel = index_of(plan.tunnel_name(network.spec.vni))
        self._shared.fast().change([netlink.tunnel_entry(tunnel, port.mac, vtep)])
        await self._endpoints.descriptor(port.id)
        gate = nft.Gate(network.spec.vni, port.mac.lower(), port.id)
        async with self._shared.filtering:
            await nft.apply(nft.gate_commands([gate], []))
            self._shared.baseline.applied.gates.add((gate.vni, gate.mac, gate.port))
            self._shared.baseline.save()
        for part in self._shared.parts:
            await part.move_prepared(local(port, network), role)

    async def sacrifice(self, port: PortId) -> bool:
        fd = await self._endpoints.descriptor(port)
        found = kernel.taps_of(links.read_links(self._shared.fast())).get(port)
        if fd is None or found is None:
            raise Unavailable(f"port {port} has no tap on this host", field="port")
        packet.sacrifice(*found)
        deadline = time.monotonic() + SACRIFICE_SECONDS
        await asyncio.sleep(POLL_SECONDS)
        while tap.has_frames(fd):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """Nothing here waits for another task, a process or a file."""
        self._shared.in_motion.add(port.id)
        here = role is MoveRole.DESTINATION
        self._flip(port, plan.tap_name(port.id) if here else plan.tunnel_name(network.spec.vni))

    def _flip(self, port: PortConfig, device: str) -> None:
        self._shared.fast().change([netlink.forward_to_port(index_of(device), port.mac)])

    async def drain(self, port: PortId, *, timeout: float) -> bool:
        fd = await self._endpoints.descriptor(port)
        if fd is None:
            raise Unavailable(f"port {port} has no tap on this host", field="port")
        deadline = time.monotonic() + timeout
        while not _ring_stays_empty(fd):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0)
        return True

    async def revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        self._shared.in_motion.add(port.id)
        tunnel = plan.tunnel_name(network.spec.vni)
        if role is MoveRole.SOURCE:
            self._flip(port, plan.tap_name(port.id))
            returned = 0
        else:
            fd = await self._endpoints.descriptor(port.id)
            returned = self._send_back(fd, tunnel)
            self._flip(port, tunnel)
            time.sleep(FLIGHT_SECONDS)  # noqa: ASYNC251 - half a millisecond, and the loop would round it up
            returned += self._send_back(fd, tunnel)
        for part in self._shared.parts:
            await part.move_reverted(local(port, network), role)
        return returned

    def _send_back(self, fd: int | None, tunnel: str) -> int:
        frames = tap.drain(fd) if fd is not None else []
        return packet.send_again(tunnel, frames, tap.header_size(fd)) if fd is not None and frames else 0

    async def settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        self._shared.touch(port)
        for part in self._shared.parts:
            await part.move_settled(local(port, network), role)
        if role is MoveRole.SOURCE:
            await self._endpoints.delete(port.id)
            return
        sock, name = self._shared.fast(), plan.tap_name(port.id)
        link = links.read_links(sock).get(name)
        if link is None:
            raise Unavailable(f"port {port.id} has no tap on this host", field="port")
        if link.flood != plan.DELIVERING:
            sock.change([links.set_flood(link.index, plan.DELIVERING, name)])


def _ring_stays_empty(fd: int) -> bool:
    """Blocks the loop for about a millisecond on purpose: it would round each wait up to as much, and
    frames are held up at the destination meanwhile."""
    time.sleep(FLIGHT_SECONDS)
    for attempt in range(EMPTY_POLLS):
        if tap.has_frames(fd):
            return False
        if attempt < EMPTY_POLLS - 1:
            time.sleep(EMPTY_POLL_SECONDS)
    return True
