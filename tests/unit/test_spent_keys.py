"""Which keys of deleted volumes and backups nothing needs any more, and that those alone are destroyed."""

from pathlib import Path

from nahtlos.model.ids import BackupId, HostId, KeyId, VolumeId
from nahtlos.model.storage import BackupSpec, VolumeSpec
from nahtlos.model.volume_work import BackingUp, Restoring
from nahtlos.runtime.controllers.keys import VolumeKeys, needed
from nahtlos.runtime.identity import Keyring
from nahtlos.runtime.store import intent, volumes
from nahtlos.runtime.store.store import Store

ONE, TWO, UNKNOWN = KeyId("volume-one"), KeyId("volume-two"), KeyId("volume-unknown")


def volume(name: str, key: KeyId | None) -> VolumeSpec:
    return VolumeSpec(id=VolumeId(name), size_mib=8, image=None, host=HostId("host-1"), encryption_key=key)


def backup(name: str, key: KeyId | None) -> BackupSpec:
    return BackupSpec(id=BackupId(name), volume=VolumeId("a"), target="/srv", encryption_key=key)


def test_what_needs_a_key() -> None:
    assert needed((volume("a", ONE), volume("b", None)), (), ()) == {ONE}
    assert needed((), (backup("x", TWO),), ()) == {TWO}
    assert needed((), (), (Restoring(volume=volume("c", ONE), chain=(backup("x", TWO),)),)) == {ONE, TWO}
    assert needed((), (), (BackingUp(backup=backup("x", TWO)),)) == {TWO}


async def test_a_key_goes_with_the_last_that_needs_it(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path)
    for key in (ONE, TWO, UNKNOWN):
        keyring.create(key)
    store = await Store.open(None)
    keys = VolumeKeys(store, keyring)

    async def destroyed() -> tuple[KeyId, ...]:
        async with store.writing() as tx:
            return await keys.destroy_spent(tx)

    async with store.writing() as tx:
        await volumes.add(tx, volume("a", ONE))
        await volumes.add(tx, volume("clone", ONE))
        await volumes.add_backup(tx, backup("x", TWO))
    assert await destroyed() == ()
    async with store.writing() as tx:
        await volumes.mark_removed(tx, VolumeId("a"))
        await intent.forget_volume(tx, VolumeId("clone"))
    assert await destroyed() == (), "its host may still have it"
    async with store.writing() as tx:
        await intent.forget_volume(tx, VolumeId("a"))
        await volumes.add_wish(tx, Restoring(volume=volume("c", TWO), chain=(backup("x", TWO),)), 1.0)
        await volumes.forget_backup(tx, BackupId("x"))
    assert await destroyed() == (ONE,)
    async with store.writing() as tx:
        await volumes.forget_wish(tx, "wish-1")
    assert await destroyed() == (TWO,)
    assert keyring.names() == (UNKNOWN,), "that nothing is known of it is no reason"
    await store.close()
