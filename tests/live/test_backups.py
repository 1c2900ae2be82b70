"""Backups of a volume that is written, with real storage daemons: what is restored is what was there, whole
or in steps; killed in between it is repeated from the same changes; what is not known is never guessed."""

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from inside_place import BLOCK, content, door, inside, write
from outsider import credentials
from physical_host import Host, Place, volume_on

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import BackupId, VolumeId
from nahtlos.model.storage import BackupSpec, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle, read_bundle
from nahtlos.physical.ports import BackupResult, StorageDesired, Unit
from nahtlos.physical.storage.backup_targets import ROOM
from nahtlos.wire.tls import CA_FILE, OUTSIDERS_CA_FILE

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
SIZE_MIB = 32
DATA = VolumeId("data")


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("bak")
    with inside(place):
        try:
            yield place
        finally:
            await place.close()


async def served(place: Place) -> Host:
    host = place.host("host-1")
    volume = volume_on(host, DATA, empty=True, size_mib=SIZE_MIB)
    await host.storage.reconcile(StorageDesired(volumes=(volume,)))
    return host


def spec(place: Place, name: str, base: BackupSpec | None = None, target: str = "") -> BackupSpec:
    return BackupSpec(
        id=BackupId(name),
        volume=DATA,
        target=target or str(place.folder / "backups"),
        base=base.id if base else None,
        created_at=time.time(),
    )


async def backed_up(host: Host, backup: BackupSpec, base: BackupSpec | None = None) -> BackupResult:
    return await host.storage.backup(
        DATA, backup, base, bytes_per_second=0, on_copied=lambda done, total: None
    )


async def restored(host: Host, name: str, *chain: BackupSpec, size_mib: int = SIZE_MIB) -> bytes:
    volume = VolumeSpec(id=VolumeId(name), size_mib=size_mib, image=None, host=host.settings.host)
    await host.storage.receive(volume)
    await host.storage.restore(volume, chain, on_copied=lambda done, total: None)
    return await asyncio.to_thread(content, host, volume.id)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


async def test_every_point_of_a_chain_is_restored(place: Place) -> None:
    host = await served(place)
    for number in (0, 3, 7):
        write(host, DATA, number, block(number + 1))
    first, first_held = spec(place, "first"), content(host, DATA)
    assert await backed_up(host, first) == BackupResult(base=None, stored_bytes=3 * BLOCK)

    write(host, DATA, 3, block(40))
    write(host, DATA, 7, bytes(BLOCK))
    second, second_held = spec(place, "second", first), content(host, DATA)
    assert await backed_up(host, second, first) == BackupResult(base=first.id, stored_bytes=2 * BLOCK)

    write(host, DATA, 200, block(41))
    third, third_held = spec(place, "third", second), content(host, DATA)
    assert (await backed_up(host, third, second)).stored_bytes == BLOCK

    assert await restored(host, "r1", first) == first_held
    assert await restored(host, "r2", first, second) == second_held
    assert await restored(host, "r3", first, second, third) == third_held
    larger = await restored(host, "r4", first, second, size_mib=SIZE_MIB + 8)
    assert larger == second_held + bytes(8 << 20)
    files = {path.name for path in (host.settings.state_dir / "volumes").iterdir()}
    assert not any(name.startswith(".aside") for name in files)


async def test_backup_is_of_one_moment_while_a_writer_never_waits_for_it(place: Place) -> None:
    host = await served(place)
    for number in range(0, SIZE_MIB * 16, 8):
        write(host, DATA, number, block(number + 1))
    before = content(host, DATA)
    stop = threading.Event()
    waits: list[float] = []

    def writer() -> None:
        with door(host).client("data.e1") as client:
            number = 0
            while not stop.is_set():
                began = time.monotonic()
                client.write(number % (SIZE_MIB * 16) * BLOCK, block(number + 1000))
                waits.append(time.monotonic() - began)
                number += 1
                time.sleep(0.001)

    opened = asyncio.Event()
    loop = asyncio.get_running_loop()
    backup = spec(place, "moving")
    running = asyncio.create_task(
        host.storage.backup(
            DATA,
            backup,
            None,
            bytes_per_second=8 << 20,
            on_copied=lambda done, total: loop.call_soon_threadsafe(opened.set),
        )
    )
    await asyncio.wait_for(opened.wait(), 20)
    thread = threading.Thread(target=writer)
    thread.start()
    try:
        await running
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
    assert len(waits) > 20
    assert content(host, DATA) != before
    assert await restored(host, "same", backup) == before
    print(f"writes beside the backup: {len(waits)}, longest {1000 * max(waits):.1f} ms")


