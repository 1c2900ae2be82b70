"""Keys of volumes and backups that are no more. Written in the transaction that forgets these, so that a key
is destroyed because something was deleted, and never because nothing is known of it: a database that was put
back from an older copy knows less than there is.
"""

from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import KeyId
from nahtlos.model.values import Value
from nahtlos.runtime.store.remembered import remembered
from nahtlos.runtime.store.settings import set_setting, setting_of

_SETTING = "spent_keys"


class _Spent(Value, frozen=True, kw_only=True):
    keys: tuple[KeyId, ...] = ()


@remembered
async def read(tx: AsyncConnection) -> tuple[KeyId, ...]:
    return (await setting_of(tx, _SETTING, _Spent) or _Spent()).keys


async def add(tx: AsyncConnection, key: KeyId | None) -> None:
    """Others may need it still: who destroys it looks."""
    known = await read(tx)
    if key is not None and key not in known:
        await set_setting(tx, _SETTING, _Spent(keys=(*known, key)))


async def forget(tx: AsyncConnection, keys: tuple[KeyId, ...]) -> None:
    left = tuple(key for key in await read(tx) if key not in keys)
    await set_setting(tx, _SETTING, _Spent(keys=left))
