"""Two hosts with real storage daemons, a client that has a volume open as a server would, and a writer that
knows afterwards what must be there. `Stage.relocate` does with the drivers what the operation of an agent
does, and survives whatever ends one of its agents or daemons."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from nbd_writer import BLOCK, Disk, block, newest
from physical_host import Host, Place, volume_on

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, Error
from nahtlos.model.storage import CopyPhase, CopyProgress, VolumeFormat, VolumeSpec
from nahtlos.physical.agent.volumes.copying import Act, next_act
from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.hypervisor.commandline import TLS_CLIENT, tls_object
from nahtlos.physical.hypervisor.qmp import Gone, Qmp
from nahtlos.physical.ports import StorageDesired, Unit

SIZE_MIB = 64
SLOTS = 2048
"""Blocks that are written, one after the other, again and again."""
WITHIN = 30.0

Options = dict[str, object]


class Died(BaseException):
    """An agent ends here, as by kill -9: nothing of it catches this."""


class Writer(threading.Thread):
    """The n-th write goes to block n mod SLOTS and says n. Stands still on request, between two writes."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk = disk
        self.acknowledged = 0
        self.longest = 0.0
        self.errors = 0
        self.ends = threading.Event()
        self.still = threading.Lock()

    def run(self) -> None:
        while not self.ends.is_set():
            with self.still:
                began = time.monotonic()
                try:
                    self.disk.write(self.acknowledged % SLOTS, block(self.acknowledged))
                except (AssertionError, OSError):
                    self.errors += 1
                    return
                self.acknowledged += 1
                self.longest = max(self.longest, time.monotonic() - began)

    def wrong(self, read: Callable[[int], bytes]) -> list[int]:
        """Blocks that do not hold what was last acknowledged."""
        written = min(self.acknowledged, SLOTS)
        last = ((self.acknowledged - 1 - slot) // SLOTS * SLOTS + slot for slot in range(written))
        return [slot for slot, number in enumerate(last) if read(slot) != block(number)]


class Client:
    """A daemon in the place of a VMM: the volume's connection, over it the node to pivot at."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.door = host.settings.run_dir / "client.nbd"
        self._qmp_path = host.settings.run_dir / "client.qmp"
        self._number = self._wired = 0
        """The newest connection, and the last one known to be used with nothing of an older one left."""
        self._reached: VolumeEndpoint | None = None

    async def open(self, at: VolumeEndpoint) -> Disk:
        bundle = read_bundle(newest(self._host))
        _, credentials = tls_object(TLS_CLIENT, "client", self._host.settings.pki_dir)
        self._reached = at
        unit = Unit(
            name="client",
            argv=(
                *bundle.storage_daemon(),
                *("--chardev", f"socket,id=qmp,path={self._qmp_path},server=on,wait=off"),
                *("--monitor", "chardev=qmp", "--object", credentials),
                *("--object", '{"qom-type":"throttle-group","id":"limits"}'),
                *("--blockdev", _json(self._connection(at, 0)), "--blockdev", _json(self._top())),
                *("--nbd-server", f"addr.type=unix,addr.path={self.door}"),
                *("--export", "type=nbd,id=e,node-name=top,name=volume,writable=on"),
            ),
            environment=bundle.environment,
            log=self._host.settings.state_dir / "client.log",
        )
        await self._host.supervisor.start(unit)
        async with asyncio.timeout(20):
            while not self.door.is_socket():
                assert (await self._host.supervisor.units())["client"].pid is not None, unit.log.read_text()
                await asyncio.sleep(0.01)
        return await asyncio.to_thread(Disk, self.door)

    def _connection(self, at: VolumeEndpoint, number: int) -> Options:
        return {
            "driver": "nbd",
            "node-name": f"volume{number}",
            "server": {"type": "inet", "host": at.address, "port": str(at.port)},
            "export": at.export,
            "reconnect-delay": 30,
            "tls-creds": TLS_CLIENT,
        }

    def _top(self) -> Options:
        file = f"volume{self._number}"
        return {"driver": "throttle", "node-name": "top", "throttle-group": "limits", "file": file}

    async def attach(self, at: VolumeEndpoint) -> None:
        """As a hypervisor does when it is told of another way to the same volume. Repeatable."""
        if at == self._reached:
            return
        qmp = await Qmp.connect(self._qmp_path)
        try:
            if self._wired == self._number:
                await qmp.execute("blockdev-add", self._connection(at, self._number + 1))
                self._number += 1
            await qmp.execute("blockdev-reopen", {"options": [self._top()]})
            await qmp.execute("blockdev-del", {"node-name": f"volume{self._wired}"})
            self._wired = self._number
            self._reached = at
        except Gone as gone:
            raise AssertionError("the client died") from gone
        finally:
            await qmp.close()


class Stage:
    def __init__(self, place: Place, form: VolumeFormat, size_mib: int = SIZE_MIB) -> None:
        self.place = place
        self.hosts = (place.host("host-1"), place.host("host-2"))
        self.spec = msgspec.structs.replace(
            volume_on(self.hosts[0], "data", empty=True, size_mib=size_mib), format=form
        )
        self.client = Client(place.host("host-3"))
        self.writer: Writer
        self.begun = 0

    @property
    def home(self) -> Host:
        return next(host for host in self.hosts if host.settings.host == self.spec.host)

    @property
    def other(self) -> Host:
        return next(host for host in self.hosts if host.settings.host != self.spec.host)

    def endpoint(self, spec: VolumeSpec) -> VolumeEndpoint:
        host = next(h for h in self.hosts if h.settings.host == spec.host)
        address, port = host.settings.address, host.settings.nbd_port
        return VolumeEndpoint(host=spec.host, address=address, port=port, export=spec.export)

    async def begin(self) -> None:
        await self.home.storage.reconcile(StorageDesired(volumes=(self.spec,)))
        self.writer = Writer(await self.client.open(self.endpoint(self.spec)))
        self.writer.start()

    async def end(self) -> None:
        self.writer.ends.set()
        await asyncio.to_thread(self.writer.join)
        self.writer.disk.close()

    # --- one relocation ---

    async def relocate(self) -> None:
        """To the other host, whoever dies meanwhile."""
        source, target = self.home, self.other
        to = msgspec.structs.replace(self.spec, host=target.settings.host, epoch=self.spec.epoch + 1)
        self.begun = 0
        async with asyncio.timeout(WITHIN):
            await self._copied(source, target, to)
            await self._survived(source, lambda: self.client.attach(self.endpoint(to)))
            await self._survived(source, lambda: source.storage.relocate_finish(self.spec.id))
            self.spec = to
            await self._survived(
                target, lambda: target.storage.reconcile(StorageDesired(volumes=(self.spec,)))
            )

    async def progress(self) -> CopyProgress:
        return await self.home.storage.relocate_progress(self.spec.id)

    async def copy(self, bytes_per_second: int = 0) -> None:
        """It has begun on return."""
        to = msgspec.structs.replace(self.spec, host=self.other.settings.host, epoch=self.spec.epoch + 1)
        await self.other.storage.receive(to)
        await self.home.storage.relocate_start(
            self.spec, self.endpoint(to), bytes_per_second=bytes_per_second
        )

    async def copied_until_ready(self) -> None:
        await self.copy()
        async with asyncio.timeout(WITHIN):
            while (await self.progress()).phase is not CopyPhase.READY:
                await asyncio.sleep(0.02)

    async def failed(self) -> None:
        """The copy has, on return."""
        async with asyncio.timeout(WITHIN):
            while (await self.progress()).phase is not CopyPhase.FAILED:
                await asyncio.sleep(0.05)

    async def _copied(self, source: Host, target: Host, to: VolumeSpec) -> None:
        while True:
            progress = await self._survived(source, lambda: source.storage.relocate_progress(self.spec.id))
            match next_act(progress.phase):
                case Act.FORWARD:
                    return
                case Act.BEGIN:
                    self.begun += 1
                    await self._survived(target, lambda: target.storage.receive(to))
                    await self._tried(
                        source,
                        lambda: source.storage.relocate_start(
                            self.spec, self.endpoint(to), bytes_per_second=0
                        ),
                    )
                case Act.COMPLETE:
                    await self._tried(source, lambda: source.storage.relocate_complete(self.spec.id))
                case Act.WAIT:
                    await asyncio.sleep(0.01)

    async def _survived(self, host: Host, act: Callable[[], object]) -> object:
        """Again and again until it is done, by a new agent if the one that was at it has died."""
        while True:
            done, result = await self._tried(host, act)
            if done:
                return result
            await asyncio.sleep(0.02)

    async def _tried(self, host: Host, act: Callable[[], object]) -> tuple[bool, object]:
        try:
            return True, await act()  # type: ignore[misc]
        except Died:
            await host.restart_drivers()
        except (Conflict, Error):
            pass
        return False, None

    # --- what is there ---

    async def goes_on(self) -> None:
        """Writes come through."""
        enough = self.writer.acknowledged + 50
        async with asyncio.timeout(WITHIN):
            while self.writer.acknowledged < enough:
                await asyncio.sleep(0.01)

    async def wrong(self) -> list[int]:
        """Of what was acknowledged, as the client reads it."""
        await asyncio.to_thread(self.writer.still.acquire)
        try:
            return await asyncio.to_thread(self.writer.wrong, self.writer.disk.read)
        finally:
            self.writer.still.release()

    def wrong_on_disk(self, host: Host) -> list[int]:
        """Of a raw volume, as its file has it. Call it while the writer stands still."""
        with (host.settings.state_dir / "volumes" / "data.raw").open("rb") as file:
            return self.writer.wrong(lambda slot: os.pread(file.fileno(), BLOCK, slot * BLOCK))


@asynccontextmanager
async def stage(name: str, form: VolumeFormat, size_mib: int = SIZE_MIB) -> AsyncIterator[Stage]:
    place = Place(name)
    made: Stage | None = None
    try:
        made = Stage(place, form, size_mib)
        await made.begin()
        yield made
        await made.end()
    finally:
        if made is not None and hasattr(made, "writer"):
            made.writer.ends.set()
        await place.close()


def _json(value: Options) -> str:
    return msgspec.json.encode(value).decode()