async def test_killed_backup_is_repeated_from_the_same_changes(place: Place) -> None:
    host = await served(place)
    write(host, DATA, 1, block(1))
    first = spec(place, "first")
    await backed_up(host, first)
    write(host, DATA, 5, block(5))
    held = content(host, DATA)
    second = spec(place, "second", first)
    for _ in range(2):  # the agent is killed twice in the middle of copying
        running = asyncio.create_task(
            host.storage.backup(
                DATA, second, first, bytes_per_second=1000, on_copied=lambda done, total: None
            )
        )
        point = f"data.past.{second.id}"
        async with asyncio.timeout(20):
            while point not in await host.storage.copies.backups.points.open_ones():
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await host.restart_drivers()
        write(host, DATA, 6, block(6))  # after the moment: not in it
    assert not (place.folder / "backups" / "second.json").exists(), "never marked as done"
    assert await backed_up(host, second, first) == BackupResult(base=first.id, stored_bytes=BLOCK)
    assert await restored(host, "r", first, second) == held
    third = spec(place, "third", second)
    assert (await backed_up(host, third, second)).stored_bytes == BLOCK, "what came after the moment"


async def test_cancelled_backup_loses_no_change(place: Place) -> None:
    host = await served(place)
    write(host, DATA, 1, block(1))
    first = spec(place, "first")
    await backed_up(host, first)
    write(host, DATA, 5, block(5))
    given_up = spec(place, "given-up", first)
    running = asyncio.create_task(
        host.storage.backup(DATA, given_up, first, bytes_per_second=1, on_copied=lambda done, total: None)
    )
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await host.storage.backup_forget(DATA, given_up)
    await host.storage.backup_forget(DATA, given_up)
    write(host, DATA, 6, block(6))
    second = spec(place, "second", first)
    assert await backed_up(host, second, first) == BackupResult(base=first.id, stored_bytes=2 * BLOCK)
    assert await restored(host, "r", first, second) == content(host, DATA)
    assert not list((place.folder / "backups").glob("given-up*"))


async def test_changes_lost_with_the_daemon_make_it_a_full_one_and_it_says_so(place: Place) -> None:
    host = await served(place)
    write(host, DATA, 1, block(1))
    first = spec(place, "first")
    await backed_up(host, first)
    write(host, DATA, 5, block(5))
    pid = await host.pid("qsd")
    os.kill(pid, 9)
    await host.until_pid("qsd", other_than=pid)
    second = spec(place, "second", first)
    result = await backed_up(host, second, first)
    assert result.base is None and result.stored_bytes == 2 * BLOCK
    assert "not known" in result.why_full
    assert await restored(host, "r", second) == content(host, DATA)
    elsewhere = spec(place, "elsewhere", first, target=str(place.folder / "nowhere"))
    gone = msgspec.structs.replace(first, target=str(place.folder / "nowhere"))
    assert "is not at" in (await backed_up(host, elsewhere, gone)).why_full


async def test_daemon_killed_in_the_middle_fails_the_backup_not_the_volume(place: Place) -> None:
    host = await served(place)
    for number in range(0, 512, 8):
        write(host, DATA, number, block(number + 1))
    backup = spec(place, "first")
    running = asyncio.create_task(
        host.storage.backup(DATA, backup, None, bytes_per_second=1 << 20, on_copied=lambda done, total: None)
    )
    await asyncio.sleep(0.7)
    pid = await host.pid("qsd")
    os.kill(pid, 9)
    with pytest.raises((Unavailable, Refused)):
        await running
    await host.until_pid("qsd", other_than=pid)
    assert not (place.folder / "backups" / "first.json").exists()
    write(host, DATA, 1, block(99))
    await backed_up(host, backup)
    assert await restored(host, "r", backup) == content(host, DATA)


