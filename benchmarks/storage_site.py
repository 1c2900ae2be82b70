"""Hosts for the storage benchmark, and a stand-in for a server's disk.

Hosts are a supervisor and the real storage driver each, beside each other in one network namespace, on
addresses of its loopback interface; TLS everywhere, as in a cloud. The stand-in is what a VMM is to a disk:
a process with QEMU's block layer, its NBD client, its throttle filter and a monitor. In place of the guest's
virtio it offers the disk on a unix socket; the load comes from `storage_load.c`. Whatever is compared has the
same stand-in before it.
"""

import asyncio
import contextlib
import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Protocol, Self

import msgspec

from nahtlos.lab.paths import BuildPaths
from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.ids import HostId, ReleaseId, VolumeId
from nahtlos.model.nouns import HostRole, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle, read_bundle
from nahtlos.physical.hypervisor.commandline import tls_object
from nahtlos.physical.hypervisor.qmp import Gone, Qmp
from nahtlos.physical.ports import StorageDesired, Unit
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage.definition import UNIT
from nahtlos.physical.storage.embedded import EmbeddedStorage
from nahtlos.physical.storage.serving import OnStep
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import RunningSupervisor, launch_supervisor
from nahtlos.runtime.identity.authority import CertificateAuthority
from nahtlos.wire.credentials import write_pki_dir

FOLDER = Path("build/bench/storage")
SOURCE = Path(__file__).with_name("storage_load.c")
ADDRESSES = ipaddress.ip_network("127.21.0.0/24")
UP_WITHIN = 20.0
RECONNECT = 30
CLONE_NEWNET = 0x40000000

Node = dict[str, object]
TOP: Node = {"driver": "throttle", "node-name": "top", "throttle-group": "limits", "discard": "unmap"}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What `storage_load.c` says. Seconds."""

    operations: int
    seconds: float
    errors: int
    lost: int
    wrong: int
    longest: float
    longest_at: float
    """When the request that waited longest was sent, from the beginning."""
    p50: float
    p99: float
    bins: tuple[int, ...]
    """Completions per hundredth second."""

    @property
    def rate(self) -> float:
        return self.operations / self.seconds

    @property
    def sound(self) -> bool:
        return not (self.errors or self.lost or self.wrong)


@contextlib.contextmanager
def inside(namespace: str) -> Generator[None]:
    """This thread, and those it starts, in a network namespace: where an agent would be, who asks storage
    daemons whether they live."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before:
        with Path(f"/run/netns/{namespace}").open() as there:
            _enter(libc, there.fileno())
        try:
            yield
        finally:
            _enter(libc, before.fileno())


def _enter(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Site:
    """To be used as an asynchronous context."""

    def __init__(self, hosts: int) -> None:
        self.namespace = f"nlt-bench-storage-{os.getpid()}"
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="site-", dir=FOLDER)).resolve()
        self.run_dir = Path(tempfile.mkdtemp(prefix="nlt-"))
        self.build = BuildPaths.default()
        self.program = self.folder / "storage_load"
        self._authority = CertificateAuthority.open(self.folder / "ca")
        self._count = hosts
        self._inside = contextlib.ExitStack()
        self.hosts: list[Host] = []

    async def __aenter__(self) -> Self:
        subprocess.run(["gcc", "-O2", "-o", str(self.program), str(SOURCE)], check=True, timeout=60)
        _ip("netns", "add", self.namespace)
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        self._inside.enter_context(inside(self.namespace))
        for number in range(1, self._count + 1):
            name, address = HostId(f"host-{number}"), str(ADDRESSES[number])
            issued = self._authority.issue_host(name, address)
            pki = self.folder / name / "pki"
            write_pki_dir(pki, issued.ca_pem, issued.certificate_pem, issued.key_pem)
            self.hosts.append(Host(self, name, address, pki))
        return self

    async def __aexit__(self, *_: object) -> None:
        for host in self.hosts:
            await host.close()
        self._inside.close()
        _ip("netns", "del", self.namespace)
        shutil.rmtree(self.folder)
        shutil.rmtree(self.run_dir)

    def bundle(self, version: str = "") -> Bundle:
        """The newest of that version."""
        folders = self.build.releases.glob(f"qemu-{version}*")
        return max((read_bundle(folder) for folder in folders), key=lambda bundle: bundle.version)


