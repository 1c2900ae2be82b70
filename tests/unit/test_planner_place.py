"""New servers, removed ones, requested moves, operators' intents, capacity, hosts that join and leave."""

import msgspec
import pytest
from planner_world import (
    NEW,
    OLD,
    REFUSED,
    UNAVAILABLE,
    Cloud,
    host_id,
    host_spec,
    running_cloud,
    server_id,
    server_spec,
)

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase, WaitKind
from nahtlos.model.inventory import OperationState, RunState, ServerStatus
from nahtlos.model.nouns import HostRole, Size
from nahtlos.planner.place import room_for


def test_the_first_blueprint_verifies_every_host_then_places() -> None:
    cloud = Cloud(2)
    cloud.create(1)
    report = cloud.plan()
    assert (cloud.now.id, cloud.now.parent) == ("bp-1", None)
    assert {verify.host for verify in cloud.now.verifies} == {host_id(1), host_id(2)}
    assert not report.converged
    assert cloud.settle().converged
    assert cloud.now.parent == cloud.history[-2].id
    assert cloud.spread() == [1, 0]


def test_hosts_verified_already_serve_at_once() -> None:
    cloud = Cloud(1)
    cloud.world.verified[host_id(1)] = OLD
    cloud.plan()
    assert cloud.phase(1) is HostPhase.SERVING
    assert not cloud.now.verifies


def test_a_host_waits_for_a_release_and_for_a_good_verify() -> None:
    cloud = Cloud(1)
    cloud.want(release=None)
    cloud.settle()
    assert "no hypervisor release" in cloud.reasons("host-1")
    cloud.want(release=OLD)
    cloud.world.script[host_id(1)] = [(OperationState.UNDONE, REFUSED)]
    cloud.settle()
    assert REFUSED.message in cloud.reasons("host-1")
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    cloud.intend(1, HostIntent.ACTIVE)
    assert cloud.settle().converged


def test_edge_hosts_take_no_servers_and_no_release() -> None:
    cloud = Cloud(1)
    cloud.want(hosts={**cloud.policy.hosts, "edge-1": host_spec(host_id(0), HostRole.EDGE)})
    cloud.create(1)
    assert cloud.settle().converged
    assert cloud.now.hosts["edge-1"].release is None  # type: ignore[index]
    assert cloud.where(1) == host_id(1)


def test_a_host_joins_later_and_one_leaves_once_it_is_empty() -> None:
    cloud = running_cloud((2, 2))
    cloud.world.capacities[host_id(3)] = Size(vcpus=8, memory_mib=1024)
    cloud.world.verified[host_id(3)] = None
    cloud.world.releases[host_id(3)] = (OLD,)
    hosts = {**cloud.policy.hosts, host_id(3): host_spec(host_id(3))}
    del hosts[host_id(1)]
    cloud.want(hosts=hosts)
    report = cloud.step()
    assert "host-1 is to leave the cloud, but is still in use" in [w.reason for w in report.waiting]
    assert cloud.settle().converged
    assert sorted(cloud.now.hosts) == [host_id(2), host_id(3)]
    assert cloud.spread() == [0, 2, 2] or sum(cloud.spread()) == 4


# --- new servers -------------------------------------------------------------------------------------


def test_new_servers_are_spread_by_free_share() -> None:
    cloud = running_cloud((2, 0, 1))
    for number in (10, 11, 12):
        cloud.create(number)
    assert cloud.settle().converged
    assert cloud.spread() == [2, 2, 2]


def test_a_server_without_room_waits_and_says_by_how_much() -> None:
    cloud = running_cloud((1,), capacity_mib=256)
    cloud.create(3)
    report = cloud.settle()
    [waiting] = report.waiting
    assert waiting.kind is WaitKind.CAPACITY
    assert "host-1 has no room for vm-3 (needs 256 MiB and 1 vCPU, 0 MiB and 7 vCPUs free)" in waiting.reason
    assert "256 MiB and 0 vCPUs are missing" in waiting.reason


def test_a_host_that_was_asked_for_is_taken_or_waited_for() -> None:
    cloud = running_cloud((0, 0))
    cloud.create(1, on=2)
    cloud.settle()
    assert cloud.where(1) == host_id(2)
    cloud.intend(2, HostIntent.CORDONED)
    cloud.create(2, on=2)
    cloud.settle()
    assert "vm-2 cannot be placed on host-2: host-2 is cordoned" in cloud.reasons("vm-2")
    cloud.intend(2, HostIntent.ACTIVE)
    assert cloud.settle().converged
    assert cloud.where(2) == host_id(2)


