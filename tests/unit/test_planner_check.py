"""The safety check finds every kind of unsafe step."""

from collections.abc import Callable

import msgspec
import pytest
from planner_world import NEW, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import Blueprint, HostPhase, HostPlan, PlannedMove, PlannedVerify
from nahtlos.model.ids import BlueprintId, OperationId
from nahtlos.model.nouns import Assignment, Size
from nahtlos.planner.check import check, violations

replace = msgspec.structs.replace
VM, A, B = server_id(1), host_id(1), host_id(2)


def moving() -> Cloud:
    """vm-1 is on its way from host-1 to host-2; host-2 has room for nothing else."""
    cloud = running_cloud((1, 3))
    cloud.request(1, 2)
    cloud.plan()
    assert cloud.now.moves
    return cloud


def successor(parent: Blueprint) -> Blueprint:
    return replace(parent, id=BlueprintId(f"bp-{int(parent.id[3:]) + 1}"), parent=parent.id)


def found(cloud: Cloud, child: Blueprint) -> str:
    return " | ".join(violations(cloud.policy, cloud.world.look(), cloud.now, child))


def phase(blueprint: Blueprint, phase: HostPhase, **more: object) -> Blueprint:
    plan = replace(blueprint.hosts[A], phase=phase, **more)
    return replace(blueprint, hosts={**blueprint.hosts, A: plan})


def own(blueprint: Blueprint, **change: object) -> Blueprint:
    owner = replace(blueprint.servers[VM], **change)
    return replace(blueprint, servers={**blueprint.servers, VM: owner})


def another_move(blueprint: Blueprint, **change: object) -> Blueprint:
    move = replace(blueprint.moves[0], id=OperationId("move-99"), **change)
    return replace(blueprint, moves=(*blueprint.moves, move))


UNSAFE: dict[str, Callable[[Blueprint], Blueprint]] = {
    "its parent is": lambda b: replace(b, parent=None),
    "does not follow": lambda b: replace(b, id=BlueprintId("bp-99")),
    "operation numbers go back": lambda b: replace(b, counter=0),
    "is no host": lambda b: own(b, host=host_id(9)),
    "is assigned as": lambda b: own(b, server=server_id(2)),
    "goes back from epoch": lambda b: own(b, epoch=0),
    "without a move that is done": lambda b: replace(own(b, host=B, epoch=2), moves=()),
    "is dropped although its end was not seen": lambda b: replace(b, moves=()),
    "is altered after it was decided": lambda b: replace(
        b, moves=(replace(b.moves[0], patience_seconds=9.0),)
    ),
    "is used again": lambda b: replace(b, moves=(*b.moves, replace(b.moves[0], id=OperationId("move-1")))),
    "share an id": lambda b: replace(b, moves=b.moves * 2),
    "has two moves": another_move,
    "to where it is": lambda b: another_move(b, source=B, destination=B),
    "does not start from the owner": lambda b: another_move(b, epoch=7),
    "which is not serving": lambda b: another_move(b, destination=host_id(9)),
    "which is no compute host": lambda b: another_move(b, destination=host_id(9)),
    "which is to be removed": lambda b: another_move(b, server=server_id(77)),
    "is switched while it owns": lambda b: phase(b, HostPhase.SWITCHING, release=NEW),
    "is switched while move-": lambda b: phase(b, HostPhase.SWITCHING),
    "changes its release": lambda b: phase(b, HostPhase.SERVING, release=NEW),
    "which is not switched to it": lambda b: replace(
        b, verifies=(PlannedVerify(id=OperationId("verify-99"), host=A, release=NEW),)
    ),
    "is switched beside": lambda b: phase(b, HostPhase.SWITCHING, previous=NEW),
    "and nobody drains it": lambda b: phase(b, HostPhase.EMPTYING),
    "would hold": lambda b: replace(
        b,
        servers={**b.servers, server_id(5): Assignment(server=server_id(5), host=B, epoch=1)},
    ),
}


@pytest.mark.parametrize("words", UNSAFE)
def test_an_unsafe_step_is_named(words: str) -> None:
    cloud = moving()
    cloud.create(5)
    child = UNSAFE[words](successor(cloud.now))
    assert words in found(cloud, child)
    with pytest.raises(AssertionError, match=f"{child.id} is unsafe"):
        check(cloud.policy, cloud.world.look(), cloud.now, child)


def test_a_safe_step_and_no_step_pass() -> None:
    cloud = moving()
    assert found(cloud, successor(cloud.now)) == ""
    check(cloud.policy, cloud.world.look(), cloud.now, cloud.now)


def test_a_host_that_shrank_is_no_violation_but_making_it_worse_is() -> None:
    cloud = running_cloud((2, 0))
    cloud.world.capacities[A] = Size(vcpus=8, memory_mib=256)
    assert found(cloud, successor(cloud.now)) == ""
    move = PlannedMove(
        id=OperationId("move-98"), server=server_id(9), source=B, destination=A, epoch=2, reason=""
    )
    cloud.create(9)
    worse = replace(
        successor(cloud.now),
        servers={**cloud.now.servers, server_id(9): Assignment(server=server_id(9), host=B, epoch=1)},
        hosts={**cloud.now.hosts, B: HostPlan(phase=HostPhase.SERVING, release=cloud.release(2))},
        moves=(move,),
    )
    assert found(cloud, worse).startswith("host-1 would hold")
