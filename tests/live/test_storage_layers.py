"""Snapshots, clones, resize, deletion and the daemon's replacement on a real storage daemon, under a writer
that checks what it was told, with the agent or the daemon killed between any two steps."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, cast

import msgspec
import pytest
from nbd_writer import BLOCK, Disk, Writer, block, stand_in
from physical_host import RELEASES, Host, Place, release, volume_on
from small_pool import POOL_MIB, fill, pool, with_small_pool, without_pool

from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.storage import Deletion, DiskBudget, DiskLimits, SnapshotSpec, VolumeFormat, VolumeSpec
from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.ports import Crash, StorageDesired
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.images import image_tool
from nahtlos.physical.storage.record import LayerRef, RecordMap, active_chain, chain
from nahtlos.physical.storage.sockets import peers

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
DATA = VolumeId("data")


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("lay")
    try:
        yield place
    finally:
        for scene in Scene.begun:
            scene.writer.ends.set()
        await place.close()
        for scene in Scene.begun:
            await asyncio.to_thread(scene.writer.join)
            scene.writer.disk.close()
        Scene.begun.clear()


class Scene:
    """A host with one volume and a writer on it."""

    begun: ClassVar[list["Scene"]] = []

    def __init__(self, host: Host, **spec: object) -> None:
        self.host = host
        self.spec: VolumeSpec = msgspec.structs.replace(
            volume_on(host, DATA, empty=True, size_mib=256), **spec
        )
        self.writer: Writer

    async def begin(self) -> None:
        await self.host.storage.reconcile(StorageDesired(volumes=(self.spec,)))
        disk = await asyncio.to_thread(Disk, await stand_in(self.host, f"{DATA}.e1"))
        self.writer = Writer(disk, flush_every=0, pause=0.002)
        self.begun.append(self)
        self.writer.start()
        await self.written(20)

    async def written(self, more: int) -> None:
        until = self.writer.acknowledged + more
        async with asyncio.timeout(30):
            while self.writer.acknowledged < until:
                await asyncio.sleep(0.005)

    async def end(self) -> None:
        """Every acknowledged block is there, seen by the client and by a daemon that was started anew."""
        self.writer.ends.set()
        await asyncio.to_thread(self.writer.join)
        assert not self.writer.failed
        assert await asyncio.to_thread(self.writer.wrong) == []
        pid = await self.host.pid("qsd")
        os.kill(pid, 9)
        await self.host.until_pid("qsd", other_than=pid)
        assert await asyncio.to_thread(self.writer.wrong) == []
        self.writer.disk.close()

    @property
    def records(self) -> RecordMap:
        return self.host.storage.serving.records.all()

    @property
    def files(self) -> list[str]:
        folder = self.host.settings.state_dir / "volumes"
        return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".json"))

    async def reconcile(self, *, without: tuple[str, ...] = (), **desired: object) -> tuple[str, ...]:
        snapshots = tuple(SnapshotId(name) for name in without)
        base = StorageDesired(volumes=(self.spec,), removed_snapshots=snapshots)
        return await self.host.storage.reconcile(msgspec.structs.replace(base, **desired))

    async def settled(self, *, without: tuple[str, ...] = ()) -> None:
        """Until nothing is left to do."""
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.reconcile(without=without)
                except Unavailable:  # a daemon that was killed took a job with it
                    continue
                if not any(self.host.storage.merging.is_due(volume) for volume in self.records):
                    return

    async def interrupted(self, step: str, who: str, act: Callable[[], Awaitable[object]]) -> bool:
        """Do it, with the agent, the daemon or both killed at `step`; whether it came to that. Then a new
        agent comes, or the old one goes on."""
        met = asyncio.Event()
        pid = await self.host.pid("qsd")

        async def on_step(at: str) -> None:
            if at == step and not met.is_set():
                met.set()
                if who in ("daemon", "both"):
                    with suppress(ProcessLookupError):  # it has been ended by what is done
                        os.kill(pid, 9)
                    await self.host.until_pid("qsd", other_than=pid)
                if who in ("agent", "both"):
                    raise Crash(step)

        self.host.storage.serving.on_step = on_step
        try:
            await act()
        except Crash:
            await self.host.restart_drivers()
        except Unavailable:
            assert who == "daemon", "only a daemon that is gone makes it unavailable"
        return met.is_set()

    async def frozen(self, snapshot: str) -> int:
        """How many blocks of the writer a snapshot holds: all up to one, and none after it."""
        ref = decisions.snapshot_layer(self.records, SnapshotId(snapshot))
        content = await read_chain(self.host, chain(self.records, ref))
        count = next(n for n in range(len(content) // BLOCK) if at(content, n) != block(n))
        assert is_blank(content, count + 1), "the write under way may be in it, nothing later"
        return count


def at(content: bytes, number: int) -> bytes:
    return content[number * BLOCK : (number + 1) * BLOCK]


def is_blank(content: bytes, number: int) -> bool:
    """From this block on."""
    return content.count(0, number * BLOCK) == len(content) - number * BLOCK


async def read_chain(host: Host, refs: tuple[LayerRef, ...]) -> bytes:
    """By another program than the daemon, from the files alone."""
    records, node = host.storage.serving.records.all(), dict[str, object]()
    for ref in refs:
        layer = records[ref.volume].layer(ref.number)
        file = {"driver": "file", "filename": str(host.settings.state_dir / "volumes" / layer.file)}
        form = {"driver": layer.format.value, "file": file}
        node = {**form, "backing": node or None} if layer.format is VolumeFormat.QCOW2 else form
    bundle = read_bundle(RELEASES / release("11.1"))
    target = host.settings.run_dir / "read.raw"
    source = "json:" + msgspec.json.encode(node).decode()
    process = await asyncio.create_subprocess_exec(
        *image_tool(bundle), "convert", "-U", "-O", "raw", source, str(target), env=bundle.environment
    )
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    return target.read_bytes()


def snapshot(name: str, volume: VolumeId = DATA) -> SnapshotSpec:
    return SnapshotSpec(id=SnapshotId(name), volume=volume)


KILLED = ("agent", "daemon", "both")


def cases(*steps: str) -> list[tuple[str, str]]:
    """Each step with one that is killed there; all with all if asked for."""
    if os.environ.get("NAHTLOS_ALL_CASES"):
        return [(step, who) for step in steps for who in KILLED]
    return [(step, KILLED[number % 3]) for number, step in enumerate(steps)]


SNAPSHOT_STEPS = ("snapshot.made", "snapshot.recorded", "snapshot.defined", "snapshot.taken")


async def test_snapshots_are_whole_or_not_there_whoever_is_killed_between_two_steps(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    held: dict[str, tuple[int, int]] = {}
    for step, who in cases(*SNAPSHOT_STEPS):
        name = f"{step.partition('.')[2]}-{who}"
        before = scene.writer.acknowledged
        wanted = (snapshot(name),)
        assert await scene.interrupted(
            "snapshot.prepared", who, lambda s=wanted: scene.host.storage.snapshot_prepare(s)
        )
        if who != "agent":
            await scene.host.storage.snapshot_prepare(wanted)
        assert await scene.interrupted(step, who, lambda s=wanted: scene.host.storage.snapshot(s))
        await scene.reconcile()
        taken = {each.id for each in await scene.host.storage.snapshots()}
        assert (name in taken) or step == "snapshot.made"
        await scene.host.storage.snapshot(wanted)
        held[name] = (before, scene.writer.acknowledged)
        await scene.written(5)
    assert {each.id for each in await scene.host.storage.snapshots()} == held.keys()
    for name, (before, after) in held.items():
        assert before <= await scene.frozen(name) <= after + 1
    await scene.end()


MERGE_STEPS = ("snapshot.removed", "merge.recorded", "merge.started", "merge.copied", "merge.ended")


async def test_snapshots_go_in_any_order_whoever_is_killed_between_two_steps(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    rounds = cases(*MERGE_STEPS)
    for number in range(len(rounds) + 2):
        await scene.host.storage.snapshot((snapshot(f"s{number}"),))
        await scene.written(2)
    last = f"s{len(rounds) + 1}"
    holds = await scene.frozen(last)
    order = sorted(range(len(rounds)), key=lambda n: hashlib.sha256(bytes([n])).digest())
    for number, (step, who) in zip(order, rounds, strict=True):
        name = f"s{number}"
        assert await scene.interrupted(step, who, lambda n=name: scene.reconcile(without=(n,)))
        await scene.settled(without=(name,))
        assert name not in {each.id for each in await scene.host.storage.snapshots()}
    assert await scene.frozen(last) == holds
    await scene.settled(without=(f"s{len(rounds)}", last))
    assert scene.files == ["data.raw"], "it rests on its raw base again"
    await scene.end()


PIVOT_STEPS = (
    *("merge.recorded", "pivot.started", "pivot.alike", "pivot.recorded", "pivot.defined"),
    *("pivot.done", "pivot.ended"),
)


async def test_the_raw_base_takes_up_what_was_written_since(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    for step, who in cases(*PIVOT_STEPS):
        await scene.host.storage.snapshot((snapshot("s"),))
        await scene.written(10)
        assert await scene.interrupted(step, who, lambda: scene.reconcile(without=("s",)))
        await scene.settled(without=("s",))
        assert scene.files == ["data.raw"]
        exports = await scene.host.storage.daemon.exports()
        assert not exports[DATA].writethrough
        await scene.written(5)
    await scene.end()


async def test_a_group_is_of_one_moment_and_all_or_none(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    other = volume_on(scene.host, "other", empty=True, size_mib=16)
    await scene.reconcile(volumes=(scene.spec, other))
    group = (snapshot("a"), snapshot("b", other.id))
    await scene.interrupted("snapshot.made", "both", lambda: scene.host.storage.snapshot(group))
    await scene.reconcile(volumes=(scene.spec, other))
    assert await scene.host.storage.snapshots() == ()
    assert scene.files == ["data.raw", "other.raw"], "what was half made is swept"
    await scene.interrupted("snapshot.recorded", "both", lambda: scene.host.storage.snapshot(group))
    await scene.reconcile(volumes=(scene.spec, other))
    assert {each.id for each in await scene.host.storage.snapshots()} == {"a", "b"}
    with pytest.raises(Refused, match="not on this host"):
        await scene.host.storage.snapshot((snapshot("c"), snapshot("d", VolumeId("nowhere"))))
    assert {each.id for each in await scene.host.storage.snapshots()} == {"a", "b"}
    await scene.end()


async def test_clones_stay_valid_while_their_origin_changes(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    for name in ("s1", "s2"):
        await scene.host.storage.snapshot((snapshot(name),))
        await scene.written(10)
    holds = await scene.frozen("s2")
    clone = msgspec.structs.replace(scene.spec, id=VolumeId("clone"), snapshot=SnapshotId("s2"))
    await scene.reconcile(volumes=(scene.spec, clone))
    disk = await asyncio.to_thread(Disk, await stand_in(scene.host, "clone.e1", name="clone"))
    disk.write(0, block(99))
    with pytest.raises(Conflict, match="clone rests on") as refusal:
        await scene.reconcile(without=("s2",))
    assert refusal.value.field == "snapshot"
    with pytest.raises(Conflict, match="has snapshots: s1, s2"):
        await scene.host.storage.reconcile(StorageDesired(removed=(DATA,)))
    await scene.settled(without=("s1",))  # what the clone rests on goes into the layer below
    assert disk.read(0) == block(99)
    assert [disk.read(n) for n in range(1, holds)] == [block(n) for n in range(1, holds)]
    disk.close()
    (status,) = [each for each in await scene.host.storage.snapshots() if each.id == "s2"]
    assert status.clones == ("clone",)
    await scene.reconcile(removed_snapshots=(SnapshotId("s2"),), removed=(clone.id,))
    await scene.settled()
    assert scene.files == ["data.raw"]
    await scene.end()


REVERT_STEPS = ("revert.shut", "revert.withdrawn", "revert.made", "revert.recorded", "revert.defined")


async def test_a_volume_goes_back_to_a_snapshot_and_all_snapshots_stay(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    counts: dict[str, int] = {}
    for name in ("s1", "s2"):
        await scene.host.storage.snapshot((snapshot(name),))
        counts[name] = await scene.frozen(name)
        await scene.written(10)
    with pytest.raises(Conflict, match="in use") as refusal:
        await scene.host.storage.revert(scene.spec, SnapshotId("s1"))
    assert refusal.value.field == "volume"
    await scene.end()
    await scene.host.supervisor.stop("client", grace=0)
    for number, (step, who) in enumerate(cases(*REVERT_STEPS)):
        target = SnapshotId("s1" if number % 2 else "s2")
        act = scene.host.storage
        assert await scene.interrupted(step, who, lambda t=target, a=act: a.revert(scene.spec, t))
        await scene.reconcile()
        await scene.host.storage.revert(scene.spec, target)
        content = await read_chain(scene.host, active_chain(scene.records, DATA))
        assert is_blank(content, counts[target] + 1)
        assert content[: BLOCK * counts[target]] == b"".join(block(n) for n in range(counts[target]))
    assert {each.id for each in await scene.host.storage.snapshots()} == {"s1", "s2"}
    assert await scene.frozen("s2") == counts["s2"]


async def test_a_qcow2_volume_forgets_nothing_and_its_layers_merge(place: Place) -> None:
    scene = Scene(place.host("host-1"), format=VolumeFormat.QCOW2, preallocated=True)
    await scene.begin()
    for number in range(4):
        await scene.host.storage.snapshot((snapshot(f"s{number}"),))
        await scene.written(5)
        pid = await scene.host.pid("qsd")
        os.kill(pid, 9)
        await scene.host.until_pid("qsd", other_than=pid)
    exports = await scene.host.storage.daemon.exports()
    assert exports[DATA].writethrough
    await scene.settled(without=tuple(f"s{number}" for number in range(4)))
    assert len(scene.files) == 2, "its base, and the layer that is written into"
    await scene.end()


@pytest.mark.parametrize("form", (VolumeFormat.RAW, VolumeFormat.QCOW2))
async def test_a_volume_is_enlarged_while_it_is_written_and_never_becomes_smaller(
    place: Place, form: VolumeFormat
) -> None:
    scene = Scene(place.host("host-1"), format=form)
    await scene.begin()
    size = scene.spec.size_mib
    for step, who in cases("resize.begins", "resize.grown", "resize.done"):
        size += 1
        scene.spec = msgspec.structs.replace(scene.spec, size_mib=size)
        assert await scene.interrupted(step, who, scene.reconcile)
        await scene.reconcile()
        (status,) = await scene.host.storage.observe()
        assert (status.size_mib, status.served) == (size, True)
        image = (await scene.host.storage.daemon.images())[graph.top_node(DATA)]["image"]
        assert cast("dict[str, int]", image)["virtual-size"] == size << 20
        assert await scene.host.storage.daemon.unflushed() == frozenset()
    file = scene.host.storage.serving.file_node(LayerRef(DATA, 0))
    left = {"options": [{**file, "cache": {"no-flush": True}}]}
    await scene.host.storage.daemon.execute("blockdev-reopen", left)
    await scene.host.restart_drivers()
    await scene.reconcile()
    assert await scene.host.storage.daemon.unflushed() == frozenset(), "as an agent that ended has left it"
    scene.spec = msgspec.structs.replace(scene.spec, size_mib=8)
    with pytest.raises(Refused) as refusal:
        await scene.reconcile()
    assert refusal.value.field == "size_mib"
    await scene.end()


async def test_daemon_is_replaced_under_its_clients_and_taken_back(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    old, new = release("10.0"), release("11.1")
    await scene.reconcile(release=old)
    await scene.begin()
    steps = ("upgrade.tried", "upgrade.recorded", "upgrade.defined", "upgrade.ended")
    for number, (step, who) in enumerate(cases(*steps)):
        wanted = old if number % 2 else new
        assert await scene.interrupted(step, who, lambda r=wanted: scene.reconcile(release=r))
        await scene.reconcile(release=wanted)
        assert await runs_by(scene.host, wanted)
        assert await scene.host.storage.release() == wanted
        assert await scene.reconcile(release=wanted) == ()
        await scene.written(10)
    await scene.end()


async def runs_by(host: Host, wanted: ReleaseId) -> bool:
    return wanted in Path(f"/proc/{await host.pid('qsd')}/cmdline").read_text()


async def test_a_release_that_does_not_serve_leaves_the_old_one_serving(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(place.host("host-1"))
    old, new = release("10.0"), release("11.1")
    await scene.reconcile(release=old)
    await scene.begin()
    # It starts without volumes, and never with them.
    bundles = scene.host.storage.releases.bundles
    sound = bundles.checked

    async def checked(wanted: ReleaseId) -> object:
        bundle = await sound(wanted)
        broken = msgspec.structs.replace(bundle.manifest, storage_daemon=bundle.manifest.image_tool)
        return msgspec.structs.replace(bundle, manifest=broken) if wanted == new else bundle

    monkeypatch.setattr(bundles, "checked", checked)
    with pytest.raises(Refused, match="does not serve here") as refusal:
        await scene.reconcile(release=new)
    assert refusal.value.field == "storage_release"
    assert await runs_by(scene.host, old), "not even tried on the volumes"

    async def seems_fine(_bundle: object) -> None:
        return

    monkeypatch.setattr(scene.host.storage.releases, "tried", seems_fine)
    with pytest.raises(Refused, match="does not serve here"):
        await scene.reconcile(release=new)
    assert await runs_by(scene.host, old)
    assert await scene.host.storage.release() == old
    with pytest.raises(Refused):  # remembered, its clients are not disturbed again
        await scene.reconcile(release=new)
    await scene.reconcile(release=old)
    await scene.written(10)
    await scene.end()


async def test_one_broken_image_keeps_no_other_from_being_served(place: Place) -> None:
    scene = Scene(place.host("host-1"))
    await scene.begin()
    broken = msgspec.structs.replace(scene.spec, id=VolumeId("broken"), format=VolumeFormat.QCOW2)
    await scene.reconcile(volumes=(scene.spec, broken))
    path = scene.host.settings.state_dir / "volumes" / "broken.qcow2"
    header = path.read_bytes()[:512]
    with path.open("r+b") as file:
        file.write(b"nonsense")
    pid = await scene.host.pid("qsd")
    os.kill(pid, 9)
    await scene.host.restart_drivers()
    await scene.reconcile(volumes=(scene.spec, broken))
    statuses = {status.id: status for status in await scene.host.storage.observe()}
    assert statuses[DATA].served
    assert not statuses[broken.id].served
    assert "qcow2" in statuses[broken.id].problem
    with path.open("r+b") as file:
        file.write(header)
    await scene.reconcile(volumes=(scene.spec, broken))
    statuses = {status.id: status for status in await scene.host.storage.observe()}
    assert statuses[broken.id].served
    assert statuses[broken.id].problem == ""
    await scene.end()


async def test_a_corrupted_image_is_said_to_be(place: Place) -> None:
    host = place.host("host-1")
    spec = msgspec.structs.replace(volume_on(host, "q", empty=True, size_mib=64), format=VolumeFormat.QCOW2)
    await host.storage.reconcile(StorageDesired(volumes=(spec,)))
    disk = await asyncio.to_thread(Disk, await stand_in(host, "q.e1"))
    disk.write(0, block(0))
    path = host.settings.state_dir / "volumes" / "q.qcow2"
    with path.open("r+b") as file:  # its first table of data now says: in the middle of a cluster
        file.seek(40)
        first = int.from_bytes(file.read(8), "big")
        file.seek(first)
        second = int.from_bytes(file.read(8), "big") & ((1 << 56) - 512)
        file.seek(second)
        file.write((0x8000000000000200).to_bytes(8, "big"))
    pid = await host.pid("qsd")
    os.kill(pid, 9)
    await host.until_pid("qsd", other_than=pid)
    with pytest.raises((AssertionError, OSError)):
        disk.write(0, block(1))
    disk.close()
    (status,) = await host.storage.observe()
    assert "corrupted" in status.problem


async def test_after_a_restart_of_the_host_a_raw_volume_is_not_served_by_the_same_epoch(place: Place) -> None:
    host = place.host("host-1")
    raw = volume_on(host, "raw", empty=True, size_mib=8)
    through = msgspec.structs.replace(raw, id=VolumeId("q"), format=VolumeFormat.QCOW2)
    await host.storage.reconcile(StorageDesired(volumes=(raw, through)))
    await host.supervisor.stop("qsd", grace=0)
    await host.restart_drivers()
    host.storage.serving.boot_id = "another"
    with pytest.raises(Unavailable) as refusal:
        await host.storage.reconcile(StorageDesired(volumes=(raw, through)))
    assert refusal.value.field == "epoch"
    statuses = {status.id: status for status in await host.storage.observe()}
    assert statuses[through.id].served, "every write of it was on disk when it was acknowledged"
    assert (statuses[raw.id].served, statuses[raw.id].spent_epoch) == (False, 1)
    raw = msgspec.structs.replace(raw, epoch=2)
    await host.storage.reconcile(StorageDesired(volumes=(raw, through)))
    statuses = {status.id: status for status in await host.storage.observe()}
    assert (statuses[raw.id].served, statuses[raw.id].spent_epoch) == (True, 0)


async def test_deletion_overwrites_and_goes_on_after_a_kill(place: Place) -> None:
    scene = Scene(place.host("host-1"), deletion=Deletion.ZERO)
    await scene.begin()
    await scene.end()
    for step in ("delete.recorded", "delete.defined", "delete.withdrawn", "delete.dropped"):
        gone = StorageDesired(removed=(DATA,))
        assert await scene.interrupted(step, "agent", lambda d=gone: scene.host.storage.reconcile(d))
        await scene.host.storage.reconcile(gone)
        assert await scene.host.storage.observe() == ()
        assert DATA not in scene.records
        async with asyncio.timeout(10):
            while scene.files:
                await asyncio.sleep(0.01)
        await scene.reconcile()


async def test_a_full_pool_leaves_nothing_half_made(place: Place) -> None:
    host = place.host("host-1")
    with_small_pool(host)
    try:
        await _refused_until_there_is_room(host)
    finally:
        without_pool(host)


async def _refused_until_there_is_room(host: Host) -> None:
    one, other = (volume_on(host, name, empty=True, size_mib=16) for name in (DATA, "other"))
    image, storage = volume_on(host, "image"), host.storage
    await storage.reconcile(StorageDesired(volumes=(one, other)))
    ballast = fill(host, 0)
    before = sorted(path.name for path in pool(host).iterdir())
    both = (snapshot("a"), snapshot("b", other.id))

    async def refused(asked: Awaitable[object]) -> None:
        with pytest.raises(Unavailable) as refusal:
            await asked
        assert (refusal.value.field, refusal.value.remedy != "") == ("pool", True), refusal.value
        assert sorted(path.name for path in pool(host).iterdir()) == before

    await refused(storage.snapshot(both))
    assert await storage.snapshots() == ()
    await refused(storage.reconcile(StorageDesired(volumes=(one, other, image))))
    assert {each.id for each in await storage.observe()} == {one.id, other.id}
    known = await storage.pool()
    assert known is not None
    assert (known.free, known.total) == (0, POOL_MIB << 20)
    ballast.unlink()
    await storage.snapshot(both)
    await storage.reconcile(StorageDesired(volumes=(one, other, image)))
    assert {each.id for each in await storage.snapshots()} == {"a", "b"}
    assert {each.id for each in await storage.observe()} == {one.id, other.id, image.id}


async def test_tenants_take_turns_within_the_hosts_budget_which_changes_live(place: Place) -> None:
    host = place.host("host-1")
    specs = [volume_on(host, name, empty=True, size_mib=64) for name in ("one", "two")]
    slow = DiskBudget(tenants=DiskLimits(iops=60))
    await host.storage.reconcile(StorageDesired(volumes=tuple(specs), budget=slow))
    doors = [await stand_in(host, spec.export, name=spec.id) for spec in specs]
    writers = [Writer(await asyncio.to_thread(Disk, door), flush_every=0) for door in doors]
    for writer in writers:
        writer.start()
    await asyncio.sleep(0.5)
    before = [writer.acknowledged for writer in writers]
    await asyncio.sleep(2.0)
    shares = [writer.acknowledged - b for writer, b in zip(writers, before, strict=True)]
    assert 90 <= sum(shares) <= 140
    assert max(shares) <= 1.2 * min(shares)
    await host.storage.reconcile(StorageDesired(volumes=tuple(specs), budget=DiskBudget()))
    before = [writer.acknowledged for writer in writers]
    await asyncio.sleep(1.0)
    assert sum(w.acknowledged - b for w, b in zip(writers, before, strict=True)) > 2 * sum(shares)
    for writer in writers:
        writer.ends.set()
        await asyncio.to_thread(writer.join)
        assert writer.wrong() == []
        writer.disk.close()


async def test_a_raw_file_without_a_record_is_a_volume(place: Place) -> None:
    """Of a time when volumes had none."""
    host = place.host("host-1")
    folder = host.settings.state_dir / "volumes"
    folder.mkdir(parents=True)
    (folder / "old.raw").write_bytes(block(0) + bytes((8 << 20) - BLOCK))
    spec = volume_on(host, "old", empty=True, size_mib=8, epoch=7)
    await host.storage.reconcile(StorageDesired(volumes=(spec,)))
    disk = await asyncio.to_thread(Disk, await stand_in(host, "old.e7"))
    assert disk.read(0) == block(0)
    assert disk.read(1) == bytes(BLOCK)
    disk.close()
    assert len(peers(await host.pid("qsd"))) == 1