def test_a_name_still_in_use_is_not_started_twice() -> None:
    cloud = running_cloud((0, 0))
    old = ServerStatus(
        id=server_id(1), epoch=4, state=RunState.RUNNING, release=OLD, size=Size(vcpus=1, memory_mib=64)
    )
    cloud.world.extra[host_id(2)] = (old,)
    cloud.create(1)
    cloud.settle()
    assert "still seen on host-2" in cloud.reasons("vm-1")
    cloud.world.extra.clear()
    assert cloud.settle().converged


def test_what_should_be_gone_still_takes_room() -> None:
    cloud = running_cloud((0,), capacity_mib=256)
    old = ServerStatus(
        id=server_id(9), epoch=4, state=RunState.PAUSED, release=OLD, size=Size(vcpus=1, memory_mib=64)
    )
    cloud.world.extra[host_id(1)] = (old,)
    cloud.create(1)
    cloud.settle()
    assert "192 MiB" in cloud.reasons("vm-1")


def test_removed_servers_go_when_no_move_of_them_runs() -> None:
    cloud = running_cloud((1, 0))
    cloud.request(1, 2)
    cloud.plan()
    assert cloud.now.moves
    cloud.remove(1)
    cloud.plan()
    assert "removed once move-" in cloud.reasons("vm-1")
    cloud.settle()
    assert not cloud.now.servers
    assert not cloud.now.moves


def test_a_release_without_the_machine_type_is_no_destination() -> None:
    cloud = running_cloud((1, 0))
    cloud.want(machine_types={OLD: ("other",), NEW: ("m",)})
    cloud.request(1, 2)
    cloud.settle()
    assert "lacks the machine type" in cloud.reasons("vm-1")
    cloud.create(2, machine="unheard-of")
    cloud.settle()
    assert "machine type unheard-of" in cloud.reasons("vm-2")


# --- requested moves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [3, None])
def test_a_request_is_served_once(destination: int | None) -> None:
    cloud = running_cloud((1, 1, 0))
    cloud.request(1, destination)
    assert cloud.settle().converged
    assert cloud.where(1) == host_id(3)
    assert cloud.moves_done() == 1
    assert cloud.now.served_requests == cloud.policy.requested_moves
    assert cloud.world.moves_done == {server_id(1): 1}
    cloud.campaign()
    cloud.settle()
    assert server_id(1) in cloud.now.served_requests, "the campaign is not fought for an old request"
    cloud.want(requested_moves={})
    cloud.settle()
    assert not cloud.now.served_requests
    cloud.request(1, 1 if cloud.where(1) != host_id(1) else 2)
    moved = cloud.moves_done()
    cloud.settle()
    assert cloud.moves_done() == moved + 1


def test_a_request_without_room_says_how_much_and_where_it_would_fit() -> None:
    cloud = running_cloud((1, 4, 0))
    cloud.request(1, 2)
    report = cloud.settle()
    [waiting] = report.waiting
    assert waiting.kind is WaitKind.CAPACITY
    assert "host-2 has no room for vm-1 (needs 256 MiB and 1 vCPU, 0 MiB and 4 vCPUs free)" in waiting.reason
    assert waiting.remedy == "it would fit on host-3"


@pytest.mark.parametrize(
    ("intent", "reason"),
    [(HostIntent.CORDONED, "host-2 is cordoned"), (HostIntent.DRAINED, "host-2 is drained")],
)
def test_a_request_to_a_host_out_of_service_waits(intent: HostIntent, reason: str) -> None:
    cloud = running_cloud((1, 0))
    cloud.intend(2, intent)
    cloud.request(1, 2)
    cloud.settle()
    assert reason in cloud.reasons("vm-1")
    cloud.intend(2, HostIntent.ACTIVE)
    assert cloud.settle().converged
    assert cloud.where(1) == host_id(2)


def test_failures_of_a_request_are_forgotten_with_it() -> None:
    cloud = running_cloud((1, 0))
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, UNAVAILABLE)] * 5
    cloud.request(1, 2)
    cloud.settle()
    assert "could not be moved in 5 attempts" in cloud.reasons("vm-1")
    cloud.want(requested_moves={})
    assert cloud.settle().converged
    assert not cloud.now.failed_moves


# --- intents -----------------------------------------------------------------------------------------


