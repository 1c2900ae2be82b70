"""The storage daemon of this host as its drivers speak to it: one monitor connection for all of them.

Answers are what the daemon says at that moment; nothing is remembered but the connection and the images it
said are corrupted. Never decides what is served: see `serving`. A daemon that was started anew has a new
monitor: the next call connects to it.
"""

import asyncio
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.physical.hypervisor.qmp import ANSWER_WITHIN, Answer, Arguments, Denied, Gone, OnEvent, Qmp
from nahtlos.physical.ports import Supervisor
from nahtlos.physical.storage.definition import UNIT
from nahtlos.physical.storage.graph import Export, Options, parsed_export
from nahtlos.physical.storage.newcomers import Doorkeeper

MONITOR_WITHIN = 20.0
ENDS_WITHIN = 2.0
JOB_WITHIN = 30.0
EXPORT_GONE_WITHIN = 5.0
COPIED_AT_ONCE = 2 << 20
"""Bytes of a copy that runs beside writes. A write into what is just being copied waits for all of it, and on
its way to a target any write waits behind it."""
MIRROR = "mirror"
"""The type of a job."""
WAITS_IF_FAILING: Mapping[str, object] = {"on-source-error": "stop", "on-target-error": "stop"}
"""Of a mirror whose source is written meanwhile: one that ended by itself would do so under writes, too."""
_POLL = 0.002
_AS_WANTED_ALREADY = ("duplicate", "not found", "exists", "already", "Cannot find", "Failed to find")

Command = tuple[str, Arguments]


class JobStatus(StrEnum):
    """Those that matter here; the others are on their way to one of these."""

    RUNNING = "running"
    READY = "ready"
    STANDBY = "standby"
    CONCLUDED = "concluded"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str
    status: str
    done: int = 0
    total: int = 0
    error: str = ""
    actively_synced: bool = False
    """Of a mirror: both sides are alike, and every further write goes to both before it is acknowledged."""
    failing: bool = False
    """It met an I/O error and waits."""

    @property
    def over(self) -> bool:
        """Nothing more comes of it."""
        return self.status == JobStatus.CONCLUDED or self.failing


def in_step(job: Job) -> bool:
    """Of a mirror: every write that is acknowledged is on both sides."""
    return job.status == JobStatus.READY and job.actively_synced


class Graph(msgspec.Struct, frozen=True):
    """Block nodes and who uses whom."""

    nodes: frozenset[str]
    edges: Mapping[tuple[str, str], str]
    """(parent, name of the edge) -> child; parents are nodes."""

    def below(self, node: str) -> str | None:
        """The next one towards the base: through a filter, or what an overlay rests on."""
        return self.edges.get((node, "backing"), self.edges.get((node, "file")))


class Monitor:
    """A connection to the one of this process, and what sees to it that it answers: see `newcomers`."""

    def __init__(self, qmp: Qmp, pid: int | None) -> None:
        self.qmp = qmp
        self._doorkeeper = Doorkeeper(pid) if pid is not None else None

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = ANSWER_WITHIN
    ) -> Answer:
        answer = self.qmp.execute(command, arguments, within=within)
        return await (self._doorkeeper.attended(answer) if self._doorkeeper else answer)


