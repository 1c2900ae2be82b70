"""Servers whose VMM is replaced where they are: what is decided, what waits, what decides."""

import msgspec
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import Accelerator, OperationState

VERSIONS = {OLD: "10.0.2", NEW: "11.1.3"}


def cloud_of(*layout: int, accelerator: str = "tcg", **versions: str) -> Cloud:
    cloud = running_cloud(layout)
    known = {**VERSIONS, **{ReleaseId(name): version for name, version in versions.items()}}
    cloud.world.accelerator = Accelerator(name=accelerator, reason="the only one here")
    cloud.want(release_versions=known)
    return cloud


def ask(cloud: Cloud, *servers: int, to: ReleaseId = NEW) -> None:
    cloud.want(requested_replacements={server_id(number): to for number in servers})


def test_a_server_is_replaced_where_it_is_and_only_once() -> None:
    cloud = cloud_of(1, 1)
    ask(cloud, 1)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == NEW
    assert cloud.world.under[server_id(2)] == OLD
    assert cloud.where(1) == host_id(1)
    assert cloud.now.servers[server_id(1)].epoch == 2
    assert cloud.world.moves_done == {server_id(1): 1}


def test_servers_of_one_host_take_turns_those_of_others_do_not() -> None:
    cloud = cloud_of(2, 1)
    cloud.want(parallel_moves=4)
    ask(cloud, 1, 2, 3)
    cloud.plan()
    assert sorted(move.server for move in cloud.now.moves) == [server_id(1), server_id(3)]
    assert "turn" in cloud.reasons(server_id(2))
    cloud.settle()
    assert set(cloud.world.under.values()) == {NEW}


def test_no_more_are_replaced_at_once_than_may_move_at_once() -> None:
    cloud = cloud_of(2, 2, 2)
    cloud.want(parallel_moves=2)
    ask(cloud, *range(1, 7))
    at_once: set[int] = set()

    def all_done() -> bool:
        busy = [move.source for move in cloud.now.moves if move.in_place]
        assert len(busy) == len(set(busy)), "two on one host"
        at_once.add(len(busy))
        return set(cloud.world.under.values()) == {NEW}

    cloud.follow(all_done)
    assert max(at_once) == 2


def test_a_full_host_has_room_for_it_because_the_memory_is_shared() -> None:
    cloud = running_cloud((4,), 1024, 256)
    cloud.world.accelerator = Accelerator(name="tcg", reason="")
    cloud.want(release_versions=VERSIONS)
    ask(cloud, 1, 2, 3, 4)
    cloud.settle()
    assert set(cloud.world.under.values()) == {NEW}


def test_a_host_that_gives_its_servers_away_may_replace_them_too() -> None:
    cloud = cloud_of(1)
    cloud.intend(1, HostIntent.CORDONED)
    cloud.settle()
    ask(cloud, 1)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == NEW


def test_the_row_of_the_table_that_refuses_is_named() -> None:
    cloud = cloud_of(1)
    cloud.want(release_versions={**VERSIONS, NEW: "9.2.0"})
    ask(cloud, 1)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == OLD
    assert "qemu 10.0.2 to 9.2.0, in-place, tcg: refused" in cloud.reasons(server_id(1))


def test_what_is_not_there_is_waited_for() -> None:
    cloud = cloud_of(1)
    cloud.world.releases[host_id(1)] = (OLD,)
    ask(cloud, 1)
    cloud.settle()
    assert "no intact copy" in cloud.reasons(server_id(1))
    cloud.world.releases[host_id(1)] = (OLD, NEW)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == NEW


def test_a_failed_one_is_tried_again_and_not_for_ever() -> None:
    cloud = cloud_of(1)
    error = ErrorRecord(kind="unavailable", message="no answer")
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, error)] * 2
    ask(cloud, 1)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == NEW
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, error)] * 9
    ask(cloud, 1, to=OLD)
    cloud.settle()
    assert cloud.world.under[server_id(1)] == NEW
    assert "5 attempts" in cloud.reasons(server_id(1))


def test_a_server_that_moves_is_replaced_afterwards() -> None:
    cloud = cloud_of(1, 0)
    cloud.request(1, 2)
    cloud.plan()
    ask(cloud, 1)
    cloud.plan()
    assert [move.in_place for move in cloud.now.moves] == [False]
    cloud.settle()
    assert (cloud.where(1), cloud.world.under[server_id(1)]) == (host_id(2), NEW)


def test_planning_again_changes_nothing() -> None:
    cloud = cloud_of(2)
    ask(cloud, 1)
    cloud.settle()
    before = cloud.now
    cloud.plan()
    assert cloud.now is before
    assert msgspec.json.encode(before)


def test_a_release_that_corrupts_what_it_moves_is_only_ever_left_in_place() -> None:
    cloud = running_cloud((1, 0))
    cloud.world.accelerator = Accelerator(name="tcg", reason="")
    cloud.want(release_versions={OLD: "7.2", NEW: "10.0.2"})
    cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "misses pages" in cloud.reasons(server_id(1))
    assert "replace-vmm" in cloud.reasons(server_id(1))
    ask(cloud, 1)
    cloud.settle()
    assert (cloud.where(1), cloud.world.under[server_id(1)]) == (host_id(1), NEW)


def test_a_server_with_places_for_memory_is_left_in_place_under_emulation() -> None:
    cloud = cloud_of(1, 0)
    spec = cloud.policy.servers[server_id(1)]
    spec = msgspec.structs.replace(spec, boot_memory_mib=spec.size.memory_mib, max_memory_mib=1024)
    cloud.want(servers={spec.id: spec})
    cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "memory that can be plugged" in cloud.reasons(server_id(1))
    ask(cloud, 1)
    cloud.settle()
    assert (cloud.where(1), cloud.world.under[server_id(1)]) == (host_id(1), NEW)
