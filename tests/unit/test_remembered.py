"""What the store remembers: known until a table it was read from changes, whoever changes it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import exists, func, select

from nahtlos.model.errors import Refused
from nahtlos.runtime.store import events, intent, networking, schema
from nahtlos.runtime.store.remembered import MOST_ANSWERS, remembered, tables_of
from nahtlos.runtime.store.settings import set_setting, setting, setting_of
from nahtlos.runtime.store.store import AsyncConnection, Store

read: list[str] = []
"""The names that were really read, in order."""


@remembered
async def named(tx: AsyncConnection, name: str) -> int:
    read.append(name)
    return await setting_of(tx, name, int) or 0


@remembered
async def outer(tx: AsyncConnection) -> int:
    read.append("outer")
    return 100 + await named(tx, "a")


@remembered
async def numbered(tx: AsyncConnection) -> int:
    read.append("events")
    return (await tx.execute(select(func.count()).select_from(schema.events))).scalar_one()


@pytest.fixture(autouse=True)
def nothing_was_read() -> None:
    read.clear()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "runtime.sqlite")
    yield opened
    await opened.close()


async def looked(store: Store, name: str = "a") -> int:
    async with store.reading() as tx:
        return await named(tx, name)


async def write(store: Store, name: str, value: int) -> None:
    async with store.writing() as tx:
        await set_setting(tx, name, value)


async def test_what_has_not_changed_is_read_once(store: Store) -> None:
    await write(store, "a", 1)
    assert [await looked(store), await looked(store), await looked(store, "b")] == [1, 1, 0]
    assert read == ["a", "b"]


async def test_a_change_of_its_table_makes_it_unknown(store: Store) -> None:
    assert await looked(store) == 0
    await write(store, "a", 2)
    assert await looked(store) == 2
    assert read == ["a", "a"]


async def test_a_change_of_another_table_does_not(store: Store) -> None:
    async with store.reading() as tx:
        assert (await named(tx, "a"), await numbered(tx)) == (0, 0)
    async with store.writing() as tx:
        await events.add(tx, [events.EventDraft(kind="k", subject="s", text="t")], 1.0)
    async with store.reading() as tx:
        assert (await named(tx, "a"), await numbered(tx)) == (0, 1)
    assert read == ["a", "events", "events"]


async def test_what_is_read_within_counts_also_when_it_was_known(store: Store) -> None:
    assert await looked(store) == 0
    async with store.reading() as tx:
        assert await outer(tx) == 100
    await write(store, "a", 5)
    async with store.reading() as tx:
        assert await outer(tx) == 105
    assert read == ["a", "outer", "outer", "a"]


async def test_what_a_transaction_wrote_is_seen_in_it_and_gone_when_it_is_undone(store: Store) -> None:
    assert await looked(store) == 0
    with pytest.raises(Refused):
        async with store.writing() as tx:
            await set_setting(tx, "a", 7)
            assert await named(tx, "a") == 7
            raise Refused("no")
    assert await looked(store) == 0


async def test_what_another_process_wrote_is_seen(store: Store, tmp_path: Path) -> None:
    assert await looked(store) == 0
    other = await Store.open(tmp_path / "runtime.sqlite")
    await write(other, "a", 9)
    assert await looked(store) == 9
    await write(other, "a", 10)
    await other.close()
    assert await looked(store) == 10


async def test_what_was_written_by_hand_makes_all_unknown(store: Store) -> None:
    await write(store, "a", 1)
    assert await looked(store) == 1
    async with store.writing() as tx:
        await tx.exec_driver_sql("UPDATE settings SET document = '3' WHERE name = 'a'")
    assert await looked(store) == 3


async def test_it_forgets_rather_than_grow(store: Store) -> None:
    for number in range(MOST_ANSWERS + 10):
        await looked(store, f"n{number}")
    assert len(read) == MOST_ANSWERS + 10
    assert await looked(store, f"n{MOST_ANSWERS + 9}") == 0
    assert len(read) == MOST_ANSWERS + 10
    await looked(store, "n0")
    assert len(read) == MOST_ANSWERS + 11


async def test_a_default_is_not_remembered_for_another(store: Store) -> None:
    async with store.reading() as tx:
        assert await setting(tx, "x", 4) == 4
        assert await setting(tx, "x", 6) == 6


async def test_the_virtual_network_is_known_until_it_changes(store: Store) -> None:
    async with store.reading() as tx:
        before = await networking.functions(tx)
        assert await networking.functions(tx) is before
        servers = await intent.servers(tx)
        assert await intent.servers(tx) is servers


def test_tables_within_a_query_are_found() -> None:
    servers, volumes, ports = schema.servers, schema.volumes, schema.ports
    other = servers.alias("other")
    within = select(ports.c.server).where(ports.c.server == servers.c.id)
    query = select(servers.c.id).where(exists(within), servers.c.id.in_(select(volumes.c.id)))
    assert tables_of(query) == {"servers", "volumes", "ports"}
    assert "servers" in tables_of(select(other.c.id))
    joined = select(func.count()).select_from(servers.join(ports, ports.c.server == servers.c.id))
    assert tables_of(joined) == {"servers", "ports"}
