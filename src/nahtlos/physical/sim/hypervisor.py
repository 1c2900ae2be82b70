"""`physical.ports.Hypervisor` over the simulated world. Owns nothing: `sim.guests` is what a VMM does."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import Accelerator, ComputeStatus, RunState
from nahtlos.physical.ports import (
    DiskProblem,
    MigrationPhase,
    MigrationProgress,
    Missing,
    Sink,
    VmmId,
    VmmStatus,
)
from nahtlos.physical.sim.agent_in_guest import answer
from nahtlos.physical.sim.compute import change_compute, compute_of
from nahtlos.physical.sim.disks import change_disks, copies_lost
from nahtlos.physical.sim.display import SimDisplay
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.guests import LINK_BYTES_PER_SECOND, Vmm
from nahtlos.physical.sim.saving import save_live
from nahtlos.physical.sim.world import World

VERSIONED = re.compile(r"-\d+\.\d+$")
ANSWERS_WITHIN = 5.0
"""Seconds after which a VMM that waits for a page of its guest is given up by who asked it."""


class SimHypervisor(SimDriver):
    name = "hypervisor"

    async def releases(self) -> tuple[ReleaseId, ...]:
        async with self.verb("releases"):
            return tuple(self.host.releases)

    async def why_no_shares(self) -> str:
        return self.host.no_shares

    async def observe(self) -> tuple[VmmStatus, ...]:
        async with self.verb("observe"):
            return tuple(_status(self.world, v) for v in self.host.vmms.values())

    async def verify(self, release: ReleaseId) -> Accelerator:
        async with self.verb("verify", release):
            self._check_release(release)
            if reason := self.host.broken_releases.get(release):
                raise Refused(f"a probe under {release} did not boot: {reason}", field="release")
            return Accelerator(
                name="sim", reason="the only one here", release=release, cpu_models=self.host.cpu_models
            )

    async def start(self, server: ServerConfig, release: ReleaseId) -> None:
        vmm_id = VmmId(server.spec.id, server.epoch)
        async with self.verb("start", vmm_id.unit):
            self._check_release(release)
            _check_machine(server, release)
            held = self.host.vmms.get(vmm_id)
            if held is None or held.ended:
                self.world.start_vmm(self.host, server, server.epoch, release, boot=True)

    async def kill(self, vmm: VmmId) -> None:
        async with self.verb("kill", vmm.unit):
            held = self.host.vmms.get(vmm)
            if held:
                self.world.remove_vmm(held)

    async def power_button(self, vmm: VmmId) -> None:
        async with self.verb("power_button", vmm.unit):
            self.world.press(self._living(vmm))

    async def console(self, vmm: VmmId, offset: int, limit: int) -> tuple[bytes, int]:
        async with self.verb("console", vmm.unit):
            data = bytes(self._said(vmm)[offset : offset + limit])
            return data, offset + len(data)

    async def console_size(self, vmm: VmmId) -> int:
        async with self.verb("console_size", vmm.unit):
            return len(self._said(vmm))

    def _said(self, vmm: VmmId) -> bytearray:
        return self.host.consoles.get(vmm, bytearray())

    async def console_write(self, vmm: VmmId, data: bytes) -> int:
        """The guest says what it hears."""
        async with self.verb("console_write", vmm.unit):
            if self._living(vmm).state is not RunState.RUNNING:
                return 0
            self._said(vmm).extend(data)
            return len(data)

    async def display_open(self, vmm: VmmId) -> SimDisplay:
        async with self.verb("display_open", vmm.unit):
            held = self._living(vmm)
            if not held.server.spec.display:
                raise Refused(f"{vmm.server} has no display", field="server")
            return SimDisplay(held)

    async def console_forget(self, vmm: VmmId) -> None:
        async with self.verb("console_forget", vmm.unit):
            self.host.consoles.pop(vmm, None)

    async def guest_ask(
        self, vmm: VmmId, command: str, arguments: Mapping[str, object] | None = None, *, within: float
    ) -> object:
        async with self.verb("guest_ask", f"{vmm.unit} {command}"):
            return await answer(self.world, self._living(vmm), command, arguments or {}, within)

    async def compute_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        async with self.verb("compute_reconcile", vmm.unit):
            return change_compute(self.world, self._living(vmm), server)

    async def dirty_rate(self, vmm: VmmId) -> int | None:
        async with self.verb("dirty_rate", vmm.unit):
            return self._living(vmm).dirty_rate

    async def disks_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        async with self.verb("disks_reconcile", vmm.unit):
            return change_disks(self.world, self._living(vmm), server)

    async def disks_settled(self, vmm: VmmId, server: ServerConfig) -> bool:
        async with self.verb("disks_settled", vmm.unit):
            return self._living(vmm).state is RunState.RUNNING and not copies_lost(self.world, server)

    async def disks_watch(self, *, timeout: float) -> tuple[VmmId, ...]:
        """Waits until there is something to tell: time passes too fast here for looking every moment."""
        stopped = [v for v in self.host.vmms.values() if v.disk_problems and not v.ended]
        try:
            async with asyncio.timeout(timeout if stopped else None):
                await self.host.disks_told.wait()
        except TimeoutError:
            pass
        self.host.disks_told.clear()
        return tuple(v.id for v in self.host.vmms.values() if v.disk_problems and not v.ended)

    async def disks_check(self, vmm: VmmId) -> tuple[DiskProblem, ...]:
        async with self.verb("disks_check", vmm.unit):
            return self._living(vmm).disk_problems

    async def copies_lost(self, server: ServerConfig) -> tuple[DiskProblem, ...]:
        async with self.verb("copies_lost", server.spec.id):
            return copies_lost(self.world, server)

    # --- suspended ---

    async def save(self, vmm: VmmId, sink: Sink, *, running: bool = False) -> None:
        async with self.verb("save", vmm.unit):
            held = self._living(vmm)
            if held.guest is None or (held.running and not running):
                raise Refused(f"{vmm.unit} runs: what is saved would not be of one moment", field="vmm")
            if running:
                await save_live(self.world, held, sink)
                return
            for piece in self.world.saved(held):
                await sink(piece)

    async def restore(self, server: ServerConfig, release: ReleaseId, pieces: AsyncIterator[bytes]) -> None:
        vmm_id = VmmId(server.spec.id, server.epoch)
        async with self.verb("restore", vmm_id.unit):
            self._check_release(release)
            vmm = self.world.start_vmm(self.host, server, server.epoch, release, boot=False)
            self.world.restored(vmm, b"".join([piece async for piece in pieces]))

    # --- destination ---

    async def incoming_start(
        self,
        server: ServerConfig,
        epoch: int,
        release: ReleaseId,
        *,
        in_place: bool = False,
        post_copy: bool = False,
        channels: int = 1,
        compressed: bool = False,
    ) -> None:
        vmm_id = VmmId(server.spec.id, epoch)
        async with self.verb("incoming_start", vmm_id.unit):
            self._check_release(release)
            _check_machine(server, release)
            if post_copy and self.host.no_userfault:
                raise Refused(self.host.no_userfault, field="post_copy")
            held = self.host.vmms.get(vmm_id)
            if held is None or held.ended:
                self.world.start_vmm(self.host, server, epoch, release, boot=False, in_place=in_place)

    async def incoming_listen(self, vmm: VmmId, address: str) -> str:
        async with self.verb("incoming_listen", vmm.unit):
            held = self._living(vmm)
            if held.state is not RunState.INCOMING or held.refused:
                raise Refused(f"{vmm.unit} does not wait for a server", field="vmm")
            return self.world.listen(held, address)

    async def incoming_wait(self, vmm: VmmId, *, timeout: float) -> None:
        async with self.verb("incoming_wait", vmm.unit):
            held = self._held(vmm)
            try:
                async with asyncio.timeout(timeout):
                    await held.arrival.wait()
            except TimeoutError as error:
                raise Unavailable(f"{vmm.unit} has not arrived within {timeout:g} s") from error
            if not held.migrated or held.ended:
                raise Refused(f"{vmm.unit} will not arrive: {held.refused or 'its VMM ended'}", field="vmm")

    async def resume(self, vmm: VmmId) -> None:
        async with self.verb("resume", vmm.unit):
            held = self._living(vmm)
            if held.state is RunState.INCOMING:
                raise Refused(f"{vmm.unit} has not received its server", field="vmm")
            if held.stream is not None and held.stream.followed:
                raise Refused(f"{vmm.unit} was handed over by post-copy", field="vmm")
            if held.waits_for_a_page:
                await asyncio.sleep(ANSWERS_WITHIN)
                raise Unavailable(f"{vmm.unit} did not answer within {ANSWERS_WITHIN:g} s")
            self.world.resume(held)

    async def why_no_post_copy(self) -> str:
        async with self.verb("why_no_post_copy"):
            return self.host.no_userfault

    async def incoming_recover(self, vmm: VmmId, address: str) -> str:
        async with self.verb("incoming_recover", vmm.unit):
            held = self._living(vmm)
            if held.follows is None or held.missing is Missing.NOTHING:
                raise Refused(f"{vmm.unit} lacks nothing", field="vmm")
            if held.follows.open:
                held.follows.cut()
            return f"sim:{address}:again"

    # --- source ---

    async def migrate_start(
        self,
        vmm: VmmId,
        uri: str,
        *,
        peer: str,
        bandwidth: int,
        slow_down: bool = False,
        post_copy: bool = False,
        channels: int = 1,
        compressed: bool = False,
    ) -> None:
        async with self.verb("migrate_start", vmm.unit):
            source = self._living(vmm)
            self.world.begin_stream(source, uri, peer, bandwidth, slow_down=slow_down, post_copy=post_copy)

    async def migrate_pace(self, vmm: VmmId, bandwidth: int) -> None:
        async with self.verb("migrate_pace", vmm.unit):
            stream = self._living(vmm).stream
            if stream:
                stream.pace(bandwidth)

    async def migrate_slow_down(self, vmm: VmmId) -> None:
        async with self.verb("migrate_slow_down", vmm.unit):
            stream = self._living(vmm).stream
            if stream:
                stream.slow_down()

    async def migrate_post_copy(self, vmm: VmmId) -> None:
        async with self.verb("migrate_post_copy", vmm.unit):
            stream = self._living(vmm).stream
            if stream is None or not stream.may_post_copy:
                raise Refused(f"{vmm.unit} was not begun with post-copy in mind", field="vmm")
            stream.post_copy = True

    async def migrate_recover(self, vmm: VmmId, uri: str) -> None:
        async with self.verb("migrate_recover", vmm.unit):
            stream = self._living(vmm).stream
            if stream is None or not stream.open or stream.without_destination:
                raise Unavailable(f"nobody waits at {uri}")
            stream.recover()

    async def replace_send(self, vmm: VmmId, to: VmmId) -> None:
        async with self.verb("replace_send", vmm.unit):
            self._send_to(vmm, to)

    def _send_to(self, vmm: VmmId, to: VmmId) -> None:
        uri = self._living(to).uri
        if uri is None:
            raise Refused(f"{to.unit} does not wait for a server", field="vmm")
        self.world.begin_stream(self._living(vmm), uri, self.host.id, LINK_BYTES_PER_SECOND)

    async def migrate_progress(self, vmm: VmmId) -> MigrationProgress:
        async with self.verb("migrate_progress", vmm.unit):
            stream = self._living(vmm).stream
            return stream.progress() if stream else MigrationProgress(phase=MigrationPhase.NONE)

    async def migrate_in_flight(self, vmm: VmmId) -> int:
        async with self.verb("migrate_in_flight", vmm.unit):
            self._living(vmm)
            return 0

    async def pause(self, vmm: VmmId) -> None:
        async with self.verb("pause", vmm.unit):
            self.world.pause(self._living(vmm))

    async def migrate_cancel(self, vmm: VmmId) -> None:
        async with self.verb("migrate_cancel", vmm.unit):
            stream = self._living(vmm).stream
            if stream:
                stream.cancel()

    # --- here ---

    def _check_release(self, release: ReleaseId) -> None:
        if release not in self.host.releases:
            raise Refused(
                f"{release} is not present on {self.host.id}", field="release", remedy="build it first"
            )

    def _held(self, vmm: VmmId) -> Vmm:
        held = self.host.vmms.get(vmm)
        if held is None:
            raise NotFound(f"{self.host.id} has no {vmm.unit}", field="vmm")
        return held

    def _living(self, vmm: VmmId) -> Vmm:
        held = self._held(vmm)
        if held.ended:
            raise Unavailable(f"the process of {vmm.unit} has ended")
        return held


def _check_machine(server: ServerConfig, release: ReleaseId) -> None:
    """An alias (`q35`) is another machine under another release."""
    if VERSIONED.search(server.spec.machine) is None:
        raise Refused(f"{release} has no machine type '{server.spec.machine}'", field="machine")


def _status(world: World, vmm: Vmm) -> VmmStatus:
    return VmmStatus(
        id=vmm.id,
        state=vmm.state,
        release=vmm.release,
        size=vmm.server.spec.size,
        migrated=vmm.migrated and not vmm.has_run,
        missing=vmm.missing,
        arrived=vmm.follows.progress().transferred if vmm.follows else 0,
        sent=vmm.sent,
        disk_problems=vmm.disk_problems,
        compute=compute_of(world, vmm) if vmm.guest else ComputeStatus(),
    )
