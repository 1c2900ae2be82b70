"""Volumes' keys: sealed on disk, given only to who holds a volume by them."""

from pathlib import Path

import pytest

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import HostId, KeyId, OperationId, SnapshotId, VolumeId
from nahtlos.model.storage import Replica, ReplicaState, SnapshotSpec, VolumeSpec
from nahtlos.model.volume_work import PlannedVolumeTask, Relocation, Restoring
from nahtlos.physical.agent.keyring import AskedKeyring
from nahtlos.runtime.controllers.keys import VolumeKeys, entitled
from nahtlos.runtime.identity.keyring import KEYRING_FILE, MASTER_FILE, Keyring
from nahtlos.runtime.store import volumes
from nahtlos.runtime.store.store import Store
from nahtlos.wire.messages import Message
from nahtlos.wire.volumes import KeyData, KeyRead

ONE, TWO = KeyId("one"), KeyId("two")
HOSTS = tuple(HostId(f"host-{number}") for number in range(5))


def test_secret_is_kept_sealed_and_read_by_another_process(tmp_path: Path) -> None:
    Keyring(tmp_path).create(ONE)
    secret = Keyring(tmp_path).secret(ONE)
    assert len(secret) == 32
    for name in (MASTER_FILE, KEYRING_FILE):
        path = tmp_path / name
        assert path.stat().st_mode & 0o777 == 0o600
        assert secret not in path.read_bytes() and secret.hex().encode() not in path.read_bytes()
    with pytest.raises(Conflict):
        Keyring(tmp_path).create(ONE)
    assert Keyring(tmp_path).secret(ONE) == secret


def test_rotation_keeps_secrets_and_forgets_the_old_master(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    for key in (ONE, TWO):
        keyring.create(key)
    before = {key: keyring.secret(key) for key in (ONE, TWO)}
    old = (tmp_path / MASTER_FILE).read_bytes()
    keyring.rotate()
    assert {key: keyring.secret(key) for key in (ONE, TWO)} == before
    (tmp_path / MASTER_FILE).write_bytes(old)
    with pytest.raises(Refused, match="unsealed"):
        keyring.secret(ONE)


def test_rotation_that_was_killed_leaves_everything_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = Keyring(tmp_path)
    keyring.create(ONE)
    before = keyring.secret(ONE)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_write", "_write_masters"):
        with monkeypatch.context() as patch:
            patch.setattr(Keyring, step, killed)
            with pytest.raises(KeyboardInterrupt):
                keyring.rotate()
        assert keyring.secret(ONE) == before
    keyring.rotate()
    assert keyring.secret(ONE) == before


def test_entry_cannot_take_the_place_of_another(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    for key in (ONE, TWO):
        keyring.create(key)
    path = tmp_path / KEYRING_FILE
    text = path.read_text().replace('"one"', '"x"').replace('"two"', '"one"').replace('"x"', '"two"')
    path.write_text(text)
    with pytest.raises(Refused, match="unsealed"):
        keyring.secret(ONE)


def test_destroyed_key_is_gone(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    keyring.create(ONE)
    keyring.destroy(ONE)
    keyring.destroy(ONE)
    assert keyring.names() == ()
    with pytest.raises(NotFound):
        keyring.secret(ONE)
    with pytest.raises(Refused):
        keyring.create(KeyId("../escape"))


def volume(name: str, key: KeyId | None) -> VolumeSpec:
    stale = Replica(host=HOSTS[1], state=ReplicaState.STALE)
    return VolumeSpec(
        id=VolumeId(name), size_mib=8, image=None, host=HOSTS[0], replicas=(stale,), encryption_key=key
    )


def task(work: Relocation | Restoring, *hosts: HostId) -> PlannedVolumeTask:
    return PlannedVolumeTask(id=OperationId("op-1"), work=work, coordinator=hosts[0], hosts=hosts)


def test_key_goes_to_holders_and_to_who_shall_hold() -> None:
    known = {v.id: v for v in (volume("a", ONE), volume("b", None))}
    assert entitled(ONE, known, ()) == {HOSTS[0], HOSTS[1]}
    assert entitled(TWO, known, ()) == frozenset()
    moving = task(Relocation(volume=VolumeId("a")), HOSTS[0], HOSTS[2])
    assert entitled(ONE, known, (moving,)) == {HOSTS[0], HOSTS[1], HOSTS[2]}
    other = task(Relocation(volume=VolumeId("b")), HOSTS[3])
    assert HOSTS[3] not in entitled(ONE, known, (other,))
    kept = SnapshotSpec(id=SnapshotId("s"), volume=VolumeId("a"), hosts=(HOSTS[3],))
    assert entitled(ONE, known, (), (kept,)) == {HOSTS[0], HOSTS[1], HOSTS[3]}
    restored = task(Restoring(volume=volume("c", TWO), chain=()), HOSTS[4])
    assert entitled(TWO, known, (restored,)) == {HOSTS[4]}


async def test_host_is_answered_by_what_the_store_says(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    keyring.create(ONE)
    store = await Store.open(None)
    keys = VolumeKeys(store, keyring)
    async with store.writing() as tx:
        await volumes.add(tx, volume("a", ONE))
    assert await keys.secret_for(HOSTS[0], ONE) == keyring.secret(ONE)
    for host, key in ((HOSTS[4], ONE), (HOSTS[0], TWO)):
        with pytest.raises(Refused, match="holds no volume") as refusal:
            await keys.secret_for(host, key)
        assert refusal.value.field == "key"
    await store.close()


async def test_agent_asks_whoever_is_there(tmp_path: Path) -> None:
    ring = AskedKeyring()
    with pytest.raises(Unavailable):
        await ring.key(ONE)

    async def answer(body: Message, timeout: float) -> Message:
        assert body == KeyRead(key=ONE) and timeout > 0
        return KeyData(secret=b"s")

    ring.ask = answer
    assert await ring.key(ONE) == b"s"
