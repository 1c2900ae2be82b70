"""Which accelerator serves under a release: found out by booting a guest, never by looking for a device.

/dev/kvm opens on machines where guests hang on it, so a guest must boot under it within a deadline;
otherwise software emulation (TCG) is used, and the reason is kept in words. The choice is remembered per
release, boot of the machine and kernel. Also tests that a release can be held before its switchover.

Probes are units of the supervisor, so an agent that dies leaves none behind for long: the next one stops
them first.
"""

import asyncio
import os
import time
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.inventory import Accelerator
from nahtlos.physical.hypervisor import migration
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.hypervisor.commandline import idle_arguments, probe_arguments
from nahtlos.physical.hypervisor.qmp import Gone, Qmp
from nahtlos.physical.ports import MigrationPhase, Supervisor, Unit
from nahtlos.physical.settings import AgentSettings

KVM = "kvm"
TCG = "tcg"
KVM_WITHIN = 10.0
TCG_WITHIN = 90.0
MONITOR_WITHIN = 20.0
HELD_FOR = 0.5
"""Seconds an idle guest must still run although everything of it has been sent."""
COMPLETES_WITHIN = 10.0
SAYS = "NAHTLOS-PROBE-OK"
UNIT_PREFIX = "probe."


class Prober:
    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()

    def remembered(self, bundle: Bundle) -> Accelerator | None:
        path = self._memory(bundle)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Accelerator)
        except (OSError, msgspec.MsgspecError):
            return None

    async def verify(self, bundle: Bundle) -> Accelerator:
        """Boot a probe in any case; Refused if none boots or the release cannot be held."""
        async with self._one_at_a_time:
            try:
                await self._sweep()
                chosen = await self._choose(bundle)
                await self._check_holding(bundle, chosen.name)
            finally:
                await self._sweep()
        return chosen

    async def choose(self, bundle: Bundle) -> Accelerator:
        """As remembered, else by booting."""
        async with self._one_at_a_time:
            known = self.remembered(bundle)
            if known is not None:
                return known
            try:
                return await self._choose(bundle)
            finally:
                await self._sweep()

    async def _choose(self, bundle: Bundle) -> Accelerator:
        known = self.remembered(bundle)
        if known is not None and not await self._boots(bundle, known.name):
            return known
        against_kvm = _unusable_device() or await self._boots(bundle, KVM)
        if not against_kvm:
            return self._remember(bundle, KVM, "a guest booted under KVM")
        against_tcg = await self._boots(bundle, TCG)
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
        chosen = Accelerator(name=name, reason=reason, release=bundle.release)
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

    async def _boots(self, bundle: Bundle, accelerator: str) -> str:
        """Empty if a guest booted, else why it did not."""
        kernel, initrd = guest_files(self._settings.images_dir)
        console = self._settings.run_dir / f"{UNIT_PREFIX}{accelerator}.console"
        console.unlink(missing_ok=True)
        arguments = probe_arguments(kernel, initrd, console, accelerator)
        unit = await self._start(f"{UNIT_PREFIX}{accelerator}", bundle, arguments)
        within = KVM_WITHIN if accelerator == KVM else TCG_WITHIN
        until = time.monotonic() + within
        try:
            while time.monotonic() < until:
                if console.exists() and SAYS in console.read_text(errors="replace"):
                    return ""
                status = (await self._supervisor.units()).get(unit.name)
                if status is None or status.pid is None:
                    return _spoke_or_not(console, unit)
                await asyncio.sleep(0.05)
            return f"a guest did not boot within {within:g} s"
        finally:
            await self._supervisor.stop(unit.name, grace=0)

    # --- holding -----------------------------------------------------------------------------------

    async def _check_holding(self, bundle: Bundle, accelerator: str) -> None:
        """The self-test of `migration`: a source that has sent everything must run on until stopped."""
        folder = self._settings.run_dir
        stream = folder / f"{UNIT_PREFIX}stream"
        stream.unlink(missing_ok=True)
        source = await self._idle(bundle, accelerator, folder / f"{UNIT_PREFIX}from", incoming=False)
        try:
            destination = await self._idle(bundle, accelerator, folder / f"{UNIT_PREFIX}to", incoming=True)
            try:
                await _held(source, destination, f"unix:{stream}", bundle)
            finally:
                await destination.close()
        finally:
            await source.close()
            stream.unlink(missing_ok=True)

    async def _idle(self, bundle: Bundle, accelerator: str, path: Path, *, incoming: bool) -> Qmp:
        path.unlink(missing_ok=True)
        unit = await self._start(path.name, bundle, idle_arguments(path, accelerator, incoming=incoming))
        until = time.monotonic() + MONITOR_WITHIN
        while True:
            try:
                return await Qmp.connect(path)
            except Gone:
                status = (await self._supervisor.units()).get(unit.name)
                if status is None or status.pid is None or time.monotonic() > until:
                    raise Refused(
                        f"a machine does not start under {bundle.release}: {_tail(unit.log)}", field="release"
                    ) from None
            await asyncio.sleep(0.02)

    async def _start(self, name: str, bundle: Bundle, arguments: tuple[str, ...]) -> Unit:
        log = self._settings.state_dir / "vmm" / f"{name}.log"
        log.unlink(missing_ok=True)
        unit = Unit(name=name, argv=(*bundle.system(), *arguments), environment=bundle.environment, log=log)
        await self._supervisor.start(unit)
        return unit

    async def _sweep(self) -> None:
        for name in await self._supervisor.units():
            if name.startswith(UNIT_PREFIX):
                await self._supervisor.stop(name, grace=0)
        for path in self._settings.run_dir.glob(f"{UNIT_PREFIX}*"):
            path.unlink(missing_ok=True)


async def _held(source: Qmp, destination: Qmp, uri: str, bundle: Bundle) -> None:
    await migration.set_capabilities(destination, migration.DESTINATION)
    await migration.set_capabilities(source, migration.SOURCE)
    await migration.set_source_parameters(source, 0, {})
    await destination.execute("migrate-incoming", {"uri": uri})
    await migration.begin(source, uri)
    await asyncio.sleep(HELD_FOR)
    if (await source.execute("query-status"))["status"] != "running":
        raise Refused(
            f"{bundle.release} switches over by itself although switchover-ack was asked for",
            field="release",
            remedy="servers cannot be moved without loss from it: choose another release",
        )
    await source.execute("stop")
    until = time.monotonic() + COMPLETES_WITHIN
    while (found := await migration.progress(source)).phase is MigrationPhase.ACTIVE:
        if time.monotonic() > until:
            raise Unavailable(f"{bundle.release} does not complete a move after the guest was stopped")
        await asyncio.sleep(0.005)
    if found.phase is not MigrationPhase.COMPLETED:
        raise Refused(f"a move from {bundle.release} to itself fails: {found.error}", field="release")


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


def _spoke_or_not(console: Path, unit: Unit) -> str:
    if console.exists() and SAYS in console.read_text(errors="replace"):
        return ""
    return f"the probe ended without a word: {_tail(unit.log)}"


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-400:].strip() if path.exists() else "no log"