class Host:
    def __init__(self, site: Site, name: HostId, address: str, pki: Path) -> None:
        folder, run = site.folder / name, site.run_dir / name
        self.site = site
        self.settings = AgentSettings(
            host=name,
            role=HostRole.COMPUTE,
            address=address,
            peer_port=7444,
            orchestrator_address="127.0.0.1",
            orchestrator_port=7443,
            state_dir=folder / "state",
            run_dir=run,
            ram_dir=run / "ram",
            releases_dir=site.build.releases,
            images_dir=site.build.images,
            cache_dir=site.build.cache,
            pki_dir=pki,
            supervisor_socket=run / "supervisor.sock",
            capacity=Size(vcpus=4, memory_mib=2048),
        )
        run.mkdir()
        self._supervisor_state = folder / "supervisor"
        self._running = self._launch()
        self.supervisor = SupervisorClient(self.settings.supervisor_socket)
        self.storage = EmbeddedStorage(self.settings, self.supervisor)
        self.on_step: OnStep | None = None
        """Hears of the storage's steps, also of those of drivers to come."""

    def _launch(self) -> RunningSupervisor:
        return launch_supervisor(
            self.settings.supervisor_socket, self._supervisor_state, namespace=self.site.namespace
        )

    async def close(self) -> None:
        await self.storage.close()
        self.supervisor.close()
        await self._running.close()

    def volume(self, name: str, *, size_mib: int, epoch: int = 1) -> VolumeSpec:
        return VolumeSpec(
            id=VolumeId(name), size_mib=size_mib, image=None, host=self.settings.host, epoch=epoch
        )

    async def have(self, *volumes: VolumeSpec, release: ReleaseId | None = None) -> None:
        await self.storage.reconcile(StorageDesired(volumes=volumes, release=release))

    async def restart_driver(self) -> None:
        """As when the agent was killed and started again."""
        await self.storage.close()
        self.storage = EmbeddedStorage(self.settings, self.supervisor)
        self.hear(self.on_step)

    def hear(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        if on_step is not None:
            self.storage.serving.on_step = on_step

    async def lose_power(self) -> None:
        """Nobody holds the sockets of its storage daemon any more."""
        daemon = await self.pid(UNIT)
        self._running.kill()
        if daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)

    async def come_back(self) -> None:
        """What ran is started again by its supervisor."""
        self._running = await asyncio.to_thread(self._launch)
        self.supervisor.close()
        self.supervisor = SupervisorClient(self.settings.supervisor_socket)
        await self.restart_driver()

    async def forget(self, *volumes: VolumeSpec) -> None:
        """With their snapshots."""
        names = tuple(volume.id for volume in volumes)
        taken = tuple(each.id for each in await self.storage.snapshots() if each.volume in names)
        await self.storage.reconcile(StorageDesired(removed=names, removed_snapshots=taken))

    def endpoint(self, volume: VolumeSpec) -> VolumeEndpoint:
        return VolumeEndpoint(
            host=self.settings.host,
            address=self.settings.address,
            port=self.settings.nbd_port,
            export=volume.export,
        )

    async def kill(self, unit: str) -> None:
        """By SIGKILL; returns when it runs again. Nothing to do for what does not run."""
        before = await self.pid(unit)
        if before is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGKILL)
        try:
            async with asyncio.timeout(UP_WITHIN):
                while await self.pid(unit) in (before, None):
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise RuntimeError(f"{unit} does not start again: {self.storage.daemon.said()}") from None

    async def pid(self, unit: str) -> int | None:
        status = (await self.supervisor.units()).get(unit)
        return status.pid if status else None


