"""The replace verbs: a port's frames change from one VMM to the next on the same host, and none is lost.

The tap never changes, and nothing that knows it: entries, rules, limits, connections. A descriptor of a tap
is one of its queues, and a descriptor whose device was deleted may become a queue of another one. So the new
VMM is started on a spare device of its own, where it may set up what it likes; at the switch that device is
deleted and its descriptors become further queues of the port's tap, chosen by a short program.

    prepare     spare device, its descriptors in the store as `spare.<port>`       frames -> old queues
    join        the waiting VMM swallows one frame nobody misses; the spare device
                goes, its descriptors are queues of the tap                        frames -> old queues
    switch                                                                         frames -> new queues
    leave       the running guest empties the old queues, which then cease to be
                of the tap; it still sends by them
    settle      the old VMM has ended: the store's `tap.<port>` are the new queues
    revert      instead: frames -> old queues, what the new ones kept is delivered again

Two VMMs never share a queue, nor a device's settings while both run: header and offloads belong to the
device, and the next VMM makes its own on the spare one. What it sets once it has joined, as it takes up the
guest, is what the guest had chosen before; but it also gives the choice of queues back to the kernel, which
would lead some frames to the old ones: so these are none of the tap's by then.

Everything lasts in the kernel, in the supervisor's store and in one small file.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from pathlib import Path

import msgspec

from nahtlos.model.config import PortConfig
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import bpf, device_names, kernel, links, packet, tap
from nahtlos.physical.network.endpoints import Endpoints
from nahtlos.physical.network.handover import Handover
from nahtlos.physical.network.items import Setting
from nahtlos.physical.network.parking import Parking
from nahtlos.physical.network.plan import Change
from nahtlos.physical.network.shared import Shared, index_of

SACRIFICE_SECONDS = 0.3
POLL_SECONDS = 0.002
HASH_OFFSET = 0x44
"""Of a frame's hash in what a socket filter sees of it."""


def spare_device(port: PortId) -> str:
    return "ts" + hashlib.sha256(port.encode()).hexdigest()[:12]


def spare_name(port: PortId, queue: int) -> str:
    """Under which the supervisor holds a descriptor of the next VMM."""
    return f"spare.{port}/{queue}" if queue else f"spare.{port}"


