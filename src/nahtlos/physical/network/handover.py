"""The move verbs: frames for a port change the host on which they are delivered, and none is lost.

Owns nothing that lasts: entries are in the kernel, descriptors in the supervisor's store. A verb may be
repeated, also by an agent that was started a moment ago, and may have been cut off anywhere.

                        source                             destination
    prepare             gate, tunnel entry ->              gate, tunnel entry <-      tap silent
    switch (dest.)                                         entry -> tap, flooding on
    switch (source)     entry -> tunnel, flooding off
    drain               rings and shaper empty
    stop, resume
    settle              what is left is passed on, tap goes                           tap as any other

Frames for the port alone reach it exactly once. Flooded ones do at least once: every host sends a copy to
both hosts, and the destination begins to keep its copies before the source ceases to deliver its own, so
those that fall between the two switches (one message between the agents) come twice and none is missed.
What the port itself sent is not kept (see `tap.refuse_own`).

A revert is the same backwards, at the source first; the destination then returns what it has kept.
"""

import asyncio
import errno
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import device_names, kernel, links, netlink, nft, packet, plan, tap
from nahtlos.physical.network.endpoints import Endpoints
from nahtlos.physical.network.netlink import Request
from nahtlos.physical.network.packet import Returned
from nahtlos.physical.network.parking import Parking
from nahtlos.physical.network.shared import Shared, index_of, local
from nahtlos.physical.ports import MoveRole

SACRIFICE_SECONDS = 0.3
POLL_SECONDS = 0.002
FLIGHT_SECONDS = 0.0005
"""Frames that had passed the old entry when it was flipped are in the ring after this."""
EMPTY_POLLS, EMPTY_POLL_SECONDS = 3, 0.0002
HASTE_SECONDS = 0.01
"""A guest that has not taken its frames by then will need longer than a millisecond more."""
RELEASE_SECONDS = 1.0
"""The longest that a shaper may hold frames back that are to be returned."""