class Daemon:
    def __init__(self, supervisor: Supervisor, qmp: Path, log: Path, unit: str = UNIT) -> None:
        self.unit = unit
        self.qmp_path = qmp
        self.log = log
        self.corrupted: dict[str, str] = {}
        """Nodes of images that were found corrupted, and what was said."""
        self._supervisor = supervisor
        self._held: Monitor | None = None
        self._connecting = asyncio.Lock()
        self._listeners: list[OnEvent] = []

    async def close(self) -> None:
        """Let go of the monitor. The daemon runs on."""
        monitor, self._held = self._held, None
        if monitor is not None:
            await monitor.qmp.close()

    def on_event(self, listener: OnEvent) -> None:
        self._listeners.append(listener)

    # --- the process -------------------------------------------------------------------------------

    async def pid(self) -> int | None:
        status = (await self._supervisor.units()).get(self.unit)
        return status.pid if status else None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:].strip() if self.log.exists() else "no log"

    async def answers(self, within: float) -> bool:
        """Whether it does now: one that hangs keeps the connection it has."""
        try:
            await (await self._monitor(within)).execute("query-version", within=within)
        except Unavailable:
            return False
        return True

    async def kill(self, within: float = ENDS_WITHIN) -> int | None:
        """The one that runs, and which that was. Nothing that was acknowledged is lost by that."""
        pid = await self.pid()
        if pid is None:
            return None
        await self.close()
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await _ended(pidfd, within)
            finally:
                os.close(pidfd)
        return pid

    # --- commands ----------------------------------------------------------------------------------

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = ANSWER_WITHIN
    ) -> Answer:
        return await (await self._monitor(MONITOR_WITHIN)).execute(command, arguments, within=within)

    async def together(self, *commands: Command) -> None:
        """Sent without waiting in between, so that they are carried out at one go. Raises the first refusal,
        after all of them were answered."""
        for result in await self.outcomes(*commands):
            if result is not None:
                raise result

    async def outcomes(self, *commands: Command) -> tuple[BaseException | None, ...]:
        """The same, and of each whether it was refused."""
        monitor = await self._monitor(MONITOR_WITHIN)
        answers = (monitor.execute(command, arguments) for command, arguments in commands)
        results = await asyncio.gather(*answers, return_exceptions=True)
        return tuple(result if isinstance(result, BaseException) else None for result in results)

    async def transaction(self, actions: Sequence[tuple[str, Options]]) -> None:
        """All or none, at one moment."""
        said = [{"type": kind, "data": data} for kind, data in actions]
        await self.execute("transaction", {"actions": said})

    async def tolerating(self, command: str, arguments: Options) -> None:
        """For what may be as wanted already because an earlier call was interrupted."""
        try:
            await self.execute(command, arguments)
        except Denied as denied:
            if not any(words in denied.message for words in _AS_WANTED_ALREADY):
                raise

    # --- nodes and exports -------------------------------------------------------------------------

    async def graph(self) -> Graph:
        answer = await self.execute("x-debug-query-block-graph")
        nodes = cast("list[dict[str, object]]", answer["nodes"])
        names = {each["id"]: str(each["name"]) for each in nodes if each["type"] == "block-driver"}
        edges = {
            (names[edge["parent"]], str(edge["name"])): names[edge["child"]]
            for edge in cast("list[dict[str, object]]", answer["edges"])
            if edge["parent"] in names and edge["child"] in names
        }
        return Graph(frozenset(names.values()), edges)

    async def images(self) -> dict[str, Answer]:
        """What the daemon says of each node."""
        answer = await self.execute("query-named-block-nodes", {"flat": True})
        return {str(each["node-name"]): each for each in cast("list[Answer]", answer["value"])}

    async def unflushed(self) -> frozenset[str]:
        """Nodes whose files are not flushed whatever clients ask for."""
        found = (
            (name, cast("Answer", said.get("cache", {}))) for name, said in (await self.images()).items()
        )
        return frozenset(name for name, cache in found if cache.get("no-flush"))

    async def exports(self, within: float = MONITOR_WITHIN) -> dict[VolumeId, Export]:
        """Of volumes, those that are on their way out left out."""
        monitor = await self._monitor(within)
        found = cast("list[dict[str, object]]", (await monitor.execute("query-block-exports"))["value"])
        parsed = (parsed_export(str(each["id"])) for each in found if not each.get("shutting-down"))
        return {export.volume: export for export in parsed if export is not None}

    async def exports_if_answering(self, within: float) -> dict[VolumeId, Export]:
        """Nothing is served by a daemon that does not run or answer."""
        if await self.pid() is None:
            return {}
        try:
            return await self.exports(within)
        except Unavailable:
            return {}

    async def add_nodes(self, nodes: Sequence[Options]) -> None:
        """Those that are not there yet; none if one cannot be added."""
        present, added = (await self.graph()).nodes, list[str]()
        try:
            for node in nodes:
                if node["node-name"] not in present:
                    await self.execute("blockdev-add", node, within=JOB_WITHIN)
                    added.append(str(node["node-name"]))
        except Refused:
            await self.remove_nodes(reversed(added))
            raise

    async def remove_nodes(self, names: Iterable[str]) -> None:
        """Those that are there and in nobody's use."""
        for name in names:
            try:
                await self.execute("blockdev-del", {"node-name": name})
            except Denied:
                continue

    async def withdraw(self, identity: str, *, mode: str = "hard") -> None:
        """Returns when the export is gone. Hard: its clients get errors at once; that is what fencing is.
        Safe: Denied while it has clients."""
        await self.tolerating("block-export-del", {"id": identity, "mode": mode})
        try:
            async with asyncio.timeout(EXPORT_GONE_WITHIN):
                while identity in await self._export_ids():
                    await asyncio.sleep(0)
        except TimeoutError:
            raise Unavailable(f"export {identity} is still there after {EXPORT_GONE_WITHIN:g} s") from None

    async def export_nodes(self) -> dict[str, str]:
        """Of every export, of volumes or not, by its id: the node it shows."""
        found = cast("list[dict[str, object]]", (await self.execute("query-block-exports"))["value"])
        return {str(each["id"]): str(each["node-name"]) for each in found if not each.get("shutting-down")}

    async def _export_ids(self) -> set[str]:
        answer = await self.execute("query-block-exports")
        return {str(each["id"]) for each in cast("list[dict[str, object]]", answer["value"])}

    # --- jobs --------------------------------------------------------------------------------------

    async def jobs(self) -> dict[str, Job]:
        found = cast("list[Answer]", (await self.execute("query-jobs"))["value"])
        more = cast("list[Answer]", (await self.execute("query-block-jobs"))["value"])
        details = {each["device"]: each for each in more}
        return {str(each["id"]): _job(each, details.get(each["id"], {})) for each in found}

    async def job_until(self, job: str, *statuses: str, within: float = JOB_WITHIN) -> Job:
        """Wait for it to have one of these; Unavailable if it has not, Refused if there is no such job."""
        try:
            async with asyncio.timeout(within):
                while True:
                    found = (await self.jobs()).get(job)
                    if found is None:
                        raise Refused(f"the storage daemon has no job {job}", field="job")
                    if found.status in statuses:
                        return found
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            raise Unavailable(f"job {job} takes longer than {within:g} s") from None

    async def job_end(self, job: str, *, within: float = JOB_WITHIN) -> Job:
        """Wait for its end and take note of it; Unavailable with its words if it failed."""
        ended = await self.job_until(job, JobStatus.CONCLUDED, within=within)
        await self.execute("job-dismiss", {"id": job})
        if ended.error:
            raise Unavailable(f"job {job} of the storage daemon failed: {ended.error}")
        return ended

    async def mirror_end(self, job: str, written: Options | None, *, within: float = JOB_WITHIN) -> None:
        """Gone on return; fine if there is none. `written`: the export its source is written through. While
        both sides are in step QEMU holds writes until it has ended; else it is torn off."""
        found = (await self.jobs()).get(job)
        if found is None or not in_step(found):
            await self.mirror_break(job, written)
            return
        await self.tolerating("block-job-cancel", {"device": job, "force": False})
        await self._gone(job, within)

    async def mirror_break(self, job: str, written: Options | None) -> None:
        """The same, whatever its target does. A write on its way to both sides would find its mirror's memory
        freed (QEMU 7.2 to 11.1: the daemon dies, or bits of something else are cleared), so nobody writes:
        clients are disconnected, and come back at once or a second later. See docs/decisions/0028."""
        found = (await self.jobs()).get(job)
        identity = str(written["id"]) if written is not None else ""
        torn = found is not None and found.type == MIRROR and found.status != JobStatus.CONCLUDED
        if not torn or written is None or identity not in await self._export_ids():
            await self.job_cancel(job)
            return
        try:
            await self.withdraw(identity)
            await self.tolerating("block-job-cancel", {"device": job, "force": True})
        finally:
            await self.tolerating("block-export-add", written)
        await self.job_cancel(job)

    async def job_cancel(self, job: str) -> None:
        """Gone on return; fine if there is none. For one that nothing is written beside, or that does not
        take part in writes: see `mirror_end`."""
        found = (await self.jobs()).get(job)
        if found is None:
            return
        if found.status != JobStatus.CONCLUDED:
            await self.tolerating("block-job-cancel", {"device": job, "force": True})
        await self._gone(job, JOB_WITHIN)

    async def _gone(self, job: str, within: float) -> None:
        """Whatever it ended with."""
        try:
            await self.job_end(job, within=within)
        except (Refused, Unavailable):
            if job in await self.jobs():
                raise

    # --- monitor -----------------------------------------------------------------------------------

    async def _monitor(self, within: float) -> Monitor:
        async with self._connecting:
            held = self._held
            if held is not None and held.qmp.open and held.qmp.loop is asyncio.get_running_loop():
                return held
            await self.close()
            qmp, pid = await self._connected(within), None
            with suppress(Unavailable):  # a supervisor that is just replaced; nothing depends on it
                pid = await self.pid()
            self._held = Monitor(qmp, pid)
            return self._held

    async def _connected(self, within: float) -> Qmp:
        try:
            async with asyncio.timeout(within):
                while True:
                    try:
                        return await Qmp.connect(self.qmp_path, self._heard, within=within)
                    except Gone:
                        await asyncio.sleep(0.02)
        except TimeoutError:
            raise Unavailable(f"the storage daemon does not answer: {self.said()[-400:]}") from None

    def _heard(self, event: str, data: Mapping[str, object]) -> None:
        if event == "BLOCK_IMAGE_CORRUPTED":
            self.corrupted[str(data.get("node-name", ""))] = str(data.get("msg", ""))
        for listener in self._listeners:
            listener(event, data)


async def _ended(pidfd: int, within: float) -> bool:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(within):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def _job(said: Answer, details: Answer) -> Job:
    return Job(
        id=str(said["id"]),
        type=str(said["type"]),
        status=str(said["status"]),
        done=cast("int", said.get("current-progress", 0)),
        total=cast("int", said.get("total-progress", 0)),
        error=str(said.get("error", "")),
        actively_synced=bool(details.get("actively-synced")),
        failing=details.get("io-status", "ok") != "ok",
    )
