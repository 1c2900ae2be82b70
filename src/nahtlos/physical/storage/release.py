"""By which release the storage daemon runs, and its replacement under its clients.

    recorded A ──B is wanted──> B tried without volumes ──> recorded "A, trying B" ──> defined by B
        ──daemon ended──> B serves ──> recorded B
                     └──> B does not serve ──> defined by A, ended ──> A serves, recorded "B failed"

The clients' connections wait in the listening socket meanwhile. An agent that is started in between goes on
by what is recorded and what runs. Without a word the newest release present is chosen once, and kept.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.nouns import Component
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.ports import Supervisor, Unit
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage.daemon import ENDS_WITHIN, Daemon
from nahtlos.physical.storage.definition import UNIT, trial_arguments

MIN_VERSION = (10,)
"""The NBD server of earlier ones lacks TCP_NODELAY: a thirtieth of the operations per second."""
SERVES_WITHIN = 5.0
TRIES = 3
_TRIAL = f"{UNIT}.trial"

Define = Callable[[], Awaitable[bool]]
OnStep = Callable[[str], Awaitable[None]]


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    release: ReleaseId
    trying: ReleaseId | None = None
    failed: ReleaseId | None = None
    reason: str = ""

    @property
    def defined(self) -> ReleaseId:
        """By which a daemon that is started now runs."""
        return self.trying or self.release


class DaemonRelease:
    def __init__(
        self, settings: AgentSettings, supervisor: Supervisor, bundles: Bundles, daemon: Daemon
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self.bundles = bundles
        self._daemon = daemon
        self._ended_pid: int | None = None

    def chosen(self) -> Chosen | None:
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=Chosen)
        except FileNotFoundError:
            return None

    @property
    def _record(self) -> Path:
        return self._settings.state_dir / "storage-release.json"

    async def bundle(self) -> Bundle:
        """Of the release to run by; the newest fit one if none was ever chosen."""
        chosen = self.chosen()
        if chosen is not None:
            return await self.bundles.checked(chosen.defined)
        bundle = await self._newest()
        self._write(Chosen(release=bundle.release))
        return bundle

    async def ensure(self, wanted: ReleaseId, define: Define, on_step: OnStep) -> tuple[str, ...]:
        """The daemon runs by `wanted` on return, or, with the reason raised, by what it ran by before."""
        chosen = self.chosen()
        if chosen is None or UNIT not in await self._supervisor.units():
            bundle = await self._fit(wanted)
            if chosen is None or chosen.defined != wanted:
                self._write(Chosen(release=bundle.release))
            return ()
        if chosen.failed == wanted:
            raise _refusal(wanted, chosen.reason)
        if chosen.defined == wanted and await self._runs_by(wanted, or_nothing=chosen.trying is None):
            if chosen.trying is not None:
                self._write(Chosen(release=wanted))
                return (f"storage daemon runs by {wanted}",)
            return ()
        await self._replace(chosen, wanted, define, on_step)
        return (f"storage daemon replaced: {chosen.release} -> {wanted}",)

    async def _replace(self, chosen: Chosen, wanted: ReleaseId, define: Define, on_step: OnStep) -> None:
        await self._nothing_under_way()
        await self.tried(await self._fit(wanted))
        await on_step("upgrade.tried")
        self._write(Chosen(release=chosen.release, trying=wanted))
        await on_step("upgrade.recorded")
        await define()
        await on_step("upgrade.defined")
        await self._end_daemon()
        await on_step("upgrade.ended")
        await self._next_one(define)
        if await self._serves_by(wanted):
            self._write(Chosen(release=wanted))
            return
        reason = self._daemon.said()[-400:]
        self._write(Chosen(release=chosen.release, failed=wanted, reason=reason))
        await define()
        await self._end_daemon()
        await self._next_one(define)
        if not await self._serves_by(chosen.release):
            raise Unavailable(f"neither {wanted} nor {chosen.release} serves: {self._daemon.said()[-400:]}")
        raise _refusal(wanted, reason)

    async def _nothing_under_way(self) -> None:
        """A copy that runs in the daemon would end with it; merging layers begins again by itself."""
        if await self._daemon.pid() is None:
            return
        jobs = [job.id for job in (await self._daemon.jobs()).values() if not job.id.startswith("merge-")]
        if jobs:
            raise Unavailable(
                f"the storage daemon is not replaced while it copies ({', '.join(sorted(jobs))})",
                field="storage_release",
                remedy="wait for the operation to end, or cancel it",
            )

    # --- processes ---------------------------------------------------------------------------------

    async def _end_daemon(self) -> None:
        """The one that runs; its supervisor starts the next one as it is defined now. Killed: nothing that
        was acknowledged is lost by that, while a daemon that ends by itself goes on to accept clients, and
        they wait a second after it has told them that it has no such export."""
        self._ended_pid = await self._daemon.kill()

    async def _next_one(self, define: Define) -> None:
        """At once: a supervisor waits a moment, longer each time, before it starts again what ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDS_WITHIN):
                while self._ended_pid is not None and await self._daemon.pid() == self._ended_pid:
                    await asyncio.sleep(0.001)
        await define()

    async def _serves_by(self, release: ReleaseId) -> bool:
        until, began = time.monotonic() + SERVES_WITHIN, None
        while time.monotonic() < until:
            status = (await self._supervisor.units()).get(UNIT)
            if status is None:
                return False
            began = status.restarts if began is None else began
            if await self._runs_by(release) and await self._daemon.answers(0.5):
                return True
            if status.restarts - began >= TRIES:
                return False
            await asyncio.sleep(0.01)
        return False

    async def _runs_by(self, release: ReleaseId, *, or_nothing: bool = False) -> bool:
        pid = await self._daemon.pid()
        if pid is None:
            return or_nothing
        bundle = await self.bundles.checked(release)
        try:
            said = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return or_nothing
        return (
            tuple(part.decode() for part in said[: len(bundle.storage_daemon())]) == bundle.storage_daemon()
        )

    async def tried(self, bundle: Bundle) -> None:
        """Whether it runs here at all, beside the one that serves. Refused with its words if not."""
        qmp, log = (self._settings.run_dir / f"{_TRIAL}.{end}" for end in ("qmp", "log"))
        log.unlink(missing_ok=True)
        unit = Unit(
            name=_TRIAL,
            argv=(*bundle.storage_daemon(), *trial_arguments(qmp, self._settings.pki_dir)),
            environment=bundle.environment,
            log=log,
        )
        trial = Daemon(self._supervisor, qmp, log)
        await self._supervisor.stop(_TRIAL, grace=0)
        try:
            await self._supervisor.start(unit)
            if not await trial.answers(SERVES_WITHIN):
                raise _refusal(bundle.release, trial.said()[-400:])
        finally:
            await trial.close()
            await self._supervisor.stop(_TRIAL, grace=0)
            qmp.unlink(missing_ok=True)

    # --- releases ----------------------------------------------------------------------------------

    async def _fit(self, release: ReleaseId) -> Bundle:
        bundle = await self.bundles.checked(release)
        if bundle.manifest.release.component is not Component.HYPERVISOR or bundle.version < MIN_VERSION:
            raise Refused(
                f"'{release}' has no storage daemon of version {MIN_VERSION[0]} or later",
                field="storage_release",
                remedy="choose another release",
            )
        return bundle

    async def _newest(self) -> Bundle:
        bundles = [await self.bundles.checked(release) for release in await self.bundles.available()]
        hypervisors = [b for b in bundles if b.manifest.release.component is Component.HYPERVISOR]
        fit = [bundle for bundle in hypervisors if bundle.version >= MIN_VERSION]
        if not fit:
            raise NotFound(
                f"no release from {MIN_VERSION[0]} on in {self._settings.releases_dir}",
                field="releases_dir",
                remedy="build one; earlier ones serve volumes too slowly",
            )
        return max(fit, key=lambda bundle: bundle.version)

    def _write(self, chosen: Chosen) -> None:
        record = self._record
        record.parent.mkdir(parents=True, exist_ok=True)
        new = record.with_suffix(".new")
        with new.open("wb") as file:
            file.write(msgspec.json.encode(chosen))
            file.flush()
            os.fsync(file.fileno())
        new.replace(record)


def _refusal(release: ReleaseId, reason: str) -> Refused:
    return Refused(
        f"the storage daemon of '{release}' does not serve here: {reason}",
        field="storage_release",
        remedy="choose another release; the one before serves on",
    )
