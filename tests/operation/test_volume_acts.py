"""Backups, restores and comparisons as an agent carries them out: repeated from the ledger after kill -9
between any two of its writes, undone once they are refused or cancelled, told with what came of them."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nahtlos.model.config import HostConfig, ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import BackupId, HostId, OperationId, ServerId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.nouns import HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import BackupSpec, Replica, VolumeSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal, Ledger, Role
from nahtlos.physical.agent.report import operation_status
from nahtlos.physical.agent.volumes import replicas, scrub, single
from nahtlos.physical.agent.volumes.freeze import owned
from nahtlos.physical.agent.volumes.peers import answer_volume, carry_out
from nahtlos.physical.agent.volumes.scrub import Scrub
from nahtlos.physical.agent.volumes.tasks import kind_of, task_for
from nahtlos.physical.ports import BackupResult, Crash
from nahtlos.wire.messages import Message
from nahtlos.wire.volumes import (
    BackupOrder,
    GuestFreeze,
    RestoreOrder,
    ScrubOrder,
    VolumeAttach,
    VolumeDigest,
    VolumeDigested,
    VolumeFreeze,
    VolumeMark,
    VolumeTask,
)

ME, OTHER, THIRD = HostId("host-1"), HostId("host-2"), HostId("host-3")
VOLUME = VolumeSpec(id=VolumeId("v"), size_mib=256, image=None, host=ME)
BASE = BackupSpec(id=BackupId("base"), volume=VOLUME.id, target="/srv")
BACKUP = BackupSpec(id=BackupId("next"), volume=VOLUME.id, target="/srv", base=BASE.id)
ID = OperationId("op-1")
SERVER = ServerSpec(
    id=ServerId("web"), size=Size(vcpus=1, memory_mib=128), volume=VOLUME.id, ports=(), machine="m"
)
AT_A, AT_B = (VolumeAttachment(volume=VOLUME.id, address=a, port=1, export="v.e1") for a in ("a", "b"))


class Store:
    """What a host's storage is asked, and what it says."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.trouble: list[Exception] = []
        self.holds = asyncio.Event()
        self.holds.set()

    async def _do(self, what: str) -> None:
        self.asked.append(what)
        await self.holds.wait()
        if self.trouble:
            raise self.trouble.pop(0)

    async def backup(self, *_: object, **more: Any) -> BackupResult:
        await self._do("backup")
        more["on_copied"](1, 2)
        return BackupResult(base=None, stored_bytes=7, why_full="nothing is known")

    async def backup_forget(self, *_: object) -> None:
        await self._do("forget")

    async def receive(self, *_: object) -> None:
        await self._do("receive")

    async def restore(self, *_: object, **__: object) -> None:
        await self._do("restore")

    async def reconcile(self, desired: Any) -> tuple[str, ...]:
        await self._do(f"remove {','.join(desired.removed)}")
        return ()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(scrub, "LOOK_AGAIN_SECONDS", 0.001)


def context(folder: Path, store: object, crash_at: int | None = None) -> Context:
    writes = 0

    def on_write(_: str) -> None:
        nonlocal writes
        writes += 1
        if writes == crash_at:
            raise Crash

    async def ask(body: Message, timeout: float) -> Message:
        raise Unavailable(f"no {body} within {timeout}")

    parts: dict[str, Any] = {
        "settings": SimpleNamespace(host=ME),
        "drivers": SimpleNamespace(storage=store),
        "ledger": Ledger(folder / "ledger.sqlite", on_write),
        "transport": None,
        "now": lambda: 1.0,
        "emit": lambda _: None,
        "changed": lambda: None,
        "on_bug": lambda _: None,
        "ask": ask,
    }
    return Context(**parts)


def begun(given: Context, order: VolumeTask) -> Journal:
    return given.ledger.begin(Journal(id=ID, kind=kind_of(order), role=Role.COORDINATOR, task=order))


def backup_order() -> BackupOrder:
    return BackupOrder(id=ID, coordinator=ME, volume=VOLUME, backup=BACKUP, base=BASE)


