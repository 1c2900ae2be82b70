"""The Debian image in a lab: cloud-init takes its NoCloud data from the network's service, DHCP gives the
address, the guest's agent answers, and the same boot goes on under the next hypervisor. Snapshots find
its file system frozen where that is asked for, and it switches itself off when it is asked to stop.

An emulated Debian takes minutes to boot, and its image minutes to build."""

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from lab_commands import LabCommands

from nahtlos.lab.datacentre import LabShape, opened, promisable, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.lab.topology import within
from nahtlos.model.blueprint import CampaignState, HostPhase
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Size
from nahtlos.model.storage import Consistency
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerRequest, ServerView
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.volumes import SnapshotRequest
from nahtlos.runtime.releases.debian_disk import ROOT_OFFSET
from nahtlos.runtime.releases.debian_image import DebianImage, build_debian

THOROUGH = os.environ.get("NAHTLOS_THOROUGH") == "1"
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    # Supervisors outlive who started them and are ended by the lab's clean-up: nobody waits for them here.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.skipif(
        not THOROUGH, reason="builds and boots a whole Debian, for up to half an hour: NAHTLOS_THOROUGH=1"
    ),
]
BUILD = BuildPaths.default()
DEBIAN = BUILD.root / "debian"
NAME = ServerId("carried")
BOOTS_WITHIN, STEP_SECONDS = 900.0, 300.0
EXT4_SUPERBLOCK, EXT4_NEEDS_RECOVERY = 1024, 4
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1hYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAxMjM0 owner"
USER_DATA = f"""\
#cloud-config
hostname: told-by-its-owner
ssh_authorized_keys: ["{KEY}"]
write_files:
 - path: /etc/told
   content: "as the user data say\\n"
 - path: /usr/local/bin/tell
   permissions: "0755"
   content: |
     #!/bin/sh
     mkdir -p /run/told; cd /run/told
     {{ hostname; cat /etc/told /home/debian/.ssh/authorized_keys; }} > who
     while :; do
       {{ cat /proc/sys/kernel/random/boot_id; cut -d. -f1 /proc/uptime; }} > new; mv new life; sleep 1
     done
runcmd:
 - [systemd-run, /usr/local/bin/tell]
 - [sh, -c, "until [ -s /run/told/life ]; do sleep 1; done"]
 - [systemd-run, --working-directory=/run/told, python3, -m, http.server, "80"]
"""


@pytest.fixture(scope="module")
def debian() -> DebianImage:
    return build_debian(DEBIAN)


@pytest.fixture
def build(tmp_path: Path, debian: DebianImage) -> BuildPaths:
    """This checkout's, with images of its own: other labs have but one, which nobody has to name."""
    for name in ("releases", "cache"):
        (tmp_path / name).symlink_to(BUILD.root / name)
    images = tmp_path / "images"
    images.mkdir()
    for path in (*BUILD.images.glob("guest-*"), debian.raw(DEBIAN)):
        (images / path.name).symlink_to(path)
    return BuildPaths(tmp_path)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = STEP_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.5)


async def booted(client: OperatorClient) -> str:
    """What the server's console has said once cloud-init is done."""
    text = ""
    deadline = time.monotonic() + BOOTS_WITHIN
    while "Datasource DataSource" not in text:
        assert time.monotonic() < deadline, text[-4000:]
        await asyncio.sleep(2)
        text = (await client.console_log(NAME)).data.decode(errors="replace")
    return text


async def told(outside: Outside, ip: str, page: str) -> list[str]:
    """Lines of a page. Its server starts when cloud-init is done, and takes its time."""
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            try:
                return (await outside.get(ip, page, timeout=10)).decode().splitlines()
            except Unavailable:
                await asyncio.sleep(1)


async def life(outside: Outside, ip: str) -> tuple[str, int]:
    """Its boot, and for how many seconds it has lasted."""
    boot, seconds = await told(outside, ip, "/life")
    return boot, int(seconds)


def ssh_banner(namespace: str, ip: str) -> bytes:
    def asked() -> bytes:
        with socket.create_connection((ip, 22), timeout=60) as connection:
            connection.settimeout(60)
            return connection.recv(64)

    return within(namespace, asked)


