"""One VMM of this host: its record on disk, its files, its monitor connection, what it last said.

The record is written before the process is started, so an agent that comes later finds every VMM by its
unit and knows what it is. Never starts or ends the process.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.inventory import ComputeStatus, RunState
from nahtlos.physical.hypervisor.commandline import VmmPaths
from nahtlos.physical.hypervisor.guest_channel import GuestChannel
from nahtlos.physical.hypervisor.qmp import ANSWER_WITHIN, Answer, Arguments, Gone, Qmp
from nahtlos.physical.ports import VmmId
from nahtlos.physical.settings import AgentSettings

UNIT_PREFIX = "vmm."
DISK_EVENTS = ("STOP", "BLOCK_IO_ERROR", "QUORUM_REPORT_BAD", "QUORUM_FAILURE")


class VmmRecord(msgspec.Struct, frozen=True, kw_only=True):
    server: ServerConfig
    epoch: int
    release: ReleaseId
    incoming: bool
    in_place: bool = False
    """It takes over the server that runs here by `server.epoch`, memory and all."""
    listening: str = ""
    """URI of the stream, noted before QEMU is told to listen."""
    resumed: bool = False
    """An arrived server has run here: if its guest does not run now, that is for another reason."""
    took_ms: dict[str, int] = {}
    """Of the last change of each: `ComputeStatus.took_ms`."""
    post_copy: bool = False
    """Its server may arrive, or has arrived, before all of its memory."""
    vcpus_begun: int = 0
    """Threads of vCPUs that this process has begun, also those that ended; 0: no more than it has."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Something its guest was asked for."""

    amount: int
    since: float
    """Monotonic."""
    devices: tuple[str, ...] = ()
    """That the guest is to say it uses."""


def vmm_of_unit(name: str) -> VmmId | None:
    """`vmm.<server>.<epoch>` back to what it names; None for any other unit."""
    server, _, epoch = name.removeprefix(UNIT_PREFIX).rpartition(".")
    if not name.startswith(UNIT_PREFIX) or not server or not epoch.isdecimal():
        return None
    return VmmId(ServerId(server), int(epoch))


def paths_of(settings: AgentSettings, vmm: VmmId) -> VmmPaths:
    logs = settings.state_dir / "vmm"
    return VmmPaths(
        qmp=settings.run_dir / f"{vmm.unit}.qmp",
        qmp_emergency=settings.run_dir / f"{vmm.unit}.emergency",
        stream=settings.run_dir / f"{vmm.unit}.stream",
        console=settings.run_dir / f"{vmm.unit}.console",
        console_log=logs / f"{vmm.unit}.console",
        log=logs / f"{vmm.unit}.log",
        ram=settings.ram_dir / f"{vmm.server}.{vmm.epoch}.ram",
        record=settings.run_dir / f"{vmm.unit}.json",
    )


_RUN_STATES = {
    "running": RunState.RUNNING,
    "inmigrate": RunState.INCOMING,
    "shutdown": RunState.STOPPED,
}


def run_state(status: str) -> RunState:
    """QEMU's run state (`query-status`) in ours: every other one is a VMM whose guest does not run."""
    return _RUN_STATES.get(status, RunState.PAUSED)


