"""Which accelerator serves under a release: found out by booting a guest, never by looking for a device.

/dev/kvm opens on machines where guests hang on it, so a guest must boot under it within a deadline;
otherwise software emulation (TCG) is used, and the reason is kept in words. The choice is remembered per
release, boot of the machine and kernel. Also tests that a release can be held before its switchover.

Probes are units of the supervisor, so an agent that dies leaves none behind for long: the next one stops
them first.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.inventory import Accelerator
from nahtlos.physical.hypervisor import migration
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.hypervisor.commandline import PROBE_NIC, QUEUE_SIZE, ProbeShape, probe_arguments
from nahtlos.physical.hypervisor.qmp import Gone, Qmp
from nahtlos.physical.ports import MigrationPhase, MigrationProgress, Supervisor, Unit
from nahtlos.physical.settings import AgentSettings

KVM = "kvm"
TCG = "tcg"
KVM_WITHIN = 10.0
TCG_WITHIN = 90.0
MONITOR_WITHIN = 20.0
HELD_FOR = 0.5
"""Seconds an idle guest must still run although everything of it has been sent."""
STARVED_WITHIN = 30.0
IDLING = 64 << 10
"""Bytes per second."""
ALONE_WITHIN = 60.0
SAYS = "NAHTLOS-PROBE-OK"
UNIT_PREFIX = "probe."
ANY_HOSTS = ("host", "max", "base")
"""CPU models that are different on every host."""


class Prober:
    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()
        self._models: tuple[str, ...] = ()
        """Of the probe that booted last."""

    def remembered(self, bundle: Bundle) -> Accelerator | None:
        path = self._memory(bundle)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Accelerator)
        except (OSError, msgspec.MsgspecError):
            return None

    async def verify(self, bundle: Bundle) -> Accelerator:
        """Boot a probe in any case; Refused if none boots or the release cannot be held."""
        return await self._swept(bundle, verify=True)

    async def choose(self, bundle: Bundle) -> Accelerator:
        """As remembered, else by booting."""
        return self.remembered(bundle) or await self._swept(bundle, verify=False)

    async def _swept(self, bundle: Bundle, *, verify: bool) -> Accelerator:
        async with self._one_at_a_time, _alone(self._memory(bundle).with_suffix(".lock")):
            known = self.remembered(bundle)
            if known is not None and not verify:
                return known
            try:
                await self._sweep()
                return await self._tried(bundle, known, hold=verify)
            finally:
                await self._sweep()

    async def _tried(self, bundle: Bundle, known: Accelerator | None, *, hold: bool) -> Accelerator:
        if known is not None and not await self._boots(bundle, known.name, hold=hold):
            return self._remember(bundle, known.name, known.reason)
        self._models = ()
        against_kvm = _unusable_device() or await self._boots(bundle, KVM, hold=hold)
        if not against_kvm:
            return self._remember(bundle, KVM, "a guest booted under KVM")
        against_tcg = await self._boots(bundle, TCG, hold=hold)
        if against_tcg:
            raise Refused(
                f"no guest boots under {bundle.release}: KVM: {against_kvm}; TCG: {against_tcg}",
                field="release",
                remedy="choose another release for this host",
            )
        return self._remember(
            bundle, TCG, f"software emulation, because KVM is of no use here: {against_kvm}"
        )

    def _remember(self, bundle: Bundle, name: str, reason: str) -> Accelerator:
        chosen = Accelerator(name=name, reason=reason, release=bundle.release, cpu_models=self._models)
        path = self._memory(bundle)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")  # other hosts' agents may share the folder
        new.write_bytes(msgspec.json.encode(chosen))
        new.replace(path)
        return chosen

    def _memory(self, bundle: Bundle) -> Path:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        key = f"{bundle.manifest.release.digest[:12]}-{boot}-{os.uname().release}"
        return self._settings.cache_dir / f"accelerator-{key}.json"

    # --- booting -----------------------------------------------------------------------------------

    async def _boots(self, bundle: Bundle, accelerator: str, *, hold: bool) -> str:
        """Empty if a guest booted, else why it did not. Refused if it cannot be held."""
        source = await self._start("source", bundle, accelerator, incoming=False)
        try:
            why_not = await self._why_not_booted(source, KVM_WITHIN if accelerator == KVM else TCG_WITHIN)
            if not why_not:
                self._models = await _cpu_models(self._path("source.qmp"))
            if hold and not why_not:
                await self._check_holding(bundle, accelerator)
            return why_not
        finally:
            await self._supervisor.stop(source.name, grace=0)

    async def _why_not_booted(self, unit: Unit, within: float) -> str:
        console = self._path("source.console")
        until = time.monotonic() + within
        while time.monotonic() < until:
            if console.exists() and SAYS in console.read_text(errors="replace"):
                return ""
            if not await self._runs(unit):
                return f"the probe ended without a word: {_tail(unit.log)}"
            await asyncio.sleep(0.05)
        return f"a guest did not boot within {within:g} s"

    # --- holding -----------------------------------------------------------------------------------

    async def _check_holding(self, bundle: Bundle, accelerator: str) -> None:
        """The self-test of `migration`: a source that has sent everything must run on until stopped. A
        release that knows no such thing passes: its servers are replaced in place and never moved."""
        unit = await self._start("destination", bundle, accelerator, incoming=True)
        source = await Qmp.connect(self._path("source.qmp"))
        try:
            if migration.HELD not in await migration.capabilities(source):
                return  # no move is ever ordered from it: the table of version pairs says so
            destination = await self._answering(unit)
            try:
                await _check_queues(source, bundle)
                await _hold(source, destination, f"unix:{self._path('stream')}", bundle)
            finally:
                await destination.close()
        finally:
            await source.close()
            await self._supervisor.stop(unit.name, grace=0)

    async def _answering(self, unit: Unit) -> Qmp:
        until = time.monotonic() + MONITOR_WITHIN
        while True:
            try:
                return await Qmp.connect(self._path("destination.qmp"))
            except Gone:
                if time.monotonic() > until or not await self._runs(unit):
                    raise Refused(f"a second machine does not start: {_tail(unit.log)}") from None
            await asyncio.sleep(0.02)

    async def _start(self, role: str, bundle: Bundle, accelerator: str, *, incoming: bool) -> Unit:
        kernel, initrd = guest_files(self._settings.images_dir)
        shape = ProbeShape(
            kernel=kernel,
            initrd=initrd,
            console=self._path(f"{role}.console"),
            qmp=self._path(f"{role}.qmp"),
            accelerator=accelerator,
            version=bundle.version,
            incoming=incoming,
        )
        log = self._settings.state_dir / "vmm" / f"{UNIT_PREFIX}{role}.log"
        for path in (log, shape.console, shape.qmp):
            path.unlink(missing_ok=True)
        unit = Unit(
            name=f"{UNIT_PREFIX}{role}",
            argv=(*bundle.system(), *probe_arguments(shape)),
            environment=bundle.environment,
            log=log,
        )
        await self._supervisor.start(unit)
        return unit

    async def _runs(self, unit: Unit) -> bool:
        status = (await self._supervisor.units()).get(unit.name)
        return status is not None and status.pid is not None

    def _path(self, name: str) -> Path:
        return self._settings.run_dir / f"{UNIT_PREFIX}{name}"

    async def _sweep(self) -> None:
        for name in await self._supervisor.units():
            if name.startswith(UNIT_PREFIX):
                await self._supervisor.stop(name, grace=0)
        for path in self._settings.run_dir.glob(f"{UNIT_PREFIX}*"):
            path.unlink(missing_ok=True)


async def _cpu_models(path: Path) -> tuple[str, ...]:
    """Named models that lack nothing under the probe's accelerator; those that mean whatever the host has are
    left out, since no two hosts need mean the same by them."""
    monitor = await Qmp.connect(path)
    try:
        answer = await monitor.execute("query-cpu-definitions")
    finally:
        await monitor.close()
    return whole_models(cast("list[dict[str, Any]]", answer["value"]))


def whole_models(definitions: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of an answer to `query-cpu-definitions`."""
    whole = (d["name"] for d in definitions if d.get("unavailable-features") == [])
    return tuple(sorted(name for name in whole if name not in ANY_HOSTS))


