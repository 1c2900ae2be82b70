"""`physical.ports.Hypervisor` on QEMU. Acts thinly: what a VMM looks like is decided in `commandline`, the
commands of a move in `migration`; processes belong to the supervisor and outlive this object.

A VMM as this driver sees it:

    (none) --start--> RUNNING --migrate_start, pause--> PAUSED (sent) --kill--> (none)
    (none) --incoming_start--> INCOMING --stream--> PAUSED (migrated) --resume--> RUNNING
    any --process ended--> CRASHED --kill--> (none)

Never decides who owns a server: whoever calls `resume` has made sure that no other copy runs.
"""

import asyncio
import errno
import random
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import cast

import msgspec

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Error, NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import Accelerator, RunState
from nahtlos.model.nouns import Size
from nahtlos.physical.hypervisor import console, following, head_start, migration, saving, touching
from nahtlos.physical.hypervisor.accelerator import Prober
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.hypervisor.cgroups import why_unusable
from nahtlos.physical.hypervisor.commandline import (
    AGENT_CHARDEV,
    HOSTS_ONLY,
    TLS_FILES,
    TLS_SERVER,
    VmmShape,
    server_arguments,
    tap_fds,
)
from nahtlos.physical.hypervisor.compute import ComputeCare, check_copied
from nahtlos.physical.hypervisor.disk_care import STOPPED_BY_DISK, DiskCare, lost_copies
from nahtlos.physical.hypervisor.disks import TLS_CLIENT, disks_of
from nahtlos.physical.hypervisor.display import SocketDisplay
from nahtlos.physical.hypervisor.in_flight import unconfirmed
from nahtlos.physical.hypervisor.keymap import keymap
from nahtlos.physical.hypervisor.qmp import Denied, Gone
from nahtlos.physical.hypervisor.userfault import why_no_userfault
from nahtlos.physical.hypervisor.vmm import Vmm, VmmRecord, cached, ensure_folders, tail_of, vmm_of_unit
from nahtlos.physical.ports import (
    CONSOLE_KEPT,
    DiskProblem,
    MigrationProgress,
    Sink,
    Supervisor,
    Unit,
    UnitStatus,
    VmmId,
    VmmStatus,
    no_channel,
)
from nahtlos.physical.settings import MIGRATION_PORTS, AgentSettings

MONITOR_WITHIN = 30.0
OBSERVE_WITHIN = 4.0
LISTEN_ATTEMPTS = 5
CONSOLE_WITHIN = 3.0
CLOSES_WITHIN = 2.0
"""Time for a VMM to take its leave of a cluster, which would take it for alive half a minute longer."""
DEVICES_AGAIN = 0.001
"""No event tells that the devices of a server whose memory follows are loaded."""
RESTORED_WITHIN = 60.0
"""After its last byte."""


