"""Networks in the store: from a database of the release before, by which claims are unique, what is given
back, and what that release does to a database it shares."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from alembic import command
from sqlalchemy import Connection, create_engine, insert, select, text
from sqlalchemy.exc import IntegrityError
from virtual_network import BLUE, EDGE, GREEN, TENANT, WAN, WEB, A, network, port, topology

from nahtlos.model.config import UnderlayShares
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    ServerId,
    SubnetId,
    VolumeId,
)
from nahtlos.model.networking import FloatingIpSpec, PortSpec, RouterGateway, RouterSpec
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.topology import Topology, Underlay
from nahtlos.runtime.controllers.bootstrap import bootstrap
from nahtlos.runtime.settings import CloudSettings
from nahtlos.runtime.store import intent, networking, schema
from nahtlos.runtime.store.documents import text_of
from nahtlos.runtime.store.migrate import configuration
from nahtlos.runtime.store.store import Store


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = await Store.open(None)
    yield opened
    await opened.close()


def server(name: str, ip: str, *further: str, net: NetworkId = BLUE) -> tuple[ServerSpec, VolumeSpec]:
    number = int(ip.rsplit(".", 1)[1])
    volume = VolumeSpec(id=VolumeId(f"{name}-disk"), size_mib=1, image=None, host=HostId("host-1"))
    spec = ServerSpec(
        id=ServerId(name),
        size=Size(vcpus=1, memory_mib=64),
        volume=volume.id,
        ports=(port(PortId(f"{name}-eth0"), net, ip, number, *further),),
        machine="pc-q35-10.0",
    )
    return spec, volume


# --- from the release before -------------------------------------------------------------------------

NETWORK_OF_BEFORE = (
    '{"id":"tenant","vni":100,"cidr":"10.77.0.0/24","mtu":1500,"gateway_ip":"10.77.0.1",'
    '"gateway_mac":"02:00:00:4d:00:01","gateway_host":"edge-1","dhcp_ip":"10.77.0.2"}'
)
PORT_OF_BEFORE = '{"id":"web-1-eth0","network":"tenant","mac":"52:54:00:4d:00:0a","ip":"10.77.0.10"}'
SERVER_OF_BEFORE = (
    '{"id":"web-1","size":{"vcpus":1,"memory_mib":256},"volume":"web-1-disk","machine":"pc-q35-10.0",'
    f'"cpu_model":"qemu64","ports":[{PORT_OF_BEFORE}]}}'
)
VOLUME_OF_BEFORE = '{"id":"web-1-disk","size_mib":160,"image":null,"host":"host-1","epoch":1}'


def as_before(connection: Connection) -> None:
    """A database of the first schema, with what that release would have written."""
    command.upgrade(configuration(connection), "0001")
    for statement, values in (
        ("INSERT INTO networks VALUES (:id, :document)", {"id": "tenant", "document": NETWORK_OF_BEFORE}),
        (
            "INSERT INTO volumes VALUES (:id, :document, 0)",
            {"id": "web-1-disk", "document": VOLUME_OF_BEFORE},
        ),
        (
            "INSERT INTO servers VALUES ('web-1', :document, 'web-1-disk', 5.0, NULL, NULL, 0, NULL)",
            {"document": SERVER_OF_BEFORE},
        ),
        (
            "INSERT INTO ports VALUES ('web-1-eth0', 'web-1', 'tenant', '10.77.0.10', '52:54:00:4d:00:0a')",
            {},
        ),
        ("INSERT INTO settings VALUES ('uplinks', :document)", {"document": '{"tenant":"out0"}'}),
    ):
        connection.execute(text(statement), values)


def database_of_before(path: Path) -> Path:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        as_before(connection)
    engine.dispose()
    return path


async def test_a_database_of_the_release_before_is_taken_over_with_its_data(tmp_path: Path) -> None:
    store = await Store.open(database_of_before(tmp_path / "runtime.sqlite"))
    async with store.writing() as tx:
        (tenant,) = await networking.networks(tx)
        assert (tenant.vni, tenant.project, tenant.subnets) == (100, "default", ())
        servers = await intent.servers(tx)
        (eth0,) = servers[ServerId("web-1")].spec.ports
        assert eth0 == PortSpec(
            id=PortId("web-1-eth0"), network=TENANT, mac="52:54:00:4d:00:0a", ip="10.77.0.10"
        )
        assert await networking.functions(tx) == Topology(uplinks={"tenant": "out0"})
    with pytest.raises(Conflict, match="network tenant has the vni 100"):
        async with store.writing() as tx:
            await networking.put_network(tx, network(BLUE, 100, 1))
    with pytest.raises(Conflict, match=r"port web-1-eth0 has the address 10\.77\.0\.10"):
        async with store.writing() as tx:
            balancer = topology().balancers[LoadBalancerId("lb")]
            await networking.put_load_balancer(
                tx, msgspec.structs.replace(balancer, network=TENANT, vip="10.77.0.10")
            )
    await store.close()


async def test_two_old_networks_with_one_number_do_not_stop_the_migration(tmp_path: Path) -> None:
    path = tmp_path / "runtime.sqlite"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        as_before(connection)
        second = NETWORK_OF_BEFORE.replace('"id":"tenant"', '"id":"twin"')
        connection.execute(text("INSERT INTO networks VALUES ('twin', :d)"), {"d": second})
    engine.dispose()
    store = await Store.open(path)
    async with store.reading() as tx:
        assert [n.id for n in await networking.networks(tx)] == ["tenant", "twin"]
    await store.close()


async def test_the_release_before_forgets_ports_without_giving_back_their_addresses(store: Store) -> None:
    async with store.writing() as tx:
        await networking.put_network(tx, network(BLUE, 1001, 1))
        await intent.add_server(tx, *server("old", "10.1.0.10", "10.1.0.11"), 5.0)
    async with store.writing() as tx:  # what the release before does
        for statement in ("DELETE FROM ports", "DELETE FROM servers", "DELETE FROM volumes"):
            await tx.execute(text(statement))
    async with store.writing() as tx:
        await intent.add_server(tx, *server("new", "10.1.0.11", "10.1.0.10"), 5.0)
        holders = (await tx.execute(select(schema.claims.c.holder).distinct())).scalars().all()
    assert sorted(holders) == ["network/blue", "port/new-eth0"]


async def test_the_release_before_puts_a_network_back_without_its_subnets(store: Store) -> None:
    blue = topology().networks[BLUE]
    async with store.writing() as tx:
        await networking.put_network(tx, blue)
        bare = msgspec.structs.replace(blue, subnets=())
        statement = schema.networks.update().where(schema.networks.c.id == BLUE)
        await tx.execute(statement.values(document=text_of(bare)))
        assert await networking.networks(tx) == (blue,)


async def test_a_database_that_a_newer_release_has_expanded_is_opened_as_it_is(tmp_path: Path) -> None:
    path = database_of_before(tmp_path / "runtime.sqlite")
    await (await Store.open(path)).close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(text("CREATE TABLE of_tomorrow (id VARCHAR)"))
    engine.dispose()
    store = await Store.open(path)
    async with store.writing() as tx:
        await intent.add_server(tx, *server("b", "10.77.0.11", net=TENANT), 5.0)
        assert len(await intent.servers(tx)) == 2
        assert (await tx.execute(text("SELECT version_num FROM alembic_version"))).scalar() == "9999"
    await store.close()


# --- what only one may have --------------------------------------------------------------------------


async def test_numbers_names_and_addresses_are_given_once(store: Store) -> None:
    found = topology()
    router, front = found.routers[WAN], found.floating_ips[FloatingIpId("front")]
    balancer = found.balancers[LoadBalancerId("lb")]
    async with store.writing() as tx:
        await networking.put_network(tx, found.networks[BLUE])
        await networking.put_network(tx, found.networks[GREEN])
        await networking.put_router(tx, router)
        await networking.put_floating_ip(tx, front)
        await networking.put_load_balancer(tx, balancer)
        await intent.add_server(tx, *server("a", "10.1.0.10", "10.1.0.11"), 5.0)

    async def put_twice(kind: str) -> None:
        async with store.writing() as tx:
            match kind:
                case "vni":
                    await networking.put_network(tx, network(NetworkId("new"), 1001, 9))
                case "subnet":
                    await networking.put_network(tx, network(NetworkId("blue6"), 1009, 9))
                case "number":
                    await networking.put_router(tx, RouterSpec(id=RouterId("new"), number=balancer.number))
                case "gateway":
                    twin = msgspec.structs.replace(router, id=RouterId("new"), number=9, gateway=None)
                    await networking.put_router(tx, twin)
                case "outside":
                    spec = FloatingIpSpec(id=FloatingIpId("new"), address="203.0.113.2")
                    await networking.put_floating_ip(tx, spec)
                case "fixed address":
                    await networking.put_floating_ip(
                        tx, msgspec.structs.replace(front, id=FloatingIpId("new"), address="203.0.113.77")
                    )
                case _:
                    await intent.add_server(tx, *server("b", "10.1.0.12", balancer.vip), 5.0)

    for kind in ("vni", "subnet", "number", "gateway", "outside", "fixed address", "address"):
        with pytest.raises(Conflict) as caught:
            await put_twice(kind)
        assert caught.value.field == kind
    with pytest.raises(IntegrityError):
        async with store.writing() as tx:
            await intent.add_server(tx, *server("b", "10.1.0.10"), 5.0)


async def test_what_is_no_longer_had_is_free(store: Store) -> None:
    found = topology()
    router, front = found.routers[WAN], found.floating_ips[FloatingIpId("front")]
    balancer = found.balancers[LoadBalancerId("lb")]
    async with store.writing() as tx:
        for name in (BLUE, GREEN):
            await networking.put_network(tx, found.networks[name])
        await networking.put_router(tx, router)
        await networking.put_floating_ip(tx, front)
        await networking.put_load_balancer(tx, balancer)
        await networking.put_group(tx, found.groups[WEB])
        assert await networking.functions(tx) == Topology(
            groups=found.groups,
            routers=found.routers,
            floating_ips={front.id: front},
            balancers=found.balancers,
        )
        moved = msgspec.structs.replace(router, gateway=RouterGateway(host=EDGE, address="203.0.113.9"))
        await networking.put_router(tx, moved)
        await networking.put_floating_ip(tx, FloatingIpSpec(id=FloatingIpId("n"), address="203.0.113.2"))
        await networking.forget_floating_ip(tx, FloatingIpId("n"))
        await networking.forget_floating_ip(tx, front.id)
        await networking.forget_router(tx, WAN)
        await networking.forget_load_balancer(tx, balancer.id)
        await networking.forget_group(tx, WEB)
        await networking.forget_subnet(tx, SubnetId("blue6"))
        for name in (BLUE, GREEN):
            await networking.forget_network(tx, found.networks[name])
        assert await networking.networks(tx) == ()
        assert await networking.functions(tx) == Topology()
        assert (await tx.execute(select(schema.claims))).all() == []


async def test_a_network_with_ports_is_kept_by_the_tables(store: Store) -> None:
    async with store.writing() as tx:
        await networking.put_network(tx, network(BLUE, 1001, 1))
        await intent.add_server(tx, *server("a", "10.1.0.10"), 5.0)
    with pytest.raises(IntegrityError):
        async with store.writing() as tx:
            await networking.forget_network(tx, network(BLUE, 1001, 1))
    async with store.reading() as tx:
        assert [n.id for n in await networking.networks(tx)] == [BLUE]


async def test_a_ports_change_is_in_its_server(store: Store) -> None:
    spec, volume = server("a", "10.1.0.10")
    async with store.writing() as tx:
        await networking.put_network(tx, network(BLUE, 1001, 1))
        await intent.add_server(tx, spec, volume, 5.0)
        changed = msgspec.structs.replace(spec.ports[0], security_groups=(WEB,))
        await networking.put_ports(tx, spec, [changed])
        assert (await intent.servers(tx))[spec.id].spec.ports == (changed,)
    assert changed.id == A


# --- settings ----------------------------------------------------------------------------------------


async def test_settings_keep_subnets_that_were_added_and_name_interfaces(store: Store) -> None:
    tenant = network(TENANT, 100, 77, gateway_host=EDGE)
    cloud = CloudSettings(networks=(tenant,), uplinks={TENANT: "out0"}, external={EDGE: "wan0"})
    await bootstrap(store, cloud)
    six = msgspec.structs.replace(topology().subnets()[SubnetId("blue6")], network=TENANT)
    async with store.writing() as tx:
        await networking.put_subnet(tx, six)
    await bootstrap(store, cloud)
    async with store.reading() as tx:
        (again,) = await networking.networks(tx)
        found = await networking.functions(tx)
    assert again.subnets == (six,)
    assert found.external_interface(EDGE) == "wan0"
    assert found.external_interface(HostId("edge-2")) == ""


async def test_a_network_of_the_settings_cannot_take_a_number_that_is_in_use(store: Store) -> None:
    async with store.writing() as tx:
        await networking.put_network(tx, network(BLUE, 1001, 1))
    with pytest.raises(Conflict, match="network blue has the vni 1001"):
        await bootstrap(store, CloudSettings(networks=(network(TENANT, 1001, 77),)))


async def test_the_underlay_is_a_setting(store: Store) -> None:
    shares = UnderlayShares(bits_per_second=10**9)
    async with store.writing() as tx:
        assert (await networking.functions(tx)).underlay == Underlay()
        await networking.set_underlay(tx, Underlay(mtu=1600, shares=shares))
        assert (await networking.functions(tx)).underlay == Underlay(mtu=1600, shares=shares)
        await networking.set_underlay(tx, Underlay())
        assert (await networking.functions(tx)).underlay == Underlay()


def test_documents_of_a_later_release_are_read() -> None:
    """Unknown fields are ignored, new ones have defaults: in either direction."""
    later = NETWORK_OF_BEFORE[:-1] + ',"field_of_tomorrow":{"deep":[1]}}'
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        as_before(connection)
        command.upgrade(configuration(connection), "head")
        connection.execute(insert(schema.networks).values(id="later", document=later))
        rows = connection.execute(select(schema.networks.c.document)).scalars().all()
    engine.dispose()
    assert len({text_of(msgspec.json.decode(row, type=type(network(BLUE, 1, 1)))) for row in rows}) == 1
