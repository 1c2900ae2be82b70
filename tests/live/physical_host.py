"""Hosts for tests of the drivers alone: a namespace, and in it per host a supervisor, taps, folders and a
certificate. No agent, no orchestrator; guests have no network beyond their tap."""

import asyncio
import ctypes
import fcntl
import ipaddress
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.ids import HostId, ImageId, NetworkId, PortId, ReleaseId, ServerId, VolumeId
from nahtlos.model.networking import PortSpec
from nahtlos.model.nouns import HostRole, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.hypervisor import cgroups
from nahtlos.physical.hypervisor.driver import QemuHypervisor
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage.embedded import EmbeddedStorage
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import RunningSupervisor, launch_supervisor
from nahtlos.runtime.identity.authority import CertificateAuthority
from nahtlos.wire.credentials import write_pki_dir

BUILD = Path(__file__).parents[2] / "build"
RELEASES = Path(os.environ.get("NAHTLOS_RELEASES", BUILD / "releases"))
IMAGES = Path(os.environ.get("NAHTLOS_IMAGES", BUILD / "images"))
TUNSETIFF = 0x400454CA
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
CLONE_NEWNET = 0x40000000
T = TypeVar("T")
ADDRESSES = ipaddress.ip_network("127.20.0.0/24")


def release(version: str) -> ReleaseId:
    found = sorted(path.name for path in RELEASES.glob(f"qemu-{version}[.-]*"))
    assert found, f"no release {version} is built"
    return ReleaseId(found[-1])


def image() -> ImageId:
    found = sorted(IMAGES.glob("guest-*.raw"), key=lambda path: path.stat().st_mtime)
    assert found, "no guest image is built"
    return ImageId(found[-1].stem)


class Place:
    """A namespace with a loopback interface, its own or one that is there, and the hosts in it."""

    def __init__(self, name: str, *, namespace: str = "") -> None:
        self.namespace = namespace or f"nlt-{name}-{os.getpid()}"
        self._owned = not namespace
        self.folder = Path(tempfile.mkdtemp(prefix="nlt-"))
        self.ram = Path(tempfile.mkdtemp(prefix="nlt-", dir="/dev/shm"))
        self.authority = CertificateAuthority.open(self.folder / "ca")
        self.hosts: list[Host] = []
        if self._owned:
            _run("ip", "netns", "add", self.namespace)
            _run("ip", "-n", self.namespace, "link", "set", "lo", "up")

    def host(self, name: str) -> "Host":
        host = Host(self, HostId(name), str(ADDRESSES[len(self.hosts) + 1]))
        self.hosts.append(host)
        return host

    async def close(self) -> None:
        for host in self.hosts:
            await host.close()
        if self._owned:
            _run("ip", "netns", "del", self.namespace)
        shutil.rmtree(self.folder)
        shutil.rmtree(self.ram)

    def tap(self, name: str) -> int:
        """A descriptor of a new tap in the namespace."""

        def opened() -> int:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
            return fd

        fd = self.inside(opened)
        _run("ip", "-n", self.namespace, "link", "set", name, "up")
        return fd

    def inside(self, act: Callable[[], T]) -> T:
        """In the namespace, by a thread that goes there."""

        def there() -> T:
            with Path(f"/run/netns/{self.namespace}").open() as namespace:
                assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0
            return act()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(there).result()


class Host:
    def __init__(self, place: Place, name: HostId, address: str) -> None:
        folder = place.folder / name
        pki = folder / "pki"
        issued = place.authority.issue_host(name, address)
        write_pki_dir(pki, issued.ca_pem, issued.certificate_pem, issued.key_pem)
        self.place = place
        self.settings = AgentSettings(
            host=name,
            role=HostRole.COMPUTE,
            address=address,
            peer_port=7444,
            orchestrator_address="127.0.0.1",
            orchestrator_port=7443,
            state_dir=folder / "state",
            run_dir=folder / "run",
            ram_dir=place.ram / name,
            releases_dir=RELEASES,
            images_dir=IMAGES,
            cache_dir=BUILD / "cache",
            pki_dir=pki,
            supervisor_socket=folder / "run" / "supervisor.sock",
            capacity=Size(vcpus=4, memory_mib=2048),
        )
        self._supervisor_state = folder / "supervisor"
        self.running = self._launch()
        self.supervisor = SupervisorClient(self.settings.supervisor_socket)
        self.hypervisor = QemuHypervisor(self.settings, self.supervisor)
        self.storage = EmbeddedStorage(self.settings, self.supervisor)

    def _launch(self) -> RunningSupervisor:
        return launch_supervisor(
            self.settings.supervisor_socket, self._supervisor_state, namespace=self.place.namespace
        )

    async def restart_supervisor(self) -> None:
        """After kill -9: what it started runs on."""
        self.running.kill()
        self.running = await asyncio.to_thread(self._launch)

    async def restart_drivers(self) -> None:
        """As when an agent is killed and started again."""
        await self._let_go()
        self.supervisor = SupervisorClient(self.settings.supervisor_socket)
        self.hypervisor = QemuHypervisor(self.settings, self.supervisor)
        self.storage = EmbeddedStorage(self.settings, self.supervisor)

    async def plug(self, server: ServerConfig) -> None:
        for port in server.spec.ports:
            fd = self.place.tap(f"{self.settings.host[-6:]}-{port.id[-6:]}")
            await self.supervisor.store_fd(f"tap.{port.id}", fd)
            os.close(fd)

    async def pid(self, unit: str) -> int:
        pid = (await self.supervisor.units())[unit].pid
        assert pid is not None
        return pid

    async def until_ended(self, unit: str) -> None:
        """A process that was killed lets go of its memory first, and is seen to have ended after that."""
        async with asyncio.timeout(10):
            while (await self.supervisor.units())[unit].pid is not None:
                await asyncio.sleep(0.005)

    async def until_pid(self, unit: str, *, other_than: int) -> None:
        async with asyncio.timeout(10):
            while True:
                pid = (await self.supervisor.units())[unit].pid
                if pid is not None and pid != other_than:
                    return
                await asyncio.sleep(0.005)

    async def _let_go(self) -> None:
        await self.hypervisor.close()
        await self.storage.close()
        self.supervisor.close()

    async def close(self) -> None:
        await self._let_go()
        await self.running.close()
        cgroups.remove_empty(self.settings.run_dir)


def volume_on(
    host: Host, name: str, *, size_mib: int = 192, epoch: int = 1, empty: bool = False
) -> VolumeSpec:
    source = None if empty else image()
    return VolumeSpec(
        id=VolumeId(name), size_mib=size_mib, image=source, host=host.settings.host, epoch=epoch
    )


def server_on(host: Host, name: str, *, epoch: int = 1, memory_mib: int = 256) -> ServerConfig:
    """A server whose volume `<name>-root` is served by `host`."""
    port = PortSpec(
        id=PortId(f"{name}-p"), network=NetworkId("tenant"), mac="52:54:00:4d:00:10", ip="10.77.0.10"
    )
    return ServerConfig(
        spec=ServerSpec(
            id=ServerId(name),
            size=Size(vcpus=1, memory_mib=memory_mib),
            volume=VolumeId(f"{name}-root"),
            ports=(port,),
            machine="pc-q35-10.0",
        ),
        epoch=epoch,
        volume=VolumeAttachment(
            volume=VolumeId(f"{name}-root"),
            address=host.settings.address,
            port=host.settings.nbd_port,
            export=f"{name}-root.e1",
        ),
    )


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=10)