class Vmm:
    def __init__(self, identity: VmmId, paths: VmmPaths, on_disks: Callable[[], None] | None = None) -> None:
        self.id = identity
        self.paths = paths
        self.lock = asyncio.Lock()
        """Held by whoever starts or ends it."""
        self.last_state = RunState.STARTING
        self.received = False
        """Its incoming stream is known to be complete."""
        self.ready_whole = False
        """It was told what to send to a VMM of its own host, and nothing else since."""
        self.ahead: int | None = None
        """Its process if it was given a head start that was not taken back; 0: it was not; None: nobody has
        looked since this agent was started."""
        self.stream_word = ""
        """What QEMU last said of its stream by itself, outgoing or incoming."""
        self.sends_to = ""
        """URI of the stream that was begun last, by this process of the agent."""
        self.changing_disks = asyncio.Lock()
        self.failed_nodes: set[str] = set()
        """Block nodes that its quorums have complained of since somebody last looked."""
        self.blamed: dict[str, list[float]] = {}
        """When which connection's copy was found to have failed although it answers."""
        self.refused_keys: set[str] = set()
        """Connections whose daemon answers and serves no such volume."""
        self.typing = asyncio.Lock()
        """One at a time: QEMU answers one connection to a console."""
        self.leaves = False
        """Its guest was stopped, maybe for good: what is typed into it now would be lost with it."""
        self.guest = GuestChannel(paths.agent)
        self.changing_compute = asyncio.Lock()
        self.last_compute = ComputeStatus()
        self.asked: dict[str, Asked] = {}
        """`vcpus`, `memory`: what its guest has not taken or given back yet."""
        self.os_answers: dict[str, int] = {}
        """What the guest's system said of a vCPU (ACPI _OST): 0 is success."""
        self._on_disks = on_disks
        self._changed = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._qmp: Qmp | None = None
        self._record: VmmRecord | None = None

    # --- record ------------------------------------------------------------------------------------

    @property
    def record(self) -> VmmRecord | None:
        if self._record is None and self.paths.record.exists():
            self._record = msgspec.json.decode(self.paths.record.read_bytes(), type=VmmRecord)
        return self._record

    def write_record(self, record: VmmRecord) -> None:
        new = self.paths.record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(record))
        new.replace(self.paths.record)
        self._record = record

    def note_resumed(self) -> None:
        record = self.record
        if record is not None and record.incoming and not record.resumed:
            self.write_record(msgspec.structs.replace(record, resumed=True))

    @property
    def ran_here(self) -> bool:
        """Its graph may have been changed since it was started."""
        record = self.record
        return record is not None and (not record.incoming or record.resumed)

    def log_tail(self, limit: int = 600) -> str:
        try:
            return self.paths.log.read_text(errors="replace")[-limit:].strip()
        except OSError:
            return ""

    def share_memory(self, of: VmmPaths) -> None:
        """Its memory is the files of another VMM of this host, under names of its own: they stay when that
        one and its names go."""
        try:
            self.paths.ram.hardlink_to(of.ram)
            if of.plugged_ram.exists():
                self.paths.plugged_ram.hardlink_to(of.plugged_ram)
        except FileNotFoundError:
            raise Refused(f"{of.ram} is gone: there is no memory to take over", field="server") from None

    def remove_files(self) -> None:
        """Everything but the log, of which the last one per server is kept, and what its console has said: a
        VMM that is started again goes on with that, and whoever follows it has not read all of it yet."""
        paths = self.paths
        for path in (
            paths.ram,
            paths.plugged_ram,
            paths.qmp,
            paths.qmp_emergency,
            paths.stream,
            paths.console,
            paths.display,
            paths.keymap,
            paths.agent,
        ):
            path.unlink(missing_ok=True)
        if paths.log.exists():
            paths.log.replace(paths.log.with_name(f"{UNIT_PREFIX}{self.id.server}.previous.log"))
        paths.record.unlink(missing_ok=True)
        self._record = None
        self.received = False
        self.asked, self.os_answers = {}, {}
        self.last_state = RunState.STARTING

    # --- monitor -----------------------------------------------------------------------------------

    async def execute(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        within: float = ANSWER_WITHIN,
        urgent: bool = False,
    ) -> Answer:
        qmp = self._qmp
        if qmp is None or not qmp.open or qmp.loop is not asyncio.get_running_loop():
            qmp = await self.connect()
        return await qmp.execute(command, arguments, within=within, urgent=urgent)

    async def connect(self) -> Qmp:
        """By the first monitor, or by the second if the first serves somebody who does not let go."""
        async with self._connecting:
            if self._qmp is not None and self._qmp.open:
                return self._qmp
            await self._drop_monitor()
            try:
                self._qmp = await Qmp.connect(self.paths.qmp, self._on_event)
            except Gone:
                if not self.paths.qmp_emergency.is_socket():
                    raise
                self._qmp = await Qmp.connect(self.paths.qmp_emergency, self._on_event)
            return self._qmp

    async def disconnect(self) -> None:
        self.guest.close()
        await self._drop_monitor()

    async def _drop_monitor(self) -> None:
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()

    async def state(self) -> str:
        """QEMU's own word for whether the guest runs."""
        status = str((await self.execute("query-status"))["status"])
        self.last_state = run_state(status)
        return status

    async def event_within(self, seconds: float) -> None:
        """Returns at the next event, at the latest after `seconds`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _on_event(self, name: str, data: Mapping[str, object]) -> None:
        self._changed.set()
        if name == "ACPI_DEVICE_OST":
            self._note_os_answer(data.get("info"))
        if name in DISK_EVENTS:
            if name == "QUORUM_REPORT_BAD":
                self.failed_nodes.add(str(data.get("node-name", "")))
            if self._on_disks is not None:
                self._on_disks()
        if name == "MIGRATION":
            self.stream_word = str(data.get("status", ""))
        if name == "MIGRATION" and self.stream_word == "completed":
            record = self.record
            self.received = self.received or bool(record and record.incoming)

    def _note_os_answer(self, info: object) -> None:
        said = cast("Mapping[str, object]", info or {})
        self.os_answers[str(said.get("device", ""))] = int(str(said.get("status", 0)))


def ensure_folders(settings: AgentSettings) -> None:
    for folder in (settings.run_dir, settings.ram_dir, settings.state_dir / "vmm"):
        folder.mkdir(parents=True, exist_ok=True)


def cached(
    vmms: dict[VmmId, Vmm],
    settings: AgentSettings,
    vmm: VmmId,
    on_disks: Callable[[], None] | None = None,
) -> Vmm:
    """The one object for `vmm`, made when first asked for."""
    if vmm not in vmms:
        vmms[vmm] = Vmm(vmm, paths_of(settings, vmm), on_disks)
    return vmms[vmm]


def tail_of(path: Path, offset: int, limit: int) -> tuple[bytes, int]:
    """At most `limit` bytes from `offset`, and the offset after them."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return b"", offset
    return data, offset + len(data)