class Replacement:
    def __init__(self, shared: Shared, endpoints: Endpoints, handover: Handover) -> None:
        self._shared = shared
        self._endpoints = endpoints
        self._handover = handover
        self._spares: dict[PortId, list[int]] = {}

    def close(self) -> None:
        for fds in self._spares.values():
            for fd in fds:
                os.close(fd)
        self._spares.clear()

    # --- verbs ---------------------------------------------------------------------------------------

    async def prepare(self, port: PortConfig) -> None:
        """Refused for a tap that was made for one queue only, as releases before this one did."""
        fds = await self._endpoints.required(port.id)
        if not tap.takes_queues(fds[0]):
            raise Refused(
                f"the tap of port {port.id} takes no further queue: an earlier release made it",
                field="port",
                remedy="move the server to another host once; its tap there is made anew",
            )
        self._shared.in_motion.add(port.id)
        if await self._queues_of(port.id):
            if self._has_spare(port.id):
                return  # prepared by an earlier call
            await self.revert(port)
        for number in range(len(fds)):
            await self._new_queue(port, number)
        name = spare_device(port.id)
        self._shared.fast().change(
            [
                links.configure(name, queue=tap.QUEUE),
                links.no_queue(index_of(name), name),
                links.configure(name, up=True),
            ]
        )

    async def _new_queue(self, port: PortConfig, number: int) -> None:
        name = spare_device(port.id)
        fd = tap.open_tap(name, many_queues=True)
        self._spares.setdefault(port.id, []).append(fd)
        if number == 0:
            kernel.write_settings([Change(Setting(f"net/ipv6/conf/{name}/disable_ipv6", "1"))])
        await self._shared.supervisor.store_fd(spare_name(port.id, number), fd)

    async def join(self, port: PortConfig) -> bool:
        """Once the next VMM waits. False if it did not take its frame in time. Deleting a device takes tens
        of milliseconds, so it is done here, ahead of the switch."""
        old, new = await self._endpoints.required(port.id), await self._required(port.id)
        self._shared.in_motion.add(port.id)
        if self._has_spare(port.id):
            if not await self._sacrificed(port, new):
                return False
            used = [tap.in_use(fd) for fd in new]
            _choose(old[0], first=0, count=_used(old))  # before there is more to choose from
            self._shared.fast().change([links.delete(spare_device(port.id))])
            for fd, wanted in zip(new, used, strict=True):
                tap.join(fd, device_names.tap_name(port.id))
                tap.use(fd, on=wanted)
        for fd in new:
            if not tap.is_attached(fd):  # a call before this one was cut off here
                tap.join(fd, device_names.tap_name(port.id))
        return True

    async def _sacrificed(self, port: PortConfig, queues: list[int]) -> bool:
        packet.sacrifice(spare_device(port.id), port.mac, queues)
        deadline = time.monotonic() + SACRIFICE_SECONDS
        await asyncio.sleep(POLL_SECONDS)
        while tap.has_frames(queues):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def switch(self, port: PortConfig) -> None:
        """Frames go to the next VMM's queues from now on, and wait there until it runs."""
        old, new = await self._endpoints.required(port.id), await self._required(port.id)
        _choose(old[0], first=_used(old), count=_used(new))
        self._handover.note_flip(port.id)

    async def leave(self, port: PortConfig, *, timeout: float) -> bool:
        """False if the guest has not emptied its queues in time; then they are still the tap's."""
        if not await self._handover.drain(port.id, timeout=timeout):
            return False
        old = await self._endpoints.required(port.id)
        used = [number for number, fd in enumerate(old) if tap.in_use(fd)]
        if used:
            self._left_file(port.id).write_bytes(msgspec.json.encode(used))
        for number in used:
            tap.use(old[number], on=False)
        return True

    async def revert(self, port: PortConfig) -> int:
        """The next VMM has ended, or will never run. Returns how many frames its queues had kept."""
        old, new = await self._endpoints.required(port.id), await self._queues_of(port.id)
        self._shared.in_motion.add(port.id)
        if not new:
            return 0
        returned = 0
        if not self._has_spare(port.id):
            first = self._come_back(port.id, old, new)
            _choose(old[0], first=first, count=_used(old))
            returned = self._deliver_again(port, new)
        await self._let_go(port.id)
        tap.steer(old[0], -1)
        self._left_file(port.id).unlink(missing_ok=True)
        return returned

    def _come_back(self, port: PortId, old: list[int], new: list[int]) -> int:
        """The old queues are the tap's again. Returns the first one's number: who comes back comes last."""
        left = self._left_file(port)
        if not left.exists():
            return 0
        for number in msgspec.json.decode(left.read_bytes(), type=list[int]):
            tap.use(old[number], on=True)
        return _used(new)

    async def settle(self, port: PortConfig) -> None:
        """The old VMM has ended: the next VMM's queues are the port's."""
        new = await self._queues_of(port.id)
        if not new:
            return  # settled before
        self._shared.in_motion.add(port.id)
        await self._endpoints.replace(port.id, new)
        for number in range(len(new)):
            await self._shared.supervisor.drop_fd(spare_name(port.id, number))
        self._spares.pop(port.id, None)
        self._left_file(port.id).unlink(missing_ok=True)

    def _left_file(self, port: PortId) -> Path:
        """Which of the old queues have ceased to be the tap's."""
        return self._shared.run_dir / f"{device_names.tap_name(port)}.left"

    # --- descriptors ---------------------------------------------------------------------------------

    async def _queues_of(self, port: PortId) -> list[int]:
        """This process's duplicates; an agent that was started a moment ago fetches them."""
        if port not in self._spares:
            fds: list[int] = []
            fetch = self._shared.supervisor.fetch_fd
            while (fd := await fetch(spare_name(port, len(fds)))) is not None:
                fds.append(fd)
            if not fds:
                return []
            self._spares[port] = fds
        return self._spares[port]

    async def _required(self, port: PortId) -> list[int]:
        fds = await self._queues_of(port)
        if not fds:
            raise Unavailable(f"port {port} is not prepared for another VMM", field="port")
        return fds

    async def _let_go(self, port: PortId) -> None:
        """The spare device and its descriptors, or the queues they have become."""
        for fd in self._spares.pop(port, ()):
            os.close(fd)
        with contextlib.suppress(OSError):
            socket.if_nametoindex(spare_device(port))
            self._shared.fast().change([links.delete(spare_device(port))])
        first = spare_name(port, 0)
        names = await self._shared.supervisor.stored()
        ours = [name for name in names if name == first or name.startswith(f"{first}/")]
        for name in sorted(ours, reverse=True):
            await self._shared.supervisor.drop_fd(name)

    def _has_spare(self, port: PortId) -> bool:
        try:
            socket.if_nametoindex(spare_device(port))
        except OSError:
            return False
        return True

    # --- frames that were kept -----------------------------------------------------------------------

    def _deliver_again(self, port: PortConfig, queues: list[int]) -> int:
        """Out of the tap itself: to the old queues, which are chosen again."""
        name = device_names.tap_name(port.id)
        size = tap.header_size(queues[0])
        sent = 0
        with Parking(self._shared.held_frame(port.id)) as parking:
            sent += packet.send_again(name, parking.left_behind(size), size, port.mac).sent
            for fd in queues:
                sent += packet.send_again(name, parking.frames(fd), size, port.mac).sent
        return sent


def _used(fds: list[int]) -> int:
    return sum(tap.in_use(fd) for fd in fds)


def _choose(fd: int, *, first: int, count: int) -> None:
    """Each frame of the tap of `fd` goes to one of its queues `first` to `first + count - 1`."""
    program = bpf.load(
        bpf.SOCKET_FILTER,
        steering(first, count),
        "chooses a queue",
        remedy="allow the agent bpf(), or move the server instead",
    )
    try:
        tap.steer(fd, program)
    finally:
        os.close(program)


def steering(first: int, count: int) -> bytes:
    """r0 = first, or first + hash % count: frames of one connection stay in one queue."""
    if count == 1:
        return bpf.put(0, first) + bpf.leave()
    return bpf.load_word(0, 1, HASH_OFFSET) + bpf.modulo(0, count) + bpf.add(0, first) + bpf.leave()