async def test_backup_tells_what_it_is(tmp_path: Path) -> None:
    given = context(tmp_path, Store())
    journal = await task_for(given, begun(given, backup_order())).run(recovering=False)
    assert journal.state is OperationState.DONE
    status = operation_status(given.ledger.operations()[0], "", 0.0)
    assert status.kind is OperationKind.BACKUP
    assert status.result == {"base": "", "stored_bytes": "7", "why_full": "nothing is known"}
    given.ledger.close()


@pytest.mark.parametrize("refused", [False, True])
async def test_agent_killed_at_any_write_goes_on_with_it(tmp_path: Path, refused: bool) -> None:
    """Both ways: what is done is done, what is undone is taken back, and nothing is both."""
    for crash_at in range(1, 20):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        store = Store()
        given = context(folder, store, crash_at)
        crashed = False
        if refused:
            store.trouble = [Refused("not so", field="target")]
        try:
            await task_for(given, begun(given, backup_order())).run(recovering=False)
        except Crash:
            crashed = True
        except BaseExceptionGroup as group:
            assert isinstance(group.exceptions[0], Crash)
            crashed = True
        given.ledger.close()
        if not crashed:
            assert crash_at > 4
            break
        again = context(folder, store)
        journal = again.ledger.operation(ID) or begun(again, backup_order())
        if journal.running:
            if refused and journal.step != "undo" and not store.trouble:
                store.trouble = [Refused("not so", field="target")]
            journal = await task_for(again, journal).run(recovering=True)
        assert journal.state is (OperationState.UNDONE if refused else OperationState.DONE)
        assert ("forget" in store.asked) is refused
        if refused:
            assert journal.error is not None and journal.error.field == "target"
        again.ledger.close()


async def test_what_is_not_available_is_tried_again_and_given_up_in_the_end(tmp_path: Path) -> None:
    store = Store()
    store.trouble = [Unavailable("later")] * 3
    given = context(tmp_path, store)
    journal = await task_for(given, begun(given, backup_order())).run(recovering=False)
    assert journal.state is OperationState.DONE and store.asked == ["backup"] * 4
    given.ledger.close()
    (tmp_path / "b").mkdir()
    store.asked, store.trouble = [], [Unavailable("later")] * single.ATTEMPTS + [Unavailable("not yet")]
    given = context(tmp_path / "b", store)
    journal = await task_for(given, begun(given, backup_order())).run(recovering=False)
    assert journal.state is OperationState.UNDONE
    assert store.asked == ["backup"] * single.ATTEMPTS + ["forget", "forget"]
    given.ledger.close()


async def test_cancelled_one_is_taken_back_and_a_done_one_is_not(tmp_path: Path) -> None:
    store = Store()
    store.holds.clear()
    given = context(tmp_path, store)
    task = task_for(given, begun(given, backup_order()))
    running = asyncio.create_task(task.run(recovering=False))
    while not store.asked:
        await asyncio.sleep(0)
    task.cancel()
    store.holds.set()
    journal = await running
    assert journal.state is OperationState.UNDONE and store.asked == ["backup", "forget"]
    assert journal.error is not None and "cancelled" in journal.error.message
    given.ledger.close()
    (tmp_path / "b").mkdir()
    given = context(tmp_path / "b", store)
    task = task_for(given, begun(given, backup_order()))
    await task.run(recovering=False)
    with pytest.raises(Conflict):
        task.cancel()
    given.ledger.close()


async def test_restore_that_is_refused_leaves_no_volume(tmp_path: Path) -> None:
    store = Store()
    given = context(tmp_path, store)
    given.ledger.accept(HostConfig(host=ME, generation=1, release=None))
    order = RestoreOrder(id=ID, coordinator=ME, volume=VOLUME, chain=(BASE, BACKUP))
    journal = begun(given, order)
    original = store.restore

    async def damaged(*_: object, **__: object) -> None:
        await original()
        raise Refused("damaged", field="backup")

    store.restore = damaged  # type: ignore[method-assign]
    journal = await task_for(given, journal).run(recovering=False)
    assert journal.state is OperationState.UNDONE
    assert store.asked == ["receive", "restore", f"remove {VOLUME.id}"]
    given.ledger.close()


