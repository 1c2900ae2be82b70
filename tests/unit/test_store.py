"""The store: schema and migrations, the fence of the leader, compare-and-set, addresses, tokens."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, select
from sqlalchemy.exc import IntegrityError

from nahtlos.model.blueprint import Blueprint, Campaign, OperationRecord
from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Conflict, ErrorRecord, Refused, Stale
from nahtlos.model.ids import (
    BlueprintId,
    CampaignId,
    HostId,
    NetworkId,
    OperationId,
    PortId,
    ReleaseId,
    ServerId,
    VolumeId,
)
from nahtlos.model.networking import NetworkSpec, PortSpec
from nahtlos.model.nouns import Component, HostRole, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.runtime.store import (
    blueprints,
    campaigns,
    events,
    intent,
    leases,
    networking,
    operations,
    schema,
)
from nahtlos.runtime.store.documents import text_of
from nahtlos.runtime.store.migrate import upgrade_to_head
from nahtlos.runtime.store.schema import metadata
from nahtlos.runtime.store.store import Store


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(clock: ManualClock) -> AsyncIterator[Store]:
    opened = await Store.open(None, clock=clock)
    yield opened
    await opened.close()


def blueprint(number: int, parent: int | None) -> Blueprint:
    return Blueprint(
        id=BlueprintId(f"bp-{number}"),
        parent=None if parent is None else BlueprintId(f"bp-{parent}"),
        hosts={},
        servers={},
    )


def server(name: str, ip: str, mac: str) -> tuple[ServerSpec, VolumeSpec]:
    volume = VolumeSpec(id=VolumeId(f"{name}-disk"), size_mib=1, image=None, host=HostId("host-1"))
    port = PortSpec(id=PortId(f"{name}-eth0"), network=NetworkId("tenant"), mac=mac, ip=ip)
    spec = ServerSpec(
        id=ServerId(name),
        size=Size(vcpus=1, memory_mib=64),
        volume=volume.id,
        ports=(port,),
        machine="pc-q35-10.0",
    )
    return spec, volume


NETWORK = NetworkSpec(
    id=NetworkId("tenant"),
    vni=100,
    cidr="10.77.0.0/24",
    gateway_ip="10.77.0.1",
    gateway_mac="52:54:00:4d:00:01",
    gateway_host=HostId("edge-1"),
    dhcp_ip="10.77.0.2",
)


def test_migrations_lead_from_nothing_to_the_schema() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        upgrade_to_head(connection)
        assert _differences(connection) == []
        upgrade_to_head(connection)
    engine.dispose()


def _differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def test_a_database_is_what_it_was_when_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "runtime.sqlite"
    first = await Store.open(path)
    async with first.writing() as tx:
        await intent.set_setting(tx, intent.PROMISED, Size(vcpus=6, memory_mib=1536))
    await first.close()
    second = await Store.open(path)
    async with second.reading() as tx:
        assert await intent.promised(tx) == Size(vcpus=6, memory_mib=1536)
        mode = (await tx.exec_driver_sql("PRAGMA journal_mode")).scalar()
        synchronous = (await tx.exec_driver_sql("PRAGMA synchronous")).scalar()
        foreign_keys = (await tx.exec_driver_sql("PRAGMA foreign_keys")).scalar()
    await second.close()
    assert (mode, synchronous, foreign_keys) == ("wal", 2, 1)


async def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(Refused):
        async with store.writing() as tx:
            await intent.set_setting(tx, intent.PARALLEL_MOVES, 3)
            raise Refused("no")
    async with store.reading() as tx:
        assert await intent.setting(tx, intent.PARALLEL_MOVES, 1) == 1


async def test_one_leader_at_a_time_and_epochs_rise(store: Store, clock: ManualClock) -> None:
    async with store.writing() as tx:
        assert await leases.acquire(tx, "a", 5.0) == 1
        assert await leases.acquire(tx, "b", 5.0) is None
        await leases.renew(tx, 1, 5.0)
    clock.now += 6.0
    async with store.writing() as tx:
        assert await leases.acquire(tx, "b", 5.0) == 2
        with pytest.raises(Stale):
            await leases.renew(tx, 1, 5.0)
        assert await leases.acquire(tx, "c", 5.0, take_over=True) == 3


async def test_a_leader_whose_lease_is_gone_decides_nothing(store: Store, clock: ManualClock) -> None:
    async with store.writing() as tx:
        await leases.acquire(tx, "a", 5.0)
    async with store.deciding(1) as tx:
        await blueprints.set_target(tx, blueprint(1, None), epoch=1, now=0.0)
    clock.now += 5.0
    with pytest.raises(Stale, match="ran out"):
        async with store.deciding(1) as tx:
            await blueprints.set_target(tx, blueprint(2, 1), epoch=1, now=0.0)
    async with store.writing() as tx:
        await leases.acquire(tx, "b", 5.0)
    with pytest.raises(Stale, match="does not lead"):
        async with store.deciding(1) as tx:
            await blueprints.set_target(tx, blueprint(2, 1), epoch=1, now=0.0)
    async with store.reading() as tx:
        assert await blueprints.target(tx) == blueprint(1, None)


async def test_a_released_lease_is_free_at_once(store: Store) -> None:
    async with store.writing() as tx:
        await leases.acquire(tx, "a", 5.0)
        await leases.release(tx, 1)
        assert await leases.acquire(tx, "b", 5.0) == 2
        await leases.release(tx, 1)
        assert await leases.acquire(tx, "c", 5.0) is None


async def test_the_target_moves_only_from_its_parent(store: Store) -> None:
    async with store.writing() as tx:
        await blueprints.set_target(tx, blueprint(1, None), epoch=1, now=0.0)
        await blueprints.set_target(tx, blueprint(2, 1), epoch=1, now=0.0)
    for late in (blueprint(1, None), blueprint(2, 1), blueprint(3, 1)):
        with pytest.raises(Stale):
            async with store.writing() as tx:
                await blueprints.set_target(tx, late, epoch=1, now=0.0)
    async with store.reading() as tx:
        assert await blueprints.target(tx) == blueprint(2, 1)
        assert await blueprints.blueprint(tx, BlueprintId("bp-1")) == blueprint(1, None)


async def test_a_generation_has_one_content(store: Store) -> None:
    config = HostConfig(host=HostId("host-1"), generation=1, release=None)
    async with store.writing() as tx:
        await blueprints.put_host_config(tx, config)
        with pytest.raises(Stale):
            await blueprints.put_host_config(tx, config)
        assert await blueprints.host_configs(tx) == {HostId("host-1"): config}


async def test_addresses_and_names_are_given_once(store: Store) -> None:
    async with store.writing() as tx:
        await networking.put_network(tx, NETWORK)
        await intent.add_server(tx, *server("web-1", "10.77.0.10", "52:54:00:4d:00:0a"), 0.0)
    with pytest.raises(Conflict):
        async with store.writing() as tx:
            await intent.add_server(tx, *server("web-1", "10.77.0.11", "52:54:00:4d:00:0b"), 0.0)
    for ip, mac in (("10.77.0.10", "52:54:00:4d:00:0b"), ("10.77.0.11", "52:54:00:4d:00:0a")):
        with pytest.raises(IntegrityError):
            async with store.writing() as tx:
                await intent.add_server(tx, *server("web-2", ip, mac), 0.0)
    async with store.reading() as tx:
        assert list(await intent.servers(tx)) == ["web-1"]
        assert list(await intent.volumes(tx)) == ["web-1-disk"]


async def test_removal_is_in_steps(store: Store) -> None:
    name = ServerId("web-1")
    async with store.writing() as tx:
        await networking.put_network(tx, NETWORK)
        await intent.add_server(tx, *server("web-1", "10.77.0.10", "52:54:00:4d:00:0a"), 0.0)
        await intent.request_move(tx, name, HostId("host-2"))
        await intent.mark_server_removed(tx, name, 7.0)
        row = (await intent.servers(tx))[name]
        assert (row.removed_at, row.move_requested, row.move_to) == (7.0, False, None)
        await intent.forget_server(tx, name)
        assert (await intent.volumes(tx))[VolumeId("web-1-disk")].removed
        assert (await tx.execute(select(schema.ports))).all() == []
        assert (await tx.execute(select(schema.claims).where(schema.claims.c.kind == "address"))).all() == []
        with pytest.raises(Conflict, match="still being deleted"):
            await intent.add_server(tx, *server("web-1", "10.77.0.10", "52:54:00:4d:00:0a"), 0.0)
        await intent.forget_volume(tx, VolumeId("web-1-disk"))
        assert await intent.volumes(tx) == {}


async def test_a_token_serves_once_for_its_host_and_in_time(store: Store) -> None:
    host, role = HostId("host-1"), HostRole.COMPUTE
    async with store.writing() as tx:
        await intent.add_token(tx, "digest", host, role, expires_at=100.0)
        await intent.add_token(tx, "other", host, role, expires_at=100.0)
    for digest, who, what, now in (
        ("unknown", host, role, 0.0),
        ("digest", HostId("host-2"), role, 0.0),
        ("digest", host, HostRole.EDGE, 0.0),
        ("other", host, role, 100.0),
    ):
        with pytest.raises(Refused):
            async with store.writing() as tx:
                await intent.use_token(tx, digest, who, what, now)
    async with store.writing() as tx:
        await intent.use_token(tx, "digest", host, role, 50.0)
        with pytest.raises(Refused):
            await intent.use_token(tx, "digest", host, role, 51.0)


async def test_two_campaigns_at_once_are_a_conflict(store: Store) -> None:
    async def begin() -> CampaignId:
        async with store.writing() as tx:
            campaign = await campaigns.begin(
                tx,
                to_release=ReleaseId("qemu-11"),
                from_releases=(ReleaseId("qemu-10"),),
                hosts=(HostId("host-1"),),
                moves_forecast=2,
                now=1.0,
            )
        return campaign.id

    assert await begin() == "campaign-1"
    with pytest.raises(Conflict, match="campaign-1"):
        await begin()
    async with store.writing() as tx:
        row = await campaigns.current(tx)
        assert row is not None
        await campaigns.put_progress(tx, replace(row, capacity_floor=0.8, hosts_upgraded=1))
        await campaigns.set_state(tx, row.campaign, campaigns.CampaignState.DONE, ended_at=2.0)
        assert await campaigns.current(tx) is None
        newest = await campaigns.newest(tx)
        assert newest is not None
        assert (newest.capacity_floor, newest.hosts_upgraded) == (0.8, 1)
    assert await begin() == "campaign-2"


async def test_a_campaign_of_another_component_is_kept_as_it_is(store: Store) -> None:
    async with store.writing() as tx:
        for component in (Component.STORAGE, Component.NETWORK):
            begun = await campaigns.begin(
                tx,
                to_release=ReleaseId("r-2"),
                from_releases=(),
                hosts=(HostId("host-1"),),
                moves_forecast=0,
                now=1.0,
                component=component,
            )
            row = await campaigns.current(tx)
            assert row is not None and row.campaign == begun and begun.component is component
            await campaigns.set_state(tx, begun, campaigns.CampaignState.DONE, ended_at=2.0)
        assert [r.campaign.component for r in await campaigns.history(tx)] == ["storage", "network"]
        # what an earlier release has written says nothing of components
        old = msgspec.json.decode(text_of(begun))
        del old["component"]
        assert msgspec.convert(old, Campaign).component is Component.HYPERVISOR


async def test_an_operation_ends_once_and_learns_times_of_both_sides(store: Store) -> None:
    def record(state: str, **times: float) -> OperationRecord:
        return OperationRecord(
            id=OperationId("move-1"), kind="move", subject="web-1", state=state, times=times
        )

    wanted = OperationId("move-1")
    async with store.writing() as tx:
        await operations.begin(tx, record("running"), 1.0)
        assert await operations.ended(tx, frozenset({wanted})) == frozenset()
        await operations.refuse(tx, wanted, HostId("host-1"), ErrorRecord(kind="refused", message="no"))
        await operations.end(tx, record("done", commit=2.0), 3.0)
        await operations.end(tx, record("undone"), 4.0)
        await operations.add_times(tx, wanted, {"commit": 9.0, "resume": 2.5})
        assert await operations.refusals(tx) == {}
        assert await operations.ended(tx, frozenset({wanted})) == {wanted}
        assert await operations.get(tx, [wanted]) == {wanted: record("done", commit=2.0, resume=2.5)}


async def test_events_are_numbered_in_order(store: Store) -> None:
    async with store.writing() as tx:
        drafts = [events.EventDraft(kind="test", subject=str(i), text="") for i in range(3)]
        await events.add(tx, drafts, 5.0)
        rows = await events.after(tx, 1, 10)
    assert [(row.number, row.subject) for row in rows] == [(2, "1"), (3, "2")]


async def test_a_cancelled_transaction_ends_whole(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "runtime.sqlite")
    begun = asyncio.Event()

    async def write() -> None:
        async with store.writing() as tx:
            await intent.set_setting(tx, "first", 1)
            begun.set()
            for number in range(200):
                await intent.set_setting(tx, f"more-{number}", number)
            await intent.set_setting(tx, "last", 1)
        raise AssertionError("it was cancelled")

    writing = asyncio.create_task(write())
    await begun.wait()
    writing.cancel()
    await asyncio.wait({writing})
    assert writing.cancelled()
    async with store.reading() as tx:
        assert await intent.setting_of(tx, "first", int) == 1
        assert await intent.setting_of(tx, "last", int) == 1
    await store.close()


async def test_a_failing_statement_leaves_the_connection_usable(store: Store) -> None:
    with pytest.raises(IntegrityError):
        async with store.writing() as tx:
            await intent.add_token(tx, "same", HostId("host-1"), HostRole.COMPUTE, 1.0)
            await intent.add_token(tx, "same", HostId("host-1"), HostRole.COMPUTE, 1.0)
    async with store.writing() as tx:
        await intent.add_token(tx, "same", HostId("host-1"), HostRole.COMPUTE, 1.0)