class Handover:
    def __init__(self, shared: Shared, endpoints: Endpoints) -> None:
        self._shared = shared
        self._endpoints = endpoints
        self._flipped: dict[PortId, float] = {}

    # --- before --------------------------------------------------------------------------------------

    async def prepare(
        self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str, *, marked: bool
    ) -> None:
        self._shared.touch(port)
        await self._shared.ensure_network(network)
        tunnel = index_of(device_names.tunnel_name(network.spec.vni))
        self._shared.fast().change([netlink.tunnel_entry(tunnel, port.mac, vtep)])
        await self._endpoints.descriptors(port.id)
        gate = nft.Gate(network.spec.vni, port.mac.lower(), port.id)
        async with self._shared.filtering:
            await nft.apply(nft.gate_commands([gate], []))
            self._shared.baseline.applied.gates.add((gate.vni, gate.mac, gate.port))
            self._shared.baseline.save()
        for part in self._shared.parts:
            await part.move_prepared(local(port, network), role, marked=marked)

    async def sacrifice(self, port: PortId) -> bool:
        fds = await self._endpoints.required(port)
        link = links.read_link(self._shared.fast(), device_names.tap_name(port))
        found = kernel.taps_of({link.name: link}).get(port) if link is not None else None
        if found is None:
            raise Unavailable(f"port {port} has no tap on this host", field="port")
        packet.sacrifice(*found, fds)
        deadline = time.monotonic() + SACRIFICE_SECONDS
        await asyncio.sleep(POLL_SECONDS)
        while tap.has_frames(fds):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    # --- the switch ----------------------------------------------------------------------------------

    async def switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """One message to the kernel. Nothing here waits for another task, a process or a file."""
        if role is MoveRole.DESTINATION:
            self._lead_to_tap(port)
        else:
            self._lead_to_tunnel(port, network)
        for part in self._shared.parts:
            part.move_switched(local(port, network), role)

    def _lead_to_tap(self, port: PortConfig) -> None:
        index = index_of(device_names.tap_name(port.id))
        self._flip(port, netlink.forward_to_port(index, port.mac), _flooding(index, plan.DELIVERING))

    def _lead_to_tunnel(self, port: PortConfig, network: NetworkConfig) -> None:
        flip = netlink.forward_to_port(index_of(device_names.tunnel_name(network.spec.vni)), port.mac)
        try:
            index = index_of(device_names.tap_name(port.id))
        except Unavailable:
            self._flip(port, flip)  # the host was restarted, or this is a repetition after the end
            return
        self._flip(port, flip, _flooding(index, plan.SILENT))

    def _flip(self, port: PortConfig, *requests: Request) -> None:
        self._shared.in_motion.add(port.id)
        self._shared.fast().change(requests)
        self.note_flip(port.id)

    def note_flip(self, port: PortId) -> None:
        """Frames take another way from now on: `drain` lets those land that had passed before."""
        self._flipped[port] = time.monotonic()

    def _let_land(self, port: PortId) -> None:
        """Blocks the loop for half a millisecond at most, and once for all ports that were flipped
        together: it would round the wait up to more, and frames are held up meanwhile."""
        since = time.monotonic() - self._flipped.pop(port, time.monotonic())
        if since < FLIGHT_SECONDS:
            time.sleep(FLIGHT_SECONDS - since)

    async def drain(self, port: PortId, *, timeout: float) -> bool:
        fds = await self._endpoints.required(port)
        index = index_of(device_names.tap_name(port))
        began = time.monotonic()
        self._let_land(port)
        self._release(port)
        while not self._stays_empty(fds, index):
            waited = time.monotonic() - began
            if waited >= timeout:
                return False
            await asyncio.sleep(0 if waited < HASTE_SECONDS else POLL_SECONDS)
        return True

    def _stays_empty(self, fds: Sequence[int], index: int) -> bool:
        """Nothing on its way to the rings in a shaper, and then nothing in them."""
        if links.waiting(self._shared.fast(), index):
            return False
        for attempt in range(EMPTY_POLLS):
            if attempt:
                time.sleep(EMPTY_POLL_SECONDS)
            if tap.has_frames(fds):
                return False
        return True

    def _release(self, port: PortId) -> None:
        for part in self._shared.parts:
            part.release(port, device_names.tap_name(port))

    # --- after ---------------------------------------------------------------------------------------

    async def revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        returned = Returned()
        if role is MoveRole.SOURCE:
            with suppress(Unavailable):  # the host was restarted: reconciling makes what is wanted here
                self._lead_to_tap(port)
        else:
            fds = await self._endpoints.descriptors(port.id)
            returned = self._pass_on(port, network, fds)
            self._lead_to_tunnel(port, network)
            self._let_land(port.id)
            returned += await self._pass_on_all(port, network, fds)
            self._note_refused(port, returned)
        for part in self._shared.parts:
            await part.move_reverted(local(port, network), role)
        return returned.sent

    async def commit(self, port: PortConfig, network: NetworkConfig) -> None:
        for part in self._shared.parts:
            await part.move_committed(local(port, network))

    async def settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        self._shared.touch(port)
        for part in self._shared.parts:
            await part.move_settled(local(port, network), role)
        if role is MoveRole.SOURCE:
            await self._leave(port, network)
        else:
            self._stay(port)

    async def _leave(self, port: PortConfig, network: NetworkConfig) -> None:
        """What came to the old host so late that its guest did not take it is passed on late."""
        fds = await self._endpoints.descriptors(port.id)
        if fds:
            late = await self._pass_on_all(port, network, fds)
            self._note_refused(port, late)
            if late.sent:
                self._shared.baseline.note(
                    f"{late.sent} frames for port {port.id} came after its server had stopped: passed on"
                )
        await self._endpoints.delete(port.id)

    def _stay(self, port: PortConfig) -> None:
        sock, name = self._shared.fast(), device_names.tap_name(port.id)
        link = links.read_link(sock, name)
        if link is None:
            raise Unavailable(f"port {port.id} has no tap on this host", field="port")
        if link.flood != plan.DELIVERING:
            sock.change([links.set_flood(link.index, plan.DELIVERING, name)])
        self._note_dropped(port.id, link.stats.tx_dropped)

    # --- frames that were kept -----------------------------------------------------------------------

    def _pass_on(self, port: PortConfig, network: NetworkConfig, fds: Sequence[int]) -> Returned:
        """To the other host, by the tunnel, without asking this host's entry."""
        held = self._shared.held_frame(port.id)
        if not fds or not (tap.has_frames(fds) or held.exists()):
            return Returned()
        tunnel, size = device_names.tunnel_name(network.spec.vni), tap.header_size(fds[0])
        with Parking(held) as parking:
            frames = (parking.left_behind(size), *(parking.frames(fd) for fd in fds))
            return packet.send_again(tunnel, itertools.chain(*frames), size, port.mac)

    async def _pass_on_all(self, port: PortConfig, network: NetworkConfig, fds: Sequence[int]) -> Returned:
        """Also what a shaper has held back."""
        self._release(port.id)
        returned, deadline = self._pass_on(port, network, fds), time.monotonic() + RELEASE_SECONDS
        try:
            index = index_of(device_names.tap_name(port.id))
        except Unavailable:
            return returned
        while not self._stays_empty(fds, index) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            returned += self._pass_on(port, network, fds)
        return returned

    # --- what is to be told --------------------------------------------------------------------------

    def _note_refused(self, port: PortConfig, returned: Returned) -> None:
        if returned.refused:
            self._shared.baseline.note(
                f"{returned.refused} frames for port {port.id} could not be passed on: {returned.why}"
            )

    def _note_dropped(self, port: PortId, dropped: int) -> None:
        """A ring that was full while its server stood still is not silent about it."""
        known = self._shared.baseline.applied.dropped
        if dropped > known.get(port, 0):
            known[port] = dropped
            self._shared.baseline.note(
                f"{dropped} frames for port {port} were dropped while it moved: its ring holds {tap.QUEUE}"
            )


def _flooding(index: int, flood: links.Flood) -> Request:
    """Of a tap that may have gone in the moment since its index was asked for, or is in no bridge yet."""
    request = links.set_flood(index, flood, "a tap")
    return msgspec.structs.replace(request, tolerated=frozenset({errno.ENODEV, errno.EOPNOTSUPP}))