async def snapped(
    client: OperatorClient, line: LabCommands, volume: VolumeId, consistency: Consistency
) -> Path:
    """What a snapshot of the running server holds, in a raw file."""
    name = SnapshotId(f"{consistency.value}-1")
    await client.volumes.create_snapshots(
        SnapshotRequest(name=name, volumes=(volume,), consistency=consistency)
    )

    async def taken() -> bool:
        found = next((s for s in await client.volumes.snapshots() if s.spec.id == name), None)
        return found is not None and found.spec.consistent is consistency

    await until(taken)
    raw = line.build.root / f"{name}.raw"
    await asyncio.to_thread(line.checksum, name, raw)
    return raw


def to_be_recovered(raw: Path) -> bool:
    """Whether its ext4 says that its journal is to be played, as it does while it is
    mounted and not frozen."""
    with raw.open("rb") as disk:
        disk.seek(ROOT_OFFSET + EXT4_SUPERBLOCK)
        superblock = disk.read(EXT4_SUPERBLOCK)
    assert superblock[0x38:0x3A] == b"\x53\xef"
    return bool(struct.unpack_from("<I", superblock, 0x60)[0] & EXT4_NEEDS_RECOVERY)


async def switches_itself_off(client: OperatorClient) -> None:
    """Asked by its power button; its power need not be cut."""
    await client.power.stop(NAME, StopRequest(seconds=STEP_SECONDS))

    async def off() -> bool:
        return (await client.server(NAME)).state is RunState.STOPPED

    await until(off, STEP_SECONDS + 60)
    said = [event.text for event in await client.events(0, 1000) if event.subject == NAME]
    assert "stopped" in said
    assert not [text for text in said if "did not switch itself off" in text]


async def test_a_debian_becomes_what_its_owner_said_and_goes_on_under_the_next_release(
    build: BuildPaths, debian: DebianImage
) -> None:
    old, new = (release.id for release in (build.movable_releases()[0], build.movable_releases()[-1]))
    capacity = Size(vcpus=2, memory_mib=1024)
    shape = LabShape(hosts=2, capacity=capacity, promised=promisable(2, capacity))
    async with opened(unique_name("deb"), shape, build) as lab, lab.client as client:
        assert lab.topology is not None
        namespace = lab.topology.node("client").namespace
        outside = Outside(namespace)
        for release in (old, new):
            await client.register_release(release)

        async def serving() -> bool:
            return all(host.phase is HostPhase.SERVING for host in await client.hosts())

        await until(serving)
        created = await client.create_server(
            ServerRequest(
                name=NAME,
                vcpus=1,
                memory_mib=512,
                volume_mib=1536,
                image=debian.id,
                user_data=USER_DATA,
            )
        )
        said = await booted(client)
        assert "DataSourceNoCloudNet [seed=" in said
        who = await told(outside, created.ip, "/who")
        assert who[:2] == ["told-by-its-owner", "as the user data say"]
        assert KEY in who
        assert (await asyncio.to_thread(ssh_banner, namespace, created.ip)).startswith(b"SSH-2.0-OpenSSH")
        before = await client.server(NAME)
        assert before.release == old
        await _agent_tells(client, created)
        boot, age = await life(outside, created.ip)

        await client.start_upgrade(new, None)

        async def upgraded() -> bool:
            return (await client.campaign(None)).campaign.state is not CampaignState.RUNNING

        await until(upgraded, 600)
        after = await client.server(NAME)
        assert after.release == new
        assert after.epoch > before.epoch
        later, older = await life(outside, created.ip)
        assert (later, older > age) == (boot, True)
        await _agent_tells(client, created)
        line = LabCommands(lab.paths.name, build.root)
        (root,) = [view.spec.id for view in await client.volumes.volumes()]
        held = await snapped(client, line, root, Consistency.CRASH)
        frozen = await snapped(client, line, root, Consistency.FILESYSTEM)
        assert (to_be_recovered(held), to_be_recovered(frozen)) == (True, False)
        assert (await life(outside, created.ip))[0] == boot
        await switches_itself_off(client)


async def _agent_tells(client: OperatorClient, created: ServerView) -> None:
    """What the guest says of itself: Debian, with the address that DHCP gave it."""

    async def tells() -> bool:
        guest = (await client.server(NAME)).guest
        return guest is not None and guest.answers and f"eth0 {created.ip}" in guest.addresses

    await until(tells)
    guest = (await client.server(NAME)).guest
    assert guest is not None
    assert guest.system.startswith("Debian GNU/Linux 12")
