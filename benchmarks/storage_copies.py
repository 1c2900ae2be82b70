"""A volume with several copies under a writer, and the agent that cares for it.

The agent's part is the real one: `DiskKeeper`, its ledger, `DiskCare`, the changes to a running block graph.
The VMM is the stand-in of `storage_site`, to which a guest is added that stands still: what a quorum refuses
is sent again until it is done, as QEMU does with `werror=stop`. The orchestrator is a list of current copies
that takes `EPOCH_WRITE` seconds to be written.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from benchmarks.storage_site import UP_WITHIN, Host, Running
from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Stale, Unavailable
from nahtlos.model.ids import HostId, ReleaseId, ServerId, VolumeId
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.model.storage import Changes, CopyPhase, ReplicaState, VolumeSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.volumes.replicas import DiskKeeper, lost_exports, reached_by_copies, without
from nahtlos.physical.hypervisor import disks
from nahtlos.physical.hypervisor.commandline import tls_object
from nahtlos.physical.hypervisor.disk_care import STOPPED_BY_DISK, DiskCare
from nahtlos.physical.hypervisor.qmp import ANSWER_WITHIN, Answer, Arguments
from nahtlos.physical.hypervisor.vmm import Vmm, VmmRecord, ensure_folders, paths_of
from nahtlos.physical.ports import DiskProblem, Drivers, Unit, VmmId
from nahtlos.wire.message import Message
from nahtlos.wire.volumes import ReplicaLost, ReplicasRecorded

EPOCH_WRITE = 0.03
COPY_WITHIN = 30.0
BY_DELTA = 2
"""Attempts to copy only what differs, before everything is."""
POLL = 0.005
CLUSTER = 65536
"""What is told at once of copies that differ."""
STILL_AFTER = (0.001, 0.003, 0.01, 0.03)
"""When it is looked whether a writer stands still whose write was refused."""


class StandIn(Vmm):
    """The stand-in as a VMM: what the block layer of a storage daemon does not know is answered here."""

    def __init__(self, identity: VmmId, host: Host, care: DiskCare, state: Path) -> None:
        super().__init__(identity, paths_of(host.settings, identity), care.heard)
        self._care = care
        self._state = state
        """See `storage_load.c`."""

    @property
    def still(self) -> bool:
        return self._state.read_bytes() == b"s"

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = ANSWER_WITHIN
    ) -> Answer:
        match command:
            case "query-status":
                return {"status": STOPPED_BY_DISK if self.still else "running"}
            case "query-block":
                return {"value": [self._device()]}
            case "cont":
                if self.still:
                    with self._state.open("r+b") as file:
                        file.write(b"g")
                return {}
            case _:
                return await super().execute(command, arguments, within=within)

    def _device(self) -> dict[str, object]:
        return {
            "qdev": f"/machine/peripheral/{disks.SYSTEM_DEVICE}/virtio-backend",
            "inserted": {"node-name": disks.SYSTEM_ROOT},
            "io-status": "failed" if self.still else "ok",
        }

    def _on_event(self, name: str, data: Mapping[str, object]) -> None:
        super()._on_event(name, data)
        if name == "QUORUM_FAILURE":  # it stands still in a moment
            for delay in STILL_AFTER:
                asyncio.get_running_loop().call_later(delay, self._care.heard)


class Care:
    """Of a hypervisor's verbs those that an agent has for disks, as `QemuHypervisor` carries them out."""

    def __init__(self, host: Host, identity: VmmId, state: Path) -> None:
        self._care = DiskCare(host.supervisor)
        self.vmm = StandIn(identity, host, self._care, state)

    async def close(self) -> None:
        await self.vmm.disconnect()

    async def disks_watch(self, *, timeout: float) -> tuple[VmmId, ...]:
        await self.vmm.connect()
        return await self._care.watch({self.vmm.id: self.vmm}, timeout)

    async def disks_check(self, vmm: VmmId) -> tuple[DiskProblem, ...]:
        return await self._care.check(self.vmm)

    async def disks_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        async with self.vmm.changing_disks:
            return await self._care.reconcile(self.vmm, server)

    async def disks_settled(self, vmm: VmmId, server: ServerConfig) -> bool:
        async with self.vmm.changing_disks:
            return await self._care.settled(self.vmm, server)

    async def resume(self, vmm: VmmId) -> None:
        async with self.vmm.changing_disks:
            await self._care.complete(self.vmm)
            await self.vmm.execute("cont")


