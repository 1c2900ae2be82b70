"""A server is suspended: its memory and devices' state go to a volume, and its VMM ends; and goes on from
there, on this host or another.

    suspend   begin -> paused -> saved (durable; the point of no return) -> ended -> done
                 `--------`-- undo: its guest goes on

    resume    begin -> loaded -> running (durable, then the guest is told; the point of no return) -> done
                 `--------`-- undo: the VMM ends, what was saved stays

The ledger's power is what decides after a crash: `suspended` means that the VMM never runs again, `on` that
what was saved is never loaded again, because the guest may have written to its disks since. What is loaded is
compared with digests first. Between the two nobody writes to the server's disks: it holds them, as one that
runs.
"""

from collections.abc import AsyncIterator

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.model.power import SavedDisk, SavedState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Journal, Ownership
from nahtlos.physical.agent.saved_state import Writer, parts_of
from nahtlos.physical.agent.steps import Steps
from nahtlos.physical.agent.volumes.freeze import check_not_frozen
from nahtlos.physical.agent.volumes.rejoin import note_fresh
from nahtlos.physical.ports import RawVolume, VmmId, VmmStatus


class _Suspension(Steps):
    def __init__(self, context: Context, journal: Journal) -> None:
        assert journal.power is not None, f"operation {journal.id} is of no server"
        super().__init__(context, journal, kind=journal.kind, subject=journal.power.spec.id)
        self._wanted = journal.power
        self._server = journal.power.spec.id
        self._vmm = VmmId(self._server, journal.power.epoch)

    async def run(self, *, recovering: bool) -> Journal:
        try:
            if self._is_past():
                await self._finish()
            elif recovering:
                await self._undo(Unavailable("the agent was started anew meanwhile"))
            else:
                await self._carry_out()
        finally:
            self.forget_waits()
        return self.journal

    async def _carry_out(self) -> None:
        try:
            await self._context.pass_paths()
            await self._context.pass_plugging()
            await self._act()
        except Exception as raised:
            error = self._context.error_of(raised)
            self.say("failed", str(error))
            if not self._is_past():
                await self._undo(error)
                return
        await self._finish()

    async def _act(self) -> None:
        """Up to the point of no return."""
        raise NotImplementedError

    async def _finish(self) -> None:
        raise NotImplementedError

    async def _undo(self, error: Error) -> None:
        raise NotImplementedError

    def _held(self) -> Ownership:
        held = self._context.ledger.owner(self._server)
        if held is None or held.hold is not Hold.OWNED or held.epoch != self._vmm.epoch:
            raise Refused(f"{self._server} is not owned here by epoch {self._vmm.epoch}", field="server")
        return held

    def _is_past(self) -> bool:
        return self._held().server.spec.power == self._wanted.spec.power

    async def _observed(self) -> VmmStatus | None:
        vmms = await self._context.drivers.hypervisor.observe()
        return next((each for each in vmms if each.id == self._vmm), None)

    async def _volume(self, *, writing: bool) -> RawVolume:
        if self._wanted.memory is None:
            raise Unavailable(f"there is no volume for the memory of {self._server} yet", field="memory")
        return await self._context.drivers.storage.open_raw(self._wanted.memory, writing=writing)


class Suspend(_Suspension):
    async def _act(self) -> None:
        hypervisor = self._context.drivers.hypervisor
        self._held()
        check_not_frozen(self._context, self._server)
        status = await self._observed()
        if status is None or status.state is not RunState.RUNNING or status.disk_problems:
            raise Unavailable(f"{self._server} does not run, or its disks have stopped it", field="server")
        if status.release is None:
            raise Unavailable(f"it is not known what runs {self._server}", field="server")
        volume = await self._volume(writing=True)
        try:
            self.record("paused", durable=True)
            await hypervisor.pause(self._vmm)
            await self._check_disks()
            writer = Writer(volume)
            await hypervisor.save(self._vmm, writer.add)
            digest = await writer.finish()
        finally:
            await volume.close()
        saved = self._described(status, digest, writer.bytes)
        self._context.ledger.adopt(msgspec.structs.replace(self._wanted, saved=saved))
        note_fresh(self._context.ledger, self._server, fresh=True)  # its copies are alike: it stood still
        self.mark("saved")

    async def _check_disks(self) -> None:
        """All that it has written is at every copy."""
        if await self._context.drivers.hypervisor.disks_check(self._vmm):
            raise Unavailable(f"a disk of {self._server} does not take what it writes", field="server")

    def _described(self, status: VmmStatus, digest: str, size: int) -> SavedState:
        assert self._wanted.memory is not None, "it was opened"
        kept = self._wanted.memory.volume
        saved = described(self._context, self._held().server, status, volume=kept, digest=digest, size=size)
        return msgspec.structs.replace(saved, serial=self._wanted.spec.power.serial)

    async def _finish(self) -> None:
        note_fresh(self._context.ledger, self._server, fresh=True)
        await self.until_done("its VMM to end", self._end)
        self._context.say("server.suspended", self._server, "its memory is saved; nothing runs it")
        self.end(OperationState.DONE)

    async def _end(self) -> None:
        await self._context.drivers.hypervisor.kill(self._vmm)
        for port in self._wanted.spec.ports:
            await self._context.drivers.network.port_delete(port.id)

    async def _undo(self, error: Error) -> None:
        await self.until_done("its guest to go on", self._go_on)
        self.end(OperationState.UNDONE, error)

    async def _go_on(self) -> None:
        status = await self._observed()
        if status is not None and status.state is RunState.PAUSED and not status.disk_problems:
            await self._context.drivers.hypervisor.resume(self._vmm)


