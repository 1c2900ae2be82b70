"""Snapshots for readers outside, on real daemons: who has the credential reads exactly what was there then,
nobody else does, and after the end nobody does, whether or not an agent is there. Snapshots as files."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from inside_place import BLOCK, content, inside, write
from physical_host import Host, Place, volume_on

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.storage import SnapshotExport, SnapshotSpec, VolumeFormat
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.exports import uri
from nahtlos.physical.storage.images import image_tool

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
DATA, THEN = VolumeId("data"), SnapshotId("then")
KEY = "0123456789abcdef" * 4


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("exp")
    with inside(place):
        try:
            yield place
        finally:
            await place.close()


async def with_snapshot(place: Place, form: VolumeFormat = VolumeFormat.RAW) -> tuple[Host, bytes]:
    """A volume that was written before and after its snapshot; what the snapshot holds."""
    host = place.host("host-1")
    volume = msgspec.structs.replace(volume_on(host, DATA, empty=True, size_mib=16), format=form)
    await host.storage.reconcile(StorageDesired(volumes=(volume,)))
    for number in (0, 5, 9):
        write(host, DATA, number, os.urandom(BLOCK))
    held = await asyncio.to_thread(content, host, DATA)
    await host.storage.snapshot((SnapshotSpec(id=THEN, volume=DATA),))
    write(host, DATA, 5, os.urandom(BLOCK))
    return host, held


def export(host: Host, name: str = "reader", *, seconds: float = 3600, port: int = 21000) -> SnapshotExport:
    return SnapshotExport(
        id=name,
        snapshot=THEN,
        host=host.settings.host,
        port=port,
        expires_at=time.time() + seconds,
        key_hex=KEY,
    )


def desired(host: Host, *exports: SnapshotExport) -> StorageDesired:
    return StorageDesired(volumes=(volume_on(host, DATA, empty=True, size_mib=16),), exports=exports)


def address(place: Place, host: Host, wanted: SnapshotExport, key: str = KEY) -> str:
    """As a reader has it: the address, and the credential in a file of its own."""
    file = place.folder / f"{wanted.id}-{key[:4]}.psk"
    file.write_text(f"{wanted.id}:{key}\n")
    return f"{uri(wanted, host.settings.address)}?tls-psk-file={file}"


async def run(*words: str | Path, environment: dict[str, str] | None = None) -> bytes:
    told = [str(word) for word in words]
    return await asyncio.to_thread(
        lambda: subprocess.run(told, check=True, capture_output=True, timeout=30, env=environment).stdout
    )


async def refused(*words: str | Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        await run(*words)


async def answering(at: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await run("nbdinfo", at)
            except subprocess.CalledProcessError:
                await asyncio.sleep(0.05)
            else:
                return


async def until_refused(at: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await run("nbdinfo", at)
            except subprocess.CalledProcessError:
                return
            await asyncio.sleep(0.1)


async def test_any_client_with_the_credential_reads_what_was_there_then(place: Place) -> None:
    host, held = await with_snapshot(place)
    tenants = await host.pid("qsd")
    wanted = export(host)
    assert await host.storage.reconcile(desired(host, wanted))
    assert await host.storage.reconcile(desired(host, wanted)) == ()
    at = address(place, host, wanted)
    await answering(at)
    copied = place.folder / "copied"
    await run("nbdcopy", at, copied)
    assert copied.read_bytes() == held
    bundle = await host.storage.releases.bundle()
    psk = place.folder / "psk"
    psk.mkdir()
    (psk / "keys.psk").write_text(f"{wanted.id}:{KEY}\n")
    node = (
        f"driver=nbd,server.type=inet,server.host={host.settings.address},server.port={wanted.port},"
        f"export={wanted.snapshot},tls-creds=t"
    )
    again = place.folder / "again"
    await run(
        *(*image_tool(bundle), "convert", "--image-opts", "-O", "raw"),
        *("--object", f"tls-creds-psk,id=t,endpoint=client,dir={psk},username={wanted.id}", node, again),
        environment={**os.environ, **bundle.environment},
    )
    assert again.read_bytes() == held
    said = msgspec.json.decode(await run("nbdinfo", "--json", at))
    assert said["exports"][0]["is_read_only"] is True
    write(host, DATA, 0, bytes(BLOCK))
    await run("nbdcopy", at, copied)
    assert copied.read_bytes() == held
    assert await host.pid("qsd") == tenants, "the daemon of the volumes was left alone"


async def test_nobody_else_reads_it(place: Place) -> None:
    host, _ = await with_snapshot(place)
    wanted = export(host)
    await host.storage.reconcile(desired(host, wanted))
    await answering(address(place, host, wanted))
    plain = f"nbd://{host.settings.address}:{wanted.port}/{THEN}"
    await refused("nbdinfo", plain)
    await refused("nbdinfo", address(place, host, wanted, key="f" * 64))
    another = msgspec.structs.replace(wanted, id="stranger")
    await refused("nbdinfo", address(place, host, another))
    pki = host.settings.pki_dir
    await refused("nbdinfo", f"nbds://{host.settings.address}:{wanted.port}/{THEN}?tls-certificates={pki}")
    credentials = host.settings.run_dir / "exports" / wanted.id
    assert credentials.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in credentials.iterdir())


async def test_it_ends_at_its_time_although_no_agent_is_there(place: Place) -> None:
    host, _ = await with_snapshot(place)
    wanted = export(host, seconds=6)
    lasting = export(host, "lasting", port=21001)
    await host.storage.reconcile(desired(host, wanted, lasting))
    await host.storage.close()  # the agent is killed, and comes back later
    at = address(place, host, wanted)
    await answering(at)
    pid = await host.pid("export.reader")
    os.kill(pid, 9)  # its daemon dies on the way, and is started again by the supervisor
    await host.until_pid("export.reader", other_than=pid)
    if time.time() < wanted.expires_at - 2:
        await answering(at)
    await until_refused(at)
    assert time.time() >= wanted.expires_at - 1
    await asyncio.sleep(max(0.0, wanted.expires_at - time.time()) + 0.5)
    await refused("nbdinfo", at)
    await answering(address(place, host, lasting))
    await host.restart_drivers()
    await host.storage.reconcile(desired(host, wanted, lasting))
    assert not (host.settings.run_dir / "exports" / wanted.id).exists()
    assert set(await host.supervisor.units()) == {"qsd", "export.lasting"}
    await host.storage.reconcile(desired(host))
    await refused("nbdinfo", address(place, host, lasting))


async def test_what_is_not_there_is_said_and_the_others_are_served(place: Place) -> None:
    host, _ = await with_snapshot(place)
    missing = msgspec.structs.replace(export(host, "missing", port=21005), snapshot=SnapshotId("never"))
    wanted = export(host)
    with pytest.raises(Unavailable, match="never"):
        await host.storage.reconcile(desired(host, missing, wanted))
    await answering(address(place, host, wanted))


@pytest.mark.parametrize("form", list(VolumeFormat))
async def test_snapshot_becomes_a_file(place: Place, form: VolumeFormat) -> None:
    host, held = await with_snapshot(place, form)
    seen: list[tuple[int, int]] = []
    for kind in VolumeFormat:
        file = place.folder / f"then.{kind}"
        await host.storage.snapshot_file(THEN, file, kind, on_copied=lambda d, t: seen.append((d, t)))
        bundle = await host.storage.releases.bundle()
        raw = place.folder / f"{kind}.raw"
        await run(
            *(*image_tool(bundle), "convert", "-f", kind, "-O", "raw", file, raw),
            environment={**os.environ, **bundle.environment},
        )
        assert raw.read_bytes() == held
        assert seen[-1] == (len(held), len(held))
        with pytest.raises(Conflict):
            await host.storage.snapshot_file(THEN, file, kind, on_copied=lambda d, t: None)
    with pytest.raises(NotFound):
        await host.storage.snapshot_file(
            SnapshotId("never"), place.folder / "x", VolumeFormat.RAW, on_copied=lambda d, t: None
        )
    with pytest.raises(Refused):
        await host.storage.snapshot_file(
            THEN, Path("/nowhere/x"), VolumeFormat.RAW, on_copied=lambda d, t: None
        )
    assert not list(place.folder.glob(".unfinished*"))