class Copies:
    """To be used as an asynchronous context. The server is at the first host, the copies are everywhere."""

    def __init__(self, hosts: list[Host], name: str, *, size_mib: int) -> None:
        self.hosts = {host.settings.host: host for host in hosts}
        self._home = hosts[0]
        self.volume = VolumeId(name)
        self.size_mib = size_mib
        self.current = [host.settings.host for host in hosts]
        self.rejoined = set(self.current)
        """Of those the ones of which their hosts know, too."""
        self.said: list[str] = []
        self.on_said: Callable[[str], None] = self.said.append
        self.stale_since = 0.0
        """When a copy was last recorded as not current any more."""
        self._epochs = dict.fromkeys(self.hosts, 1)
        self._last_epoch = 1
        self._copying: dict[HostId, int] = {}
        """Attempts to bring a copy up to the others."""
        self._identity = VmmId(ServerId(name), 1)
        self._home.settings.state_dir.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(self._home.settings.state_dir / f"{name}.ledger")
        self._state = self.host.settings.run_dir / f"{name}.state"
        self._state.write_bytes(b"r")
        self._door = self._home.settings.run_dir / f"{name}.nbd"
        self._steps = 0
        self._care: Care
        self._agent: asyncio.Task[None] | None = None

    # --- beginning and end -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        for name, host in self.hosts.items():
            await host.have(self.spec(name))
        server = self._server(self.endpoints())
        self._ledger.own(server)
        await self._start(server)
        await self.start_agent()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill_agent()
        await self._home.supervisor.stop(self._identity.unit, grace=0)
        self._ledger.close()
        for host in self.hosts.values():
            await host.forget(self.spec(host.settings.host))

    async def _start(self, server: ServerConfig) -> None:
        ensure_folders(self._home.settings)
        bundle = self._home.site.bundle()
        (disk,) = disks.disks_of(server)
        nodes, last = disks.connections(disk, 0)
        kind, credentials = tls_object(disks.TLS_CLIENT, "client", self._home.settings.pki_dir)
        group = {"qom-type": "throttle-group", "id": disk.group}
        paths = paths_of(self._home.settings, self._identity)
        await self._home.supervisor.start(
            Unit(
                name=self._identity.unit,
                argv=(
                    *bundle.storage_daemon(),
                    *("--chardev", f"socket,id=qmp,path={paths.qmp},server=on,wait=off"),
                    *("--monitor", "chardev=qmp"),
                    *(f"-{kind}", credentials, "--object", _json(group)),
                    *(
                        word
                        for node in (*nodes, disks.root(disk, last))
                        for word in ("--blockdev", _json(node))
                    ),
                    *("--nbd-server", f"addr.type=unix,addr.path={self._door}"),
                    *("--export", f"type=nbd,id=e,node-name={disk.root},name=volume,writable=on"),
                ),
                environment=bundle.environment,
                log=paths.log,
            )
        )
        async with asyncio.timeout(UP_WITHIN):
            while not (self._door.is_socket() and paths.qmp.is_socket()):
                if (await self._home.supervisor.units())[self._identity.unit].pid is None:
                    raise RuntimeError(paths.log.read_text())
                await asyncio.sleep(0.01)
        record = VmmRecord(server=server, epoch=1, release=ReleaseId(bundle.release), incoming=False)
        paths.record.write_bytes(msgspec.json.encode(record))

    def writer(self, *, depth: int) -> Running:
        self._state.write_bytes(b"r")
        return Running(self, "hold", depth=depth, state=self._state)

    @property
    def host(self) -> Host:
        """Where the server is."""
        return self._home

    @property
    def door(self) -> Path:
        return self._door

    # --- the agent at the server's host ------------------------------------------------------------

    async def start_agent(self) -> None:
        self._care = Care(self._home, self._identity, self._state)
        self._agent = asyncio.ensure_future(DiskKeeper(self._context()).run())

    async def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.cancel()
            await asyncio.wait((self._agent,))
            await self._care.close()
        self._agent = None

    def _context(self) -> Context:
        drivers = Drivers(
            supervisor=self._home.supervisor,
            hypervisor=self._care,  # pyright: ignore[reportArgumentType]
            network=None,  # pyright: ignore[reportArgumentType]
            storage=self._home.storage,
        )
        return Context(
            settings=self._home.settings,
            drivers=drivers,
            ledger=self._ledger,
            transport=None,  # pyright: ignore[reportArgumentType]
            now=time.time,
            emit=lambda event: self._say(f"{event.kind}: {event.text}"),
            changed=lambda: None,
            on_bug=_raised,
            ask=self._ask,
        )

    def _say(self, text: str) -> None:
        self.on_said(text)

    async def _ask(self, body: Message, timeout: float) -> Message:
        """As the orchestrator answers."""
        assert isinstance(body, ReplicaLost)
        await asyncio.sleep(EPOCH_WRITE)
        left = [host for host in self.current if host != body.lost or self._export(host) != body.export]
        if not left:
            raise Conflict(f"the copy on {body.lost} is the only current one", field="lost")
        if self._export(body.lost) == body.export:  # whatever comes to this host is another copy
            self._last_epoch += 1
            self._epochs[body.lost] = self._last_epoch
            self._copying.pop(body.lost, None)
            self.rejoined.discard(body.lost)
            self.stale_since = time.monotonic()
        self.current = left
        return ReplicasRecorded(attachment=self._attachment(self.endpoints()))

    # --- copies ------------------------------------------------------------------------------------

    def spec(self, host: HostId) -> VolumeSpec:
        blank = self.hosts[host].volume(self.volume, size_mib=self.size_mib, epoch=self._epochs[host])
        state = ReplicaState.CURRENT if host in self.current else ReplicaState.STALE
        return msgspec.structs.replace(blank, state=state)

    def _export(self, host: HostId) -> str:
        return f"{self.volume}.e{self._epochs[host]}"

    def _endpoint(self, host: HostId) -> VolumeEndpoint:
        return self.hosts[host].endpoint(self.spec(host))

    def endpoints(self) -> tuple[VolumeEndpoint, ...]:
        return tuple(self._endpoint(host) for host in self.current)

    def _attachment(self, copies: tuple[VolumeEndpoint, ...]) -> VolumeAttachment:
        first = copies[0]
        blank = VolumeAttachment(
            volume=self.volume, address=first.address, port=first.port, export=first.export
        )
        return reached_by_copies(blank, copies)

    def _server(self, copies: tuple[VolumeEndpoint, ...]) -> ServerConfig:
        spec = ServerSpec(
            id=self._identity.server,
            size=Size(vcpus=1, memory_mib=64),
            volume=self.volume,
            ports=(),
            machine="pc-q35-10.0",
        )
        return ServerConfig(spec=spec, epoch=1, volume=self._attachment(copies))

    async def reach(self, copies: tuple[VolumeEndpoint, ...]) -> None:
        """As an agent that is told how its server reaches a volume from now on."""
        attachment = without(self._attachment(copies), lost_exports(self._ledger))
        server = msgspec.structs.replace(self._server(copies), volume=attachment)
        self._ledger.adopt(server)
        await self._care.disks_reconcile(self._identity, server)

    async def in_step(self) -> None:
        """Every copy remembers from now on what is written to it. Unavailable if they could not be brought
        there."""
        self._steps += 1
        step, current = f"{len(self.current)}-{self._steps}", tuple(self.current)
        for host in current:
            await self.hosts[host].storage.step_begin(self.volume, step)
        server = self._server(tuple(self._endpoint(host) for host in current))
        if current != tuple(self.current) or not await self._care.disks_settled(self._identity, server):
            raise Unavailable("the copies are not in step")
        for host in current:
            await self.hosts[host].storage.step_reached(self.volume, step)

    async def rejoin(self, host: HostId) -> int:
        """A copy that was lost counts again; bytes that were copied. Repeatable whoever died meanwhile; Stale
        if it was lost again."""
        copied = 0
        if host not in self.current:
            copied = await self._brought_up(host)
        source = self.hosts[next(name for name in self.current if name != host)]
        with contextlib.suppress(NotFound):
            await source.storage.relocate_cancel(self.volume)
        await self.hosts[host].have(self.spec(host))
        await self.reach(self.endpoints())
        if host in self.current:
            self.rejoined.add(host)
        return copied

    async def _brought_up(self, host: HostId) -> int:
        """The steps of the operation `rebuild`."""
        source = self.hosts[self.current[0]]
        coming, target = self.spec(host), self._endpoint(host)
        async with asyncio.timeout(COPY_WITHIN):
            while True:
                if self._endpoint(host) != target or self.hosts[self.current[0]] is not source:
                    raise Stale(f"the copy on {host} or the one it is made of was lost", field="volume")
                progress = await source.storage.relocate_progress(self.volume)
                match progress.phase:
                    case CopyPhase.NONE | CopyPhase.FAILED:
                        await self.reach(self.endpoints())
                        await self._begin(host, coming, target)
                    case CopyPhase.READY:
                        joining = msgspec.structs.replace(target, joining=True)
                        await self.reach((*self.endpoints(), joining))
                        ready = (await source.storage.relocate_progress(self.volume)).phase is CopyPhase.READY
                        if ready and self._endpoint(host) == target:
                            self.current.append(host)
                            self._copying.pop(host, None)
                            return progress.done
                    case _:
                        await asyncio.sleep(POLL)

    async def _begin(self, host: HostId, coming: VolumeSpec, target: VolumeEndpoint) -> None:
        here, there = self.hosts[self.current[0]], self.hosts[host]
        attempt = self._copying[host] = self._copying.get(host, 0) + 1
        changes: Changes | None = None
        if attempt <= BY_DELTA:
            changes = await there.storage.rejoin(coming)
        if changes is not None:
            with contextlib.suppress(Conflict):
                await self._copy(here, target, changes)
                return
        await there.storage.receive(coming)
        await self._copy(here, target, None)

    async def _copy(self, here: Host, target: VolumeEndpoint, changes: Changes | None) -> None:
        spec = self.spec(here.settings.host)
        await here.storage.relocate_start(spec, target, bytes_per_second=0, changes=changes)

    async def differ(self) -> tuple[HostId, ...]:
        """Copies that do not hold what the first one does. Nobody may write meanwhile."""
        digests = {
            host: await self.hosts[host].storage.digest(self.volume, 0, self.size_mib << 20)
            for host in self.current
        }
        first = digests[self.current[0]]
        differing = tuple(host for host, digest in digests.items() if digest != first)
        for host in differing:
            self._say(f"{host} differs from {self.current[0]} at {await self._differing_at(host)}")
        return differing

    async def _differing_at(self, host: HostId) -> str:
        sides = self.hosts[self.current[0]], self.hosts[host]
        found: list[str] = []
        for offset in range(0, self.size_mib << 20, CLUSTER):
            here, there = [await side.storage.digest(self.volume, offset, CLUSTER) for side in sides]
            found += [f"{offset:#x}"] if here != there else []
        return " ".join(found)

    async def recorded(self, host: HostId, *, within: float = 10.0) -> None:
        """Returns when this copy does not count any more."""
        async with asyncio.timeout(within):
            while host in self.current:
                await asyncio.sleep(POLL)


def _raised(error: BaseException) -> None:
    raise error


def _json(value: Mapping[str, object]) -> str:
    return msgspec.json.encode(value).decode()
