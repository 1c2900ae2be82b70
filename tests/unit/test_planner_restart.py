"""Servers of a host that has failed are started elsewhere: one step after the other."""

import msgspec
from planner_world import OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.availability import Denial, OnHostFailure, Standing
from nahtlos.model.blueprint import Blueprint, PlannedMove
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.inventory import (
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
    RunState,
    ServerStatus,
)
from nahtlos.planner.failure import LEASE
from nahtlos.planner.plan import plan

H1, H2, H3 = (host_id(number) for number in (1, 2, 3))
VM = server_id(1)
MOVE = OperationId("move-90")


def moved(source: HostId, destination: HostId, ended: OperationState) -> tuple[Cloud, Blueprint, Inventory]:
    """The server's move has ended so, as its destination says, and the second host is fenced by now."""
    cloud = running_cloud(tuple(int(source == host) for host in (H1, H2, H3)))
    spec = msgspec.structs.replace(cloud.policy.servers[VM], on_host_failure=OnHostFailure.RESTART)
    cloud.want(servers={VM: spec}, lost=frozenset({H2}))
    owner, seen = cloud.now.servers[VM], cloud.world.look()
    failed = msgspec.structs.replace(
        cloud.now.hosts[H2], denial=Denial(host=H2, term=1, seconds=20.0), denial_terms=1, fenced=LEASE
    )
    move = PlannedMove(
        id=MOVE, server=VM, source=source, destination=destination, epoch=owner.epoch + 1, reason="requested"
    )
    blueprint = msgspec.structs.replace(
        cloud.now, hosts={**cloud.now.hosts, H2: failed}, moves=(move,), counter=90
    )
    epoch = move.epoch if ended is OperationState.DONE else owner.epoch
    status = ServerStatus(
        id=VM, epoch=epoch, state=RunState.RUNNING, release=OLD, size=spec.size, under_lease=True
    )
    told = OperationStatus(
        id=MOVE, kind=OperationKind.MOVE, state=ended, step="done", server=VM, epoch=move.epoch
    )
    hosts = {
        host: msgspec.structs.replace(known, servers=(), standing=Standing())
        for host, known in seen.hosts.items()
    }
    hosts[H2] = msgspec.structs.replace(hosts[H2], servers=(status,))
    hosts[destination] = msgspec.structs.replace(hosts[destination], operations=(told,))
    return cloud, blueprint, Inventory(hosts=hosts, connected=frozenset({H1, H3}))


def test_a_server_seen_to_have_come_to_a_host_that_failed_is_restarted_in_the_next_step() -> None:
    """Both in one step would be a change of owners that no move explains, and was refused as unsafe."""
    cloud, blueprint, seen = moved(H1, H2, OperationState.DONE)
    first, _ = plan(cloud.policy, seen, blueprint)
    assert (first.servers[VM].host, first.servers[VM].epoch, first.moves) == (H2, 2, ())
    second, _ = plan(cloud.policy, seen, first)
    assert second.servers[VM].host in (H1, H3) and second.servers[VM].epoch == 3
    assert second.passed_over == {H2: {VM: 3}}


def test_a_server_whose_move_away_from_a_host_that_failed_was_undone_is_restarted_in_the_next_step() -> None:
    """The destination gave it up as its source was gone. In one step it was refused as unsafe, again and
    again, and nothing else was planned meanwhile."""
    cloud, blueprint, seen = moved(H2, H1, OperationState.UNDONE)
    first, _ = plan(cloud.policy, seen, blueprint)
    assert (first.servers[VM], first.moves) == (cloud.now.servers[VM], ())
    second, _ = plan(cloud.policy, seen, first)
    assert second.servers[VM].host in (H1, H3) and second.servers[VM].epoch == 2
    assert second.passed_over == {H2: {VM: 2}}
