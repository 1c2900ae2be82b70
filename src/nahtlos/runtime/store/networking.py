"""What people want of the virtual network: networks with their subnets, ports, groups, routers, floating
IPs, load balancers. Written by requests, read whole.

Uniqueness is enforced by the tables: everything that only one may have is claimed in the transaction that
writes who has it, and what a noun no longer has is given back in the same one.
"""

from collections.abc import Iterable
from typing import TypeVar

import msgspec
from sqlalchemy import ColumnElement, Table, and_, delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.networking import (
    FloatingIpSpec,
    LoadBalancerSpec,
    NetworkSpec,
    PortSpec,
    RouterSpec,
    SecurityGroupSpec,
    SubnetSpec,
)
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.topology import Topology, Underlay
from nahtlos.model.values import Value
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered
from nahtlos.runtime.store.settings import set_setting, setting_of

V = TypeVar("V", bound=Value)

UPLINKS = "uplinks"
EXTERNAL = "external"
UNDERLAY = "underlay"

VNI, SUBNET, NUMBER, ADDRESS, OUTSIDE, GATEWAY = "vni", "subnet", "number", "address", "outside", "gateway"
"""Kinds of claims."""

Claim = tuple[str, str, str]
"""Kind, scope, value."""


# --- reading -----------------------------------------------------------------------------------------


@remembered
async def networks(tx: AsyncConnection) -> tuple[NetworkSpec, ...]:
    rows = await tx.execute(select(schema.networks).order_by(schema.networks.c.id))
    found = {NetworkId(row.id): value_of(row.document, NetworkSpec) for row in rows}
    further: dict[NetworkId, list[SubnetSpec]] = {}
    for subnet in await _values(tx, schema.subnets, SubnetSpec):
        further.setdefault(subnet.network, []).append(subnet)
    return tuple(
        msgspec.structs.replace(spec, subnets=tuple(further.get(name, ()))) for name, spec in found.items()
    )


@remembered
async def functions(tx: AsyncConnection) -> Topology:
    """Everything but networks and ports."""
    groups = await _values(tx, schema.security_groups, SecurityGroupSpec)
    routers = await _values(tx, schema.routers, RouterSpec)
    floating_ips = await _values(tx, schema.floating_ips, FloatingIpSpec)
    balancers = await _values(tx, schema.load_balancers, LoadBalancerSpec)
    return Topology(
        groups={g.id: g for g in groups},
        routers={r.id: r for r in routers},
        floating_ips={f.id: f for f in floating_ips},
        balancers={b.id: b for b in balancers},
        external=await setting_of(tx, EXTERNAL, dict[HostId, str]) or {},
        uplinks=await setting_of(tx, UPLINKS, dict[str, str]) or {},
        underlay=await setting_of(tx, UNDERLAY, Underlay) or Underlay(),
    )


async def _values(tx: AsyncConnection, table: Table, kind: type[V]) -> tuple[V, ...]:
    rows = await tx.execute(select(table.c.document).order_by(table.c.id))
    return tuple(value_of(row.document, kind) for row in rows)


# --- claims ------------------------------------------------------------------------------------------


async def _hold(tx: AsyncConnection, holder: str, wanted: Iterable[Claim]) -> None:
    """`holder` has exactly these from here on. Conflict, naming who has it, if one is another's."""
    table = schema.claims
    wanted = set(wanted)
    rows = await tx.execute(select(table).where(table.c.holder == holder))
    held = {(row.kind, row.scope, row.value) for row in rows}
    for claim in sorted(held - wanted):
        await tx.execute(delete(table).where(_is(claim)))
    for claim in sorted(wanted - held):
        other = (await tx.execute(select(table.c.holder).where(_is(claim)))).scalar_one_or_none()
        if other is not None:
            await _check_left_behind(tx, claim, other)
            await tx.execute(delete(table).where(_is(claim)))
        kind, scope, value = claim
        await tx.execute(insert(table).values(kind=kind, scope=scope, value=value, holder=holder))


def _is(claim: Claim) -> ColumnElement[bool]:
    columns = schema.claims.c
    return and_(columns.kind == claim[0], columns.scope == claim[1], columns.value == claim[2])


async def _check_left_behind(tx: AsyncConnection, claim: Claim, other: str) -> None:
    """Conflict unless `other` is a port that is gone: the release before forgets ports without giving back
    what they had claimed."""
    kind, name = other.split("/", 1)
    if kind == "port":
        known = await tx.execute(select(schema.ports.c.id).where(schema.ports.c.id == name))
        if known.first() is None:
            return
    raise Conflict(f"{kind} {name} has the {claim[0]} {claim[2]}", field=claim[0], remedy="choose another")


async def _write(tx: AsyncConnection, table: Table, name: str, value: Value, **columns: str) -> None:
    document = text_of(value)
    statement = upsert(table).values(id=name, document=document, **columns)
    await tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"document": document}))


async def _forget(tx: AsyncConnection, table: Table, name: str, holder: str) -> None:
    await tx.execute(delete(table).where(table.c.id == name))
    await _hold(tx, holder, ())


# --- networks and subnets ----------------------------------------------------------------------------