class QemuHypervisor:
    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._bundles = Bundles(settings.releases_dir)
        self._prober = Prober(settings, supervisor)
        self._vmms: dict[VmmId, Vmm] = {}
        self._care = DiskCare(supervisor)
        self._compute = ComputeCare(settings, supervisor)

    async def close(self) -> None:
        """Let go of all monitors. VMMs run on."""
        for vmm in self._vmms.values():
            await vmm.disconnect()

    # --- releases ----------------------------------------------------------------------------------

    async def releases(self) -> tuple[ReleaseId, ...]:
        return await self._bundles.available()

    async def why_no_shares(self) -> str:
        return why_unusable()

    async def verify(self, release: ReleaseId) -> Accelerator:
        ensure_folders(self._settings)
        return await self._prober.verify(await self._bundles.checked(release))

    # --- VMMs --------------------------------------------------------------------------------------

    async def observe(self) -> tuple[VmmStatus, ...]:
        units = await self._supervisor.units()
        known = {vmm: units[name] for name in units if (vmm := vmm_of_unit(name))}
        async with asyncio.TaskGroup() as group:
            looks = [group.create_task(self._look(vmm, unit)) for vmm, unit in sorted(known.items())]
        return tuple(look.result() for look in looks)

    async def _look(self, identity: VmmId, unit: UnitStatus) -> VmmStatus:
        vmm = self._vmm(identity)
        record = vmm.record
        size = record.server.spec.size if record else Size()
        release = record.release if record else None
        console.bound(vmm.paths.console_log, CONSOLE_KEPT)
        if unit.pid is None:
            return VmmStatus(id=identity, state=RunState.CRASHED, release=release, size=size)
        try:
            async with asyncio.timeout(OBSERVE_WITHIN):
                following.check_answers(vmm)
                word = await vmm.state()
                problems = await self._care.stopped(vmm) if word == STOPPED_BY_DISK else ()
                if word != "inmigrate":
                    vmm.last_compute = await self._compute.status(vmm)
                missing = await following.missing(vmm, word)
        except (Error, TimeoutError):
            # It lives but does not answer (yet): what it said last is the best there is.
            return VmmStatus(
                id=identity,
                state=vmm.last_state,
                release=release,
                size=size,
                compute=vmm.last_compute,
                missing=following.unanswered(vmm),
                arrived=following.arrived(vmm),
            )
        if word == "running":
            vmm.note_resumed()
            if vmm.ahead is None:
                head_start.take_back(unit.pid)
                vmm.ahead = 0
        record = vmm.record
        waits = bool(record and record.incoming and not record.resumed)
        return VmmStatus(
            id=identity,
            state=vmm.last_state,
            release=release,
            size=size,
            migrated=waits and word not in ("inmigrate", "running"),
            missing=missing,
            arrived=following.arrived(vmm) if missing else 0,
            sent=word in ("postmigrate", "finish-migrate"),
            disk_problems=problems,
            compute=vmm.last_compute,
        )

    async def start(self, server: ServerConfig, release: ReleaseId) -> None:
        record = VmmRecord(server=server, epoch=server.epoch, release=release, incoming=False)
        await self._launch(record)

    async def kill(self, vmm: VmmId) -> None:
        found = self._vmm(vmm)
        grace = CLOSES_WITHIN if found.record is not None and _has_images(found.record.server) else 0.0
        await self._supervisor.stop(vmm.unit, grace=grace)  # ends a start, too, that waits under the lock
        async with found.lock:
            await self._supervisor.stop(vmm.unit, grace=grace)
            await found.disconnect()
            await self._compute.ended(found)
            found.remove_files()
        self._vmms.pop(vmm, None)

    async def power_button(self, vmm: VmmId) -> None:
        await self._running(vmm).execute("system_powerdown")

    async def console(self, vmm: VmmId, offset: int, limit: int) -> tuple[bytes, int]:
        return tail_of(self._vmm(vmm).paths.console_log, offset, limit)

    async def console_size(self, vmm: VmmId) -> int:
        return console.size_of(self._vmm(vmm).paths.console_log)

    async def console_write(self, vmm: VmmId, data: bytes) -> int:
        found = self._running(vmm)
        async with found.typing:
            return await console.type_into(
                found.paths.console, data, within=CONSOLE_WITHIN, may=lambda: not found.leaves
            )

    async def display_open(self, vmm: VmmId) -> SocketDisplay:
        record = self._running(vmm).record
        if record is None or not record.server.spec.display:
            raise Refused(f"{vmm.server} has no display", field="server")
        return await SocketDisplay.connect(self._vmm(vmm).paths.display)

    async def console_forget(self, vmm: VmmId) -> None:
        self._vmm(vmm).paths.console_log.unlink(missing_ok=True)

    async def guest_ask(
        self, vmm: VmmId, command: str, arguments: Mapping[str, object] | None = None, *, within: float
    ) -> object:
        found = self._running(vmm)
        record = found.record
        if record is None or not record.server.spec.guest_agent:
            raise no_channel(vmm)
        if not await self._is_heard(found):
            raise Unavailable(f"nobody in {vmm.server} listens to its agent's channel", field="guest_agent")
        return await found.guest.ask(command, arguments, within=within)

    async def _is_heard(self, vmm: Vmm) -> bool:
        """Whether something in the guest has the channel open; nobody waits for one in which nothing has."""
        answer = await vmm.execute("query-chardev")
        devices = cast("list[dict[str, object]]", answer["value"])
        return any(each["label"] == AGENT_CHARDEV and each["frontend-open"] for each in devices)

    # --- what it is given --------------------------------------------------------------------------

    async def compute_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        found = self._running(vmm)
        async with found.changing_compute:
            return await self._compute.reconcile(found, server)

    async def dirty_rate(self, vmm: VmmId) -> int | None:
        return await touching.dirty_rate(self._running(vmm))

    # --- disks -------------------------------------------------------------------------------------

    async def disks_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        found = self._running(vmm)
        async with found.changing_disks:
            return await self._care.reconcile(found, server)

    async def disks_settled(self, vmm: VmmId, server: ServerConfig) -> bool:
        found = self._running(vmm)
        async with found.changing_disks:
            return await self._care.settled(found, server)

    async def disks_watch(self, *, timeout: float) -> tuple[VmmId, ...]:
        return await self._care.watch(self._vmms, timeout)

    async def disks_check(self, vmm: VmmId) -> tuple[DiskProblem, ...]:
        return await self._care.check(self._running(vmm))

    async def copies_lost(self, server: ServerConfig) -> tuple[DiskProblem, ...]:
        return await lost_copies(disk for disk in disks_of(server) if len(disk.keys) > 1)

    # --- suspended ---------------------------------------------------------------------------------

    async def save(self, vmm: VmmId, sink: Sink, *, running: bool = False) -> None:
        found = self._running(vmm)
        if running:
            await check_copied(found)
        elif await found.state() == "running":
            raise Refused(f"{vmm.unit} runs: what is saved would not be of one moment", field="vmm")
        await saving.save(found, sink)

    async def restore(self, server: ServerConfig, release: ReleaseId, pieces: AsyncIterator[bytes]) -> None:
        record = VmmRecord(server=server, epoch=server.epoch, release=release, incoming=True)
        vmm = await self._launch(record)
        await saving.load(vmm, pieces)
        await self.incoming_wait(vmm.id, timeout=RESTORED_WITHIN)

    # --- moves: destination ------------------------------------------------------------------------

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
        if post_copy and (why := why_no_userfault()):
            raise Refused(why, field="post_copy")
        record = VmmRecord(
            server=server,
            epoch=epoch,
            release=release,
            incoming=True,
            in_place=in_place,
            post_copy=post_copy,
        )
        vmm = await self._launch(record)
        if await vmm.state() == "inmigrate" and vmm.record is not None and not vmm.record.listening:
            if in_place:
                await migration.expect_whole(vmm)
                await self._ready_whole(self._running(VmmId(server.spec.id, server.epoch)))
                return
            way = migration.Way(post_copy=post_copy, channels=channels, compressed=compressed)
            await migration.set_capabilities(vmm, migration.DESTINATION | way.capabilities)
            await migration.set_channels(vmm, way)
            tls = {"tls-creds": TLS_SERVER, "tls-authz": HOSTS_ONLY}
            await vmm.execute("migrate-set-parameters", tls)

    async def incoming_listen(self, vmm: VmmId, address: str) -> str:
        found = self._running(vmm)
        record = found.record
        if record is None or not record.incoming:
            raise Refused(f"{vmm.unit} does not wait for a server", field="vmm")
        await self._head_start(found)
        for _ in range(LISTEN_ATTEMPTS):
            uri = record.listening or _address_of(found, record, address)
            found.write_record(msgspec.structs.replace(record, listening=uri))
            try:
                await found.execute("migrate-incoming", {"uri": uri})
            except Denied as denied:
                if "already" in denied.message and record.listening:
                    return uri  # asked for by an earlier call
                if "in use" not in denied.message:
                    raise
                record = msgspec.structs.replace(record, listening="")
            else:
                return uri
        raise Unavailable(f"no free port on {address} for the stream")

    async def _head_start(self, vmm: Vmm) -> None:
        unit = (await self._supervisor.units()).get(vmm.id.unit)
        if unit is not None and unit.pid is not None:
            head_start.give(unit.pid)
            vmm.ahead = unit.pid

    async def incoming_wait(self, vmm: VmmId, *, timeout: float) -> None:
        found = self._running(vmm)
        until = time.monotonic() + timeout
        try:
            while not found.received:
                answer = await found.execute("query-migrate")
                if answer.get("status") in following.ARRIVED:
                    found.received = await found.state() != "inmigrate"
                    await asyncio.sleep(0 if found.received else DEVICES_AGAIN)
                elif answer.get("status") == "failed":
                    raise Refused(f"the stream failed: {answer.get('error-desc') or found.log_tail()}")
                elif time.monotonic() > until:
                    raise Unavailable(f"{vmm.server} has not arrived within {timeout:g} s")
                elif not found.received:
                    await found.event_within(min(0.25, max(0.0, until - time.monotonic())))
        except Gone as gone:
            raise Refused(f"the stream failed and its VMM ended: {found.log_tail()}") from gone

    async def incoming_recover(self, vmm: VmmId, address: str) -> str:
        found = self._running(vmm)
        for _ in range(LISTEN_ATTEMPTS):
            uri = f"tcp:{_bracketed(address)}:{_free_port(address)}"
            try:
                await following.wait_anew(found, uri)
            except Denied as denied:
                if "in use" not in denied.message:
                    raise
            else:
                return uri
        raise Unavailable(f"no free port on {address} for the stream")

    async def why_no_post_copy(self) -> str:
        return why_no_userfault()

    async def resume(self, vmm: VmmId) -> None:
        found = self._running(vmm)
        # `cont` while the stream arrives would let the guest start by itself later.
        if not found.received and await found.state() == "inmigrate":
            raise Refused(f"{vmm.unit} has not received its server yet", field="vmm")
        try:
            await self._let_run(found)
        except Denied:
            if await found.state() != "shutdown":
                raise
            return  # its guest has switched itself off meanwhile: there is nothing to run
        found.last_state, found.leaves = RunState.RUNNING, False
        found.note_resumed()
        if found.ahead:
            loop = asyncio.get_running_loop()
            loop.call_later(head_start.SECONDS, head_start.take_back, found.ahead)
            found.ahead = 0

    async def _let_run(self, found: Vmm) -> None:
        if found.ran_here:
            async with found.changing_disks:  # while placeholders take its writes the guest must not run
                await self._care.complete(found)
                await found.execute("cont")
        else:
            if following.waits(found):  # `cont` may touch a page that has not come, and is not answered then
                found.note_resumed()
            await found.execute("cont")

    # --- moves: source -----------------------------------------------------------------------------

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
        found = self._running(vmm)
        found.ready_whole = False
        await check_copied(found)
        slowing = migration.SLOWING if slow_down else frozenset[str]()
        way = migration.Way(post_copy=post_copy, channels=channels, compressed=compressed)
        await migration.set_capabilities(found, migration.SOURCE | slowing | way.capabilities)
        await migration.set_channels(found, way)
        await migration.set_source_parameters(
            found, bandwidth, {"tls-creds": TLS_CLIENT, "tls-hostname": peer}
        )
        await migration.begin(found, uri)
        found.sends_to = uri

    async def migrate_pace(self, vmm: VmmId, bandwidth: int) -> None:
        await migration.pace(self._running(vmm), bandwidth)

    async def migrate_slow_down(self, vmm: VmmId) -> None:
        await migration.slow_down(self._running(vmm))

    async def migrate_post_copy(self, vmm: VmmId) -> None:
        await self._running(vmm).execute("migrate-start-postcopy")

    async def migrate_recover(self, vmm: VmmId, uri: str) -> None:
        await following.take_up(self._running(vmm), uri)

    async def replace_send(self, vmm: VmmId, to: VmmId) -> None:
        found, uri = self._running(vmm), self._stream_of(to)
        if not found.ready_whole:
            await self._ready_whole(found)
        await migration.send_whole(found, uri)

    async def _ready_whole(self, vmm: Vmm) -> None:
        await migration.ready_whole(vmm)
        vmm.ready_whole = True

    def _stream_of(self, to: VmmId) -> str:
        record = self._running(to).record
        if record is None or not record.in_place or not record.listening:
            raise Refused(f"{to.unit} does not wait for a server of this host", field="vmm")
        return record.listening

    async def migrate_progress(self, vmm: VmmId) -> MigrationProgress:
        return await migration.progress(self._running(vmm))

    async def migrate_in_flight(self, vmm: VmmId) -> int:
        try:
            return unconfirmed(self._vmm(vmm).sends_to)
        except OSError:
            return 0  # a kernel that does not tell: what was sent counts as come, as before

    async def pause(self, vmm: VmmId) -> None:
        found = self._running(vmm)
        found.leaves = True
        await found.execute("stop")
        found.last_state = RunState.PAUSED

    async def migrate_cancel(self, vmm: VmmId) -> None:
        found = self._vmm(vmm)
        if found.paths.record.exists():
            await migration.cancel(found)

    # --- one VMM -----------------------------------------------------------------------------------

    def _vmm(self, vmm: VmmId) -> Vmm:
        return cached(self._vmms, self._settings, vmm, self._care.heard)

    def _running(self, vmm: VmmId) -> Vmm:
        found = self._vmm(vmm)
        if found.record is None:
            raise NotFound(f"no {vmm.unit} on this host", field="vmm")
        return found

    async def _launch(self, record: VmmRecord) -> Vmm:
        """A process of this description, found or started, that answers on its monitor."""
        vmm = self._vmm(VmmId(record.server.spec.id, record.epoch))
        ensure_folders(self._settings)
        async with vmm.lock:
            status = (await self._supervisor.units()).get(vmm.id.unit)
            if status is None or status.pid is None:
                unit = await self._described(vmm, record)
                await self._supervisor.stop(vmm.id.unit, grace=0)  # an ended one is still listed
                await vmm.disconnect()
                vmm.remove_files()
                if record.in_place:
                    vmm.share_memory(self._vmm(VmmId(vmm.id.server, record.server.epoch)).paths)
                vmm.write_record(record)
                if record.server.spec.display:
                    vmm.paths.keymap.write_text(keymap())
                await self._supervisor.start(unit)
            await self._answering(vmm)
        await self._compute.begin(vmm)
        await self._care.settle(vmm)
        return vmm

    async def _described(self, vmm: Vmm, record: VmmRecord) -> Unit:
        """Everything that can be wrong is found here, before anything is changed."""
        bundle = await self._bundles.checked(record.release)
        self._check_machine(bundle, record.server)
        self._check_credentials()
        self._compute.check_start(record, bundle.version)
        taps = tuple(
            name for port in record.server.spec.ports for name in tap_fds(port, in_place=record.in_place)
        )
        missing = set(taps) - await self._supervisor.stored()
        if missing:
            raise Refused(
                f"no {', '.join(sorted(missing))} in the supervisor's store",
                field="ports",
                remedy="create the port",
            )
        accelerator = await self._prober.choose(bundle)
        shape = VmmShape(
            server=record.server,
            paths=vmm.paths,
            pki_dir=self._settings.pki_dir,
            accelerator=accelerator.name,
            version=bundle.version,
            incoming=record.incoming,
            in_place=record.in_place,
        )
        return Unit(
            leased=record.server.spec.on_host_failure is OnHostFailure.RESTART,
            name=vmm.id.unit,
            argv=(*bundle.system(), *server_arguments(shape)),
            environment=bundle.environment,
            fds=taps,
            log=vmm.paths.log,
        )

    def _check_machine(self, bundle: Bundle, server: ServerConfig) -> None:
        if server.spec.machine not in bundle.manifest.release.machine_types:
            raise Refused(
                f"{bundle.release} has no machine type '{server.spec.machine}'",
                field="machine",
                remedy="choose a release that still has it",
            )

    def _check_credentials(self) -> None:
        missing = [name for name in TLS_FILES if not (self._settings.pki_dir / name).is_file()]
        if missing:
            raise Refused(
                f"{self._settings.pki_dir} lacks {', '.join(missing)}",
                field="pki_dir",
                remedy="let this host join the cloud first",
            )

    async def _answering(self, vmm: Vmm) -> None:
        until = time.monotonic() + MONITOR_WITHIN
        while True:
            with suppress(Gone):
                await vmm.connect()
                return
            status = (await self._supervisor.units()).get(vmm.id.unit)
            if status is None or status.pid is None:
                raise Refused(f"{vmm.id.unit} ended at once: {vmm.log_tail()}", field="server")
            if time.monotonic() > until:
                raise Unavailable(f"{vmm.id.unit} does not answer within {MONITOR_WITHIN:g} s")
            await asyncio.sleep(0.01)


def _has_images(server: ServerConfig) -> bool:
    return any(volume.rbd is not None for volume in server.all_volumes)


def _address_of(vmm: Vmm, record: VmmRecord, address: str) -> str:
    if record.in_place:
        return f"unix:{vmm.paths.stream}"
    return f"tcp:{_bracketed(address)}:{_free_port(address)}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _free_port(address: str) -> int:
    """A port of the range for streams that was free a moment ago; not the same one for all who ask at the
    same time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    first, last = MIGRATION_PORTS
    for port in random.sample(range(first, last + 1), last + 1 - first):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does: streams that ended
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise Refused(
                    f"{address} is no address of this host: {error.strerror}", field="address"
                ) from error
            return port
    raise Unavailable(
        f"every port from {first} to {last} on {address} is in use", remedy="wait for other moves to end"
    )