# --- comparing copies --------------------------------------------------------------------------------


class Copy:
    """A copy as bytes of a MiB each; `writes`: changed at every look."""

    def __init__(self, **wrong: int) -> None:
        self.content = bytearray(256)
        for value, at in wrong.items():
            self.content[at] = len(value)
        self.flickering: int | None = None
        self.unreadable: int | None = None
        self.away = False
        self.marked = ""

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        if self.flickering is not None:
            self.content[self.flickering] = (self.content[self.flickering] + 1) % 200
        first, last = offset >> 20, (offset + length) >> 20
        if self.away or (self.unreadable is not None and first <= self.unreadable < last):
            raise Unavailable("the connection was lost")
        return bytes(self.content[first:last]) if length else b"nothing"

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        self.marked = f"{epoch} {problem}" if problem else ""


class Scrubbing(Scrub):
    """Its peers are copies in this process."""

    copies: dict[HostId, Copy]

    async def _ask(self, host: HostId, body: VolumeDigest) -> bytes:
        return await self.copies[host].digest(body.volume, body.offset, body.length)

    def _peer(self, host: HostId) -> Any:
        copy = self.copies[host]

        class Told:
            async def ask(self, body: VolumeMark, *_: object) -> None:
                await copy.mark(body.volume, body.epoch, body.problem)

        return Told()


async def scrubbed(folder: Path, copies: dict[HostId, Copy]) -> dict[str, str]:
    volume = VolumeSpec(
        id=VOLUME.id,
        size_mib=256,
        image=None,
        host=ME,
        replicas=tuple(Replica(host=host, epoch=3) for host in copies if host != ME),
    )
    given = context(folder, copies[ME])
    task = Scrubbing(given, begun(given, ScrubOrder(id=ID, coordinator=ME, volume=volume)))
    task.copies = copies
    journal = await task.run(recovering=False)
    given.ledger.close()
    assert journal.state is OperationState.DONE, journal.error
    return operation_status(journal, "", 0.0).result


async def test_equal_copies_are_found_equal(tmp_path: Path) -> None:
    assert (await scrubbed(tmp_path, {ME: Copy(), OTHER: Copy()}))["differences"] == "0"


async def test_differing_range_is_found_and_its_copy_marked(tmp_path: Path) -> None:
    copies = {ME: Copy(), OTHER: Copy(a=77), THIRD: Copy()}
    result = await scrubbed(tmp_path, copies)
    assert result == {
        "copies": "3",
        "compared_bytes": str(256 << 20),
        "differences": "1",
        "ranges": f"{77 << 20}+{1 << 20} on {OTHER}",
        "wrong": OTHER,
    }
    assert copies[OTHER].marked.startswith("3 1 ranges differ")
    assert not copies[ME].marked and not copies[THIRD].marked


async def test_the_home_is_marked_where_the_others_agree(tmp_path: Path) -> None:
    copies = {ME: Copy(a=5), OTHER: Copy(), THIRD: Copy()}
    assert (await scrubbed(tmp_path, copies))["differences"] == "1"
    assert copies[ME].marked.startswith("1 ")


async def test_a_single_copy_is_read(tmp_path: Path) -> None:
    copies = {ME: Copy()}
    copies[ME].unreadable = 9
    result = await scrubbed(tmp_path, copies)
    assert (result["copies"], result["ranges"]) == ("1", f"{9 << 20}+{1 << 20} on {ME}")
    assert "1 ranges cannot be read" in copies[ME].marked and "backup" in copies[ME].marked


async def test_what_cannot_be_read_is_wrong_whatever_the_others_say(tmp_path: Path) -> None:
    copies = {ME: Copy(), OTHER: Copy()}
    copies[ME].unreadable = 9
    assert (await scrubbed(tmp_path, copies))["wrong"] == ME, "although it is the first"
    assert not copies[OTHER].marked