class Resume(_Suspension):
    async def _act(self) -> None:
        config = self._context.ledger.config()
        if config is None or config.release is None:
            raise Unavailable("this host has no hypervisor release", field="release")
        saved = self._saved()
        check_resumable(self._wanted, saved)
        volume = await self._volume(writing=False)
        try:
            for network in config.networks:
                for port in network.ports:
                    if port.server == self._server:
                        await self._context.drivers.network.port_create(port, network, deliver=True)
            self.record("load", durable=True)
            await self._context.drivers.hypervisor.kill(self._vmm)
            server = as_saved(self._wanted, saved)
            pieces: AsyncIterator[bytes] = parts_of(volume, saved.bytes, saved.digest)
            await self._context.drivers.storage.reach_alone(server.all_volumes)
            await self._context.drivers.hypervisor.restore(server, config.release, pieces)
        finally:
            await volume.close()
        note_fresh(self._context.ledger, self._server, fresh=False)
        self._context.ledger.adopt(self._wanted)
        self.mark("running")

    def _saved(self) -> SavedState:
        if self._wanted.saved is None:
            raise Refused(f"nothing was saved of {self._server}", field="server")
        return self._wanted.saved

    async def _finish(self) -> None:
        """A VMM that died meanwhile is left to convergence, which boots the server."""
        await self.until_done("its guest to go on", self._go_on)
        self._context.say("server.resumed", self._server, "goes on from what was saved")
        self.end(OperationState.DONE)

    async def _go_on(self) -> None:
        status = await self._observed()
        if status is not None and status.state is RunState.PAUSED:
            await self._context.drivers.hypervisor.resume(self._vmm)
            self._context.after_pause(self._server)

    async def _undo(self, error: Error) -> None:
        await self.until_done("the VMM to end", self._end)
        self.end(OperationState.UNDONE, error)

    async def _end(self) -> None:
        await self._context.drivers.hypervisor.kill(self._vmm)
        for port in self._wanted.spec.ports:
            await self._context.drivers.network.port_delete(port.id)


def described(
    context: Context, held: ServerConfig, status: VmmStatus, *, volume: VolumeId, digest: str, size: int
) -> SavedState:
    """What was saved of a server that `status` was seen of; by no request yet."""
    assert status.release is not None, "it was looked at"
    accelerator = context.ledger.verified()
    return SavedState(
        volume=volume,
        serial=0,
        digest=digest,
        bytes=size,
        release=status.release,
        machine=held.spec.machine,
        vcpus=status.compute.vcpus or held.spec.size.vcpus,
        memory_mib=held.spec.size.memory_mib,
        accelerator=accelerator.name if accelerator else "",
        disks=disks_of(held),
    )


def disks_of(server: ServerConfig) -> tuple[SavedDisk, ...]:
    return tuple(SavedDisk(volume=each.volume, size_mib=each.size_mib) for each in server.all_volumes)


def check_resumable(server: ServerConfig, saved: SavedState) -> None:
    """Refused where what was saved would not find the machine and the disks that it remembers."""
    if saved.machine != server.spec.machine or saved.memory_mib != server.spec.size.memory_mib:
        raise Refused(
            f"{server.spec.id} is another machine than the one that was saved",
            field="server",
            remedy=f"give it {saved.memory_mib} MiB again",
        )
    if disks_of(server) != saved.disks:
        was = ", ".join(f"{disk.volume} ({disk.size_mib} MiB)" for disk in saved.disks)
        raise Refused(
            f"{server.spec.id} has other disks than it remembers: {was}",
            field="volume",
            remedy="make them as they were, or give up what was saved: nahtlos server stop --hard",
        )


def as_saved(server: ServerConfig, saved: SavedState) -> ServerConfig:
    """With the vCPUs it had: what was asked for since it is given once it runs."""
    if not server.spec.max_vcpus:
        return server
    size = msgspec.structs.replace(server.spec.size, vcpus=saved.vcpus)
    return msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, size=size))