class Disk:
    """The stand-in: the nodes of a disk, the last of them under its throttle filter `top`."""

    def __init__(self, host: Host, name: str, nodes: tuple[Node, ...], *, version: str = "") -> None:
        self.host: Host = host
        self._unit = f"disk-{name}"
        self._nodes = nodes
        self._below = str(nodes[-1]["node-name"])
        self._leading = asyncio.Lock()
        self._leads = 0
        self.reaches: VolumeEndpoint | None = None
        """Where it was led to; None: where it began."""
        self._bundle = host.site.bundle(version)
        self.door: Path = host.settings.run_dir / f"{name}.nbd"
        self._monitor = host.settings.run_dir / f"{name}.qmp"
        self.qmp: Qmp | None = None

    async def __aenter__(self) -> Self:
        nodes = (*self._nodes, {**TOP, "file": self._below})
        kind, credentials = tls_object("tls-client", "client", self.host.settings.pki_dir)
        log = self.host.settings.state_dir / f"{self._unit}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        await self.host.supervisor.start(
            Unit(
                name=self._unit,
                argv=(
                    *self._bundle.storage_daemon(),
                    *("--chardev", f"socket,id=qmp,path={self._monitor},server=on,wait=off"),
                    *("--monitor", "chardev=qmp"),
                    *(f"-{kind}", credentials, "--object", "throttle-group,id=limits"),
                    *(word for node in nodes for word in ("--blockdev", json.dumps(node))),
                    *("--nbd-server", f"addr.type=unix,addr.path={self.door}"),
                    *("--export", "type=nbd,id=e,node-name=top,name=volume,writable=on"),
                ),
                environment=self._bundle.environment,
                log=log,
            )
        )
        async with asyncio.timeout(UP_WITHIN):
            while not self.door.is_socket():
                if (await self.host.supervisor.units())[self._unit].pid is None:
                    raise RuntimeError(log.read_text())
                await asyncio.sleep(0.01)
            while self.qmp is None:
                try:
                    self.qmp = await Qmp.connect(self._monitor)
                except Gone:
                    await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.qmp is not None:
            await self.qmp.close()
        await self.host.supervisor.stop(self._unit, grace=0)
        self.door.unlink(missing_ok=True)

    async def lead_to(self, endpoint: VolumeEndpoint) -> None:
        """The pivot of a VMM: a fresh connection, one reopen of the root, the old one goes. Carried through
        whatever becomes of who asked; repeatable."""
        await asyncio.shield(asyncio.ensure_future(self._lead_to(endpoint)))

    async def _lead_to(self, endpoint: VolumeEndpoint) -> None:
        async with self._leading:
            if self.reaches == endpoint or self.qmp is None:
                return
            self._leads += 1
            fresh = f"volume-{self._leads}"
            await self.qmp.execute("blockdev-add", remote(endpoint, fresh))
            await self.qmp.execute("blockdev-reopen", {"options": [{**TOP, "file": fresh}]})
            before, self._below, self.reaches = self._below, fresh, endpoint
            await self.qmp.execute("blockdev-del", {"node-name": before})

    def writer(self, *, depth: int) -> "Running":
        return Running(self, "check", depth=depth)

    async def load(self, kind: str, *, seconds: float, block: int = 4096, depth: int = 1) -> Load:
        return await Running(self, kind, seconds=seconds, block=block, depth=depth).ended()


class Offered(Protocol):
    """A disk that a load can be put on."""

    @property
    def host(self) -> Host: ...
    @property
    def door(self) -> Path: ...

    def writer(self, *, depth: int) -> "Running":
        """One that checks itself."""
        ...


class Running:
    """A load under way."""

    def __init__(
        self,
        disk: Offered,
        kind: str,
        *,
        seconds: float = 3600,
        block: int = 4096,
        depth: int = 1,
        state: Path | None = None,
    ) -> None:
        words = [str(disk.host.site.program), str(disk.door), kind, str(block), str(depth), str(seconds)]
        words += [str(state)] if state is not None else []
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def stop(self) -> Load:
        """Soon; a check is judged then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None
        return await self.ended()

    async def ended(self) -> Load:
        said, _ = await asyncio.to_thread(self._process.communicate)
        if self._process.returncode:
            raise RuntimeError(f"the load ended with {self._process.returncode}")
        return msgspec.json.decode(said, type=Load)

    def abandon(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def remote(endpoint: VolumeEndpoint, name: str = "volume", *, tls: bool = True) -> Node:
    node: Node = {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "inet", "host": endpoint.address, "port": str(endpoint.port)},
        "export": endpoint.export,
        "reconnect-delay": RECONNECT,
        "discard": "unmap",
    }
    return {**node, "tls-creds": "tls-client"} if tls else node


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True, timeout=10)