async def _check_queues(monitor: Qmp, bundle: Bundle) -> None:
    """QEMU 10.0.13 gives every virtio queue 1024 entries whatever is asked for; later releases refuse a
    stream that says so, and that only after the guest was stopped."""
    path = f"/machine/peripheral/{PROBE_NIC}/virtio-backend"
    queue = await monitor.execute("x-query-virtio-queue-status", {"path": path, "queue": 0})
    if queue["vring-num-default"] != QUEUE_SIZE:
        raise Refused(
            f"{bundle.release} gives guests virtio queues of {queue['vring-num-default']} entries instead of"
            f" {QUEUE_SIZE}: servers started under it could not be moved to another release",
            field="release",
            remedy="build a release without this fault (10.0.2 or 11.1 have none)",
        )


async def _hold(source: Qmp, destination: Qmp, uri: str, bundle: Bundle) -> None:
    await migration.set_capabilities(destination, migration.DESTINATION)
    await migration.set_capabilities(source, migration.SOURCE)
    await migration.set_source_parameters(source, 0, {})
    await destination.execute("migrate-incoming", {"uri": uri})
    await migration.begin(source, uri)
    await _until(source, lambda found: found.passes >= 2 or found.phase is not MigrationPhase.ACTIVE, bundle)
    # A held source with nothing to send looks for changes without pause and starves its own monitor.
    await source.execute("migrate-set-parameters", {"max-bandwidth": IDLING}, within=STARVED_WITHIN)
    await asyncio.sleep(HELD_FOR)
    if (await source.execute("query-status", within=STARVED_WITHIN))["status"] != "running":
        raise Refused(
            f"{bundle.release} switches over by itself although switchover-ack was asked for",
            field="release",
            remedy="servers cannot be moved without loss from it: choose another release",
        )
    await source.execute("stop", within=STARVED_WITHIN)
    found = await _until(source, lambda found: found.phase is not MigrationPhase.ACTIVE, bundle)
    if found.phase is not MigrationPhase.COMPLETED:
        raise Refused(f"a move from {bundle.release} to itself fails: {found.error}", field="release")