async def test_to_and_from_any_nbd_server(place: Place) -> None:
    host = await served(place)
    store = await nbd_server(host, place, "store", ("one", "two", "small"))
    write(host, DATA, 1, block(1))
    first = spec(place, "first", target=f"{store}/one")
    await backed_up(host, first)
    first_held = content(host, DATA)
    write(host, DATA, 2, block(2))
    second = spec(place, "second", first, target=f"{store}/two")
    assert await backed_up(host, second, first) == BackupResult(base=first.id, stored_bytes=BLOCK)
    assert await restored(host, "r1", first) == first_held
    assert await restored(host, "r2", first, second) == content(host, DATA)
    with pytest.raises(Refused, match="are needed") as refusal:
        await backed_up(host, spec(place, "third", target=f"{store}/small"))
    assert refusal.value.field == "target"
    await host.storage.backup_forget(DATA, spec(place, "third", target=f"{store}/small"))
    with pytest.raises(Conflict):
        await backed_up(host, spec(place, "third", second, target=f"{store}/two"), second)
    await host.storage.backup_forget(DATA, spec(place, "third", target=f"{store}/two"))
    with pytest.raises(NotFound):
        await backed_up(host, spec(place, "third", target=f"{store}/none"))
    assert await restored(host, "r3", first, second) == content(host, DATA)


async def test_reader_of_ones_own_finds_the_moment_and_what_has_changed(place: Place) -> None:
    """The pull form: any NBD client with a host's credential, here nbdinfo and qemu-img."""
    host = await served(place)
    write(host, DATA, 0, block(1))
    first = spec(place, "first")
    await backed_up(host, first)
    write(host, DATA, 4, block(4))
    copies = host.storage.copies.backups
    point = await copies.open_point(newest(host), DATA, "mine", since=first.id)
    write(host, DATA, 0, block(9))
    assert point.changes is not None
    settings = host.settings
    uri = f"nbds://{settings.address}:{settings.nbd_port}/{point.export}?tls-certificates={settings.pki_dir}"
    said = await run("nbdinfo", f"--map={point.changes}", "--json", uri)
    dirty = [each for each in msgspec.json.decode(said) if each["type"] == 1]
    assert [(each["offset"], each["length"]) for each in dirty] == [(4 * BLOCK, BLOCK)]
    copied = place.folder / "pulled"
    await run("nbdcopy", uri, str(copied))
    pulled = copied.read_bytes()
    assert pulled[:BLOCK] == block(1) and pulled[4 * BLOCK : 5 * BLOCK] == block(4)
    await copies.close_point(DATA)
    with pytest.raises(subprocess.CalledProcessError):
        await run("nbdinfo", uri)
    assert content(host, DATA)[:BLOCK] == block(9)


async def test_wrong_chains_and_damage_are_refused(place: Place) -> None:
    host = await served(place)
    write(host, DATA, 1, block(1))
    first = spec(place, "first")
    await backed_up(host, first)
    write(host, DATA, 2, block(2))
    second = spec(place, "second", first)
    await backed_up(host, second, first)
    with pytest.raises(NotFound, match="first"):
        await restored(host, "gap", second)
    with pytest.raises(Refused, match="no whole backup"):
        await restored(host, "none", spec(place, "never"))
    with pytest.raises(Refused) as refusal:
        await restored(host, "little", first, size_mib=SIZE_MIB - 8)
    assert refusal.value.field == "size_mib"
    with (place.folder / "backups" / "first.data").open("r+b") as file:
        file.seek(BLOCK + 100)
        file.write(b"!")
    with pytest.raises(Refused, match="damaged"):
        await restored(host, "damaged", first, second)
    with pytest.raises(Conflict):
        await backed_up(host, msgspec.structs.replace(spec(place, "first"), created_at=1.0))
    with pytest.raises(Refused) as refusal:
        await backed_up(host, spec(place, "third", target="https://somewhere"))
    assert refusal.value.field == "target"