async def put_network(tx: AsyncConnection, spec: NetworkSpec) -> None:
    """The network itself; of its further subnets, those that are given are put, too, and none is removed."""
    await _hold(tx, f"network/{spec.id}", [(VNI, "", str(spec.vni)), (SUBNET, "", spec.id)])
    await _write(tx, schema.networks, spec.id, msgspec.structs.replace(spec, subnets=()))
    for subnet in spec.subnets:
        await put_subnet(tx, subnet)


async def put_subnet(tx: AsyncConnection, spec: SubnetSpec) -> None:
    await _hold(tx, f"subnet/{spec.id}", [(SUBNET, "", spec.id)])
    await _write(tx, schema.subnets, spec.id, spec, network=spec.network)


async def forget_subnet(tx: AsyncConnection, subnet: SubnetId) -> None:
    await _forget(tx, schema.subnets, subnet, f"subnet/{subnet}")


async def forget_network(tx: AsyncConnection, spec: NetworkSpec) -> None:
    """With its subnets. What uses it has gone before; the tables insist on ports and load balancers."""
    for subnet in spec.subnets:
        await forget_subnet(tx, subnet.id)
    await _forget(tx, schema.networks, spec.id, f"network/{spec.id}")


# --- ports -------------------------------------------------------------------------------------------


async def add_ports(tx: AsyncConnection, server: ServerId, ports: Iterable[PortSpec]) -> None:
    for port in ports:
        values = {"id": port.id, "server": server, "network": port.network, "ip": port.ip, "mac": port.mac}
        await tx.execute(insert(schema.ports).values(values))
        await _hold(tx, f"port/{port.id}", [(ADDRESS, port.network, a) for a in port.all_addresses])


async def put_ports(tx: AsyncConnection, server: ServerSpec, ports: Iterable[PortSpec]) -> None:
    """`ports` in the place of those of the same id; their addresses and MACs are as before."""
    changed = {port.id: port for port in ports}
    spec = msgspec.structs.replace(server, ports=tuple(changed.get(p.id, p) for p in server.ports))
    await tx.execute(
        update(schema.servers).where(schema.servers.c.id == server.id).values(document=text_of(spec))
    )


async def forget_ports(tx: AsyncConnection, server: ServerId) -> None:
    rows = await tx.execute(select(schema.ports.c.id).where(schema.ports.c.server == server))
    for row in rows.all():
        await _hold(tx, f"port/{row.id}", ())
    await tx.execute(delete(schema.ports).where(schema.ports.c.server == server))


# --- groups, routers, floating IPs, load balancers ---------------------------------------------------


async def put_group(tx: AsyncConnection, spec: SecurityGroupSpec) -> None:
    await _write(tx, schema.security_groups, spec.id, spec)


async def forget_group(tx: AsyncConnection, group: SecurityGroupId) -> None:
    await _forget(tx, schema.security_groups, group, f"group/{group}")


async def put_router(tx: AsyncConnection, spec: RouterSpec) -> None:
    claims: list[Claim] = [(NUMBER, "", str(spec.number))]
    claims += [(GATEWAY, "", interface.subnet) for interface in spec.interfaces]
    if spec.gateway is not None:
        claims.append((OUTSIDE, "", spec.gateway.address))
    await _hold(tx, f"router/{spec.id}", claims)
    await _write(tx, schema.routers, spec.id, spec)


async def place_gateway(tx: AsyncConnection, router: RouterId, before: HostId, at: HostId) -> None:
    """The way out is asked for at `at` from now on, unless somebody has meanwhile asked for another host than
    `before`."""
    for spec in await _values(tx, schema.routers, RouterSpec):
        if spec.id == router and spec.gateway is not None and spec.gateway.host == before:
            gateway = msgspec.structs.replace(spec.gateway, host=at)
            await put_router(tx, msgspec.structs.replace(spec, gateway=gateway))


async def forget_router(tx: AsyncConnection, router: RouterId) -> None:
    await _forget(tx, schema.routers, router, f"router/{router}")


async def put_floating_ip(tx: AsyncConnection, spec: FloatingIpSpec) -> None:
    claims: list[Claim] = [(OUTSIDE, "", spec.address)]
    if spec.port is not None:
        claims.append(("fixed address", spec.port, spec.fixed_ip))
    await _hold(tx, f"floating-ip/{spec.id}", claims)
    await _write(tx, schema.floating_ips, spec.id, spec)


async def forget_floating_ip(tx: AsyncConnection, floating_ip: FloatingIpId) -> None:
    await _forget(tx, schema.floating_ips, floating_ip, f"floating-ip/{floating_ip}")


async def put_load_balancer(tx: AsyncConnection, spec: LoadBalancerSpec) -> None:
    claims = [(NUMBER, "", str(spec.number)), (ADDRESS, spec.network, spec.vip)]
    await _hold(tx, f"load-balancer/{spec.id}", claims)
    await _write(tx, schema.load_balancers, spec.id, spec, network=spec.network)


async def forget_load_balancer(tx: AsyncConnection, balancer: LoadBalancerId) -> None:
    await _forget(tx, schema.load_balancers, balancer, f"load-balancer/{balancer}")


# --- the underlay ------------------------------------------------------------------------------------


async def set_underlay(tx: AsyncConnection, underlay: Underlay) -> None:
    await set_setting(tx, UNDERLAY, underlay)