def test_a_drain_empties_and_stays_empty_until_activated() -> None:
    cloud = running_cloud((2, 1))
    cloud.intend(1, HostIntent.DRAINED)
    cloud.plan()
    assert cloud.phase(1) is HostPhase.EMPTYING
    assert cloud.settle().converged
    assert cloud.phase(1) is HostPhase.DRAINED
    cloud.create(9)
    cloud.settle()
    assert cloud.spread() == [0, 4]
    cloud.intend(1, HostIntent.ACTIVE)
    cloud.create(10)
    cloud.settle()
    assert cloud.spread() == [1, 4]


def test_a_drain_without_room_moves_what_fits_and_names_the_rest() -> None:
    cloud = running_cloud((2, 3))
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    assert cloud.spread() == [1, 4]
    assert "host-2 has no room for" in " ".join(w.reason for w in cloud.plan().waiting)


def test_a_cordoned_host_keeps_what_it_has_and_takes_nothing() -> None:
    cloud = running_cloud((1, 1))
    cloud.intend(1, HostIntent.CORDONED)
    cloud.create(9)
    assert cloud.settle().converged
    assert cloud.spread() == [1, 2]


# --- capacity ----------------------------------------------------------------------------------------


def test_the_share_counts_what_is_placed_and_what_could_be() -> None:
    cloud = running_cloud((1, 1))
    cloud.want(promised=Size(vcpus=2, memory_mib=4096))
    report = cloud.settle()
    assert report.capacity.share == 0.5
    assert report.capacity.in_service == Size(vcpus=16, memory_mib=2048)
    cloud.intend(1, HostIntent.CORDONED)
    report = cloud.settle()
    assert report.capacity.share == (1024 + 256) / 4096
    assert report.capacity.in_service == Size(vcpus=8, memory_mib=1024)


def test_room_for_says_by_how_much_and_where() -> None:
    cloud = running_cloud((3, 1))
    look = cloud.world.look()
    spec = server_spec(server_id(9), 512)
    assert room_for(cloud.policy, look, cloud.now, spec, None) is None
    assert room_for(cloud.policy, look, cloud.now, spec, host_id(2)) is None
    refusal = room_for(cloud.policy, look, cloud.now, spec, host_id(1))
    assert refusal is not None
    assert refusal.lacks == Size(vcpus=0, memory_mib=256)
    assert refusal.fits_on == (host_id(2),)
    assert refusal.remedy == "it would fit on host-2"


def test_room_for_counts_servers_that_are_still_to_be_placed() -> None:
    cloud = running_cloud((0,))
    cloud.create(1, 768)
    look = cloud.world.look()
    spec = server_spec(server_id(9), 512)
    assert (refusal := room_for(cloud.policy, look, cloud.now, spec, None)) is not None
    assert refusal.lacks == Size(vcpus=0, memory_mib=256)
    assert refusal.remedy == "free or add capacity"


def test_new_servers_prefer_upgraded_hosts_even_if_fuller() -> None:
    cloud = running_cloud((2, 0, 0))
    cloud.campaign(hosts=(2,))
    cloud.settle()
    for host in (1, 2):
        cloud.request(host, 2)
        cloud.settle()
    cloud.campaign(CampaignState.PAUSED, hosts=(2, 3))
    cloud.create(9)
    cloud.settle()
    assert cloud.where(9) == host_id(2)
    assert cloud.spread() == [0, 3, 0]


def test_room_for_a_server_that_exists_is_room_to_move() -> None:
    cloud = running_cloud((4, 4))
    spec, look = cloud.policy.servers[server_id(1)], cloud.world.look()
    assert room_for(cloud.policy, look, cloud.now, spec, host_id(1)) is None
    assert (refusal := room_for(cloud.policy, look, cloud.now, spec, None)) is not None
    assert refusal.lacks == Size(vcpus=0, memory_mib=256)


def test_room_for_without_any_host() -> None:
    cloud = Cloud(1)
    spec = server_spec(server_id(1))
    refusal = room_for(cloud.policy, cloud.world.look(), None, spec, host_id(1))
    assert refusal is not None
    assert "has not joined yet" in refusal.reason
    refusal = room_for(cloud.policy, cloud.world.look(), None, spec, None)
    assert refusal is not None
    assert refusal.lacks == Size()


# --- identity ----------------------------------------------------------------------------------------


def test_planning_again_changes_nothing() -> None:
    cloud = running_cloud((2, 1))
    before = cloud.now
    report = cloud.plan()
    assert cloud.now is before
    assert report.changes == ()
    stored = msgspec.json.decode(msgspec.json.encode(before), type=type(before))
    cloud.blueprint = stored
    cloud.plan()
    assert cloud.now == before