# --- around it ---------------------------------------------------------------------------------------


def newest(host: Host) -> Bundle:
    folders = host.settings.releases_dir.glob("qemu-*")
    return max((read_bundle(path) for path in folders), key=lambda each: each.version)


async def run(*words: str) -> bytes:
    return await asyncio.to_thread(
        lambda: subprocess.run(words, check=True, capture_output=True, timeout=30).stdout
    )


async def test_over_tls_only_the_right_server_and_its_clients_are_trusted(place: Place) -> None:
    host = await served(place)
    write(host, DATA, 1, block(3))
    pki = host.settings.pki_dir
    trusted = credentials(place.folder / "vault", host.settings.address, pki / CA_FILE)
    plain = await nbd_server(host, place, "store", ("backup",), tls=place.folder / "vault")
    address = f"{plain.replace('nbd:', 'nbds:')}/backup"

    async def refused(target: str, *words: str) -> None:
        with pytest.raises((Refused, Unavailable)) as refusal:
            await backed_up(host, spec(place, "b", target=target))
        assert any(word in str(refusal.value) for word in words), refusal.value

    await refused(address, "is not shown to be that by its certificate")  # nobody has vouched for it
    shutil.copyfile(trusted, pki / OUTSIDERS_CA_FILE)
    await refused(f"{plain}/backup", "TLS", "option")
    backup = spec(place, "b", target=address)
    assert (await backed_up(host, backup)).stored_bytes > 0
    assert (await restored(host, "again", backup))[BLOCK : 2 * BLOCK] == block(3)
    (pki / OUTSIDERS_CA_FILE).unlink()
    shutil.copyfile(
        credentials(place.folder / "other", host.settings.address, trusted), pki / OUTSIDERS_CA_FILE
    )
    await refused(address, "is not shown to be that by its certificate")  # another one vouches for others


async def test_a_server_without_tls_gets_nothing_where_tls_was_asked_for(place: Place) -> None:
    host = await served(place)
    plain = await nbd_server(host, place, "store", ("backup",))
    with pytest.raises((Refused, Unavailable)):
        await backed_up(host, spec(place, "b", target=f"{plain.replace('nbd:', 'nbds:')}/backup"))
    held = (place.folder / "store-backup").read_bytes()
    assert not any(held)


async def nbd_server(
    host: Host, place: Place, name: str, exports: tuple[str, ...], *, tls: Path | None = None
) -> str:
    """Somebody's; `tls`: the folder of its credentials. Without, it is a plain one."""
    bundle = newest(host)
    size = (SIZE_MIB << 20) + ROOM
    words, offered = list[str](), list[str]()
    secured = ""
    if tls is not None:
        words += ["--object", f"tls-creds-x509,id=tls,dir={tls},endpoint=server,verify-peer=yes"]
        secured = ",tls-creds=tls"
    for export in exports:
        file = place.folder / f"{name}-{export}"
        file.touch()
        os.truncate(file, size if export != "small" else size - BLOCK)
        words += ["--blockdev", f"driver=file,node-name={export},filename={file},discard=unmap"]
        offered += ["--export", f"type=nbd,id={export},node-name={export},name={export},writable=on"]
    unit = Unit(
        name=name,
        argv=(
            *bundle.storage_daemon(),
            *words,
            *("--nbd-server", f"addr.type=inet,addr.host={host.settings.address},addr.port=20000{secured}"),
            *offered,
        ),
        environment=bundle.environment,
        log=host.settings.state_dir / f"{name}.log",
    )
    await host.supervisor.start(unit)
    uri = f"nbd://{host.settings.address}:20000"
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection(host.settings.address, 20000)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return uri


def test_names_of_targets_cannot_leave_their_folder(tmp_path: Path) -> None:
    from nahtlos.physical.storage.backup_targets import FolderTarget

    with pytest.raises(Refused):
        FolderTarget(tmp_path, BackupId("../escape"))