async def test_copies_found_equal_are_marked_no_more(tmp_path: Path) -> None:
    copies = {ME: Copy(), OTHER: Copy()}
    copies[OTHER].marked = "3 it differed"
    assert (await scrubbed(tmp_path, copies))["differences"] == "0"
    assert not copies[OTHER].marked


async def test_a_host_that_is_away_is_no_difference(tmp_path: Path) -> None:
    copies = {ME: Copy(), OTHER: Copy()}
    copies[OTHER].away = True
    with pytest.raises(AssertionError, match="connection was lost"):
        await scrubbed(tmp_path, copies)
    assert not copies[OTHER].marked


async def test_what_is_written_meanwhile_is_no_difference(tmp_path: Path) -> None:
    copies = {ME: Copy(), OTHER: Copy()}
    copies[OTHER].flickering = 9
    assert (await scrubbed(tmp_path, copies))["differences"] == "0"
    assert not copies[OTHER].marked


async def test_other_hosts_are_answered_and_strangers_are_not(tmp_path: Path) -> None:
    copy = Copy(a=1)
    given = context(tmp_path, copy)
    ask = VolumeDigest(volume=VOLUME.id, offset=0, length=2 << 20)
    with pytest.raises(Refused):
        await answer_volume(given, ask, f"host/{OTHER}")
    other = HostSpec(id=OTHER, role=HostRole.COMPUTE, address="127.0.0.2", peer_port=1)
    given.ledger.accept(HostConfig(host=ME, generation=1, release=None, hosts=(other,)))
    assert await answer_volume(given, ask, f"host/{OTHER}") == VolumeDigested(sha256=b"\x00\x01")
    await answer_volume(given, VolumeMark(volume=VOLUME.id, epoch=2, problem="p"), f"host/{OTHER}")
    assert copy.marked == "2 p"
    given.ledger.close()


async def test_a_host_that_missed_where_its_server_went_does_not_act_for_it(tmp_path: Path) -> None:
    """It was cut off, and knows the server by an epoch that is over: what it would lead to a copy, or make
    stand still, is not what writes."""
    given = context(tmp_path, Store())
    held = ServerConfig(spec=SERVER, epoch=1, volume=AT_A)
    given.ledger.own(held)
    named: dict[str, Any] = {"id": ID, "server": SERVER.id, "epoch": 2}
    for late in (
        VolumeAttach(**named, attachment=AT_B),
        VolumeFreeze(**named, seconds=1.0),
        GuestFreeze(**named, seconds=1.0),
    ):
        with pytest.raises(Conflict) as refused:
            await carry_out(given, late)
        assert refused.value.field == "server"
    owner = given.ledger.owner(SERVER.id)
    assert owner is not None
    assert owner.server == held
    assert owned(given, SERVER.id, 1) == owner
    given.ledger.close()


async def test_a_copy_is_not_left_out_in_silence_where_it_was_lost_by_that_export(tmp_path: Path) -> None:
    """Whoever has it join would count it as written to, and the orchestrator as current."""
    given = context(tmp_path, Store())
    held = ServerConfig(spec=SERVER, epoch=1, volume=AT_A)
    given.ledger.own(held)
    own, coming = (VolumeEndpoint(host=h, address=h, port=1, export="v.e2") for h in (ME, OTHER))
    coming = msgspec.structs.replace(coming, joining=True)
    given.ledger.remember("lost", {f"{replicas.PREFIX}{replicas.place(coming)}": b""})
    both = replicas.reached_by_copies(AT_A, (own, coming))
    with pytest.raises(Refused) as refused:
        await carry_out(given, VolumeAttach(id=ID, server=SERVER.id, epoch=1, attachment=both))
    assert refused.value.field == replicas.LOST_BEFORE
    owner = given.ledger.owner(SERVER.id)
    assert owner is not None
    assert owner.server == held
    given.ledger.close()