async def _until(
    source: Qmp, reached: Callable[[MigrationProgress], bool], bundle: Bundle
) -> MigrationProgress:
    until = time.monotonic() + STARVED_WITHIN
    while True:
        found = migration.progress_of(await source.execute("query-migrate", within=STARVED_WITHIN))
        if reached(found):
            return found
        if time.monotonic() > until:
            raise Unavailable(f"a move from {bundle.release} to itself gets stuck: {found}")
        await asyncio.sleep(0.005)


@asynccontextmanager
async def _alone(path: Path) -> AsyncGenerator[None]:
    """One agent of this machine at a time: probes that compete for its processors fail each other, and
    the second can use what the first found out. After the deadline it goes on all the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + ALONE_WITHIN
    with path.open("w") as lock:
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.1)
        yield


def guest_files(images: Path) -> tuple[Path, Path]:
    """Kernel and initramfs of the newest guest image; Refused names what is missing."""
    kernels = sorted(images.glob("guest-*.vmlinuz"), key=lambda path: path.stat().st_mtime)
    initrd = kernels[-1].with_suffix(".initrd") if kernels else None
    if initrd is None or not initrd.is_file():
        raise Refused(
            f"no kernel and initramfs of a guest in {images}",
            field="images_dir",
            remedy="build the guest image",
        )
    return kernels[-1], initrd


def _unusable_device() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be opened ({error.strerror})"
    return ""


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-400:].strip() if path.exists() else "no log"
