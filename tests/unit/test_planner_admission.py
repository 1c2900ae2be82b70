"""How many moves are begun at once: in the cloud, from and to one host, over one link."""

import pytest
from planner_world import Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.prediction import Experience
from nahtlos.planner.admission import HEADROOM, LEAST_BYTES
from nahtlos.planner.estimate import ASSUMED_DIRTY_RATE, MIB

UNMEASURED = int(ASSUMED_DIRTY_RATE * HEADROOM)


def drained(layout: tuple[int, ...], *hosts: int, **wanted: object) -> Cloud:
    """After one plan with `hosts` drained."""
    cloud = running_cloud(layout, capacity_mib=4096, vcpus=32)
    cloud.want(**{"parallel_moves": 64, "parallel_moves_per_host": 64, **wanted})
    for host in hosts:
        cloud.intend(host, HostIntent.DRAINED)
    cloud.plan()
    return cloud


@pytest.mark.parametrize(
    ("layout", "hosts", "wanted", "begun"),
    [
        ((8, 0, 0), (1,), {}, 8),
        ((8, 0, 0), (1,), {"parallel_moves": 3}, 3),
        ((8, 0, 0), (1,), {"parallel_moves_per_host": 2}, 2),
        ((4, 4, 0), (1, 2), {"parallel_moves_per_host": 2}, 2),
        ((4, 4, 0, 0), (1, 2), {"parallel_moves_per_host": 2}, 4),
        ((8, 0, 0), (1,), {"move_bytes_per_second": 3 * UNMEASURED}, 3),
        ((8, 0, 0), (1,), {"move_bytes_per_second": UNMEASURED // 2}, 1),
        ((4, 4, 0), (1, 2), {"move_bytes_per_second": 2 * UNMEASURED}, 2),
    ],
    ids=[
        "all at once",
        "as many as the cloud permits",
        "as many as one host sends",
        "as many as one host receives",
        "two hosts, each as many as it may",
        "as many as the link of the source carries",
        "one always",
        "as many as the link of the destination carries",
    ],
)
def test_how_many_moves_begin(
    layout: tuple[int, ...], hosts: tuple[int, ...], wanted: dict[str, object], begun: int
) -> None:
    cloud = drained(layout, *hosts, **wanted)
    assert len(cloud.now.moves) == begun
    moving = {move.server for move in cloud.now.moves}
    for number in range(1, 1 + sum(layout)):
        server = server_id(number)
        if server not in moving:
            assert "waits for its turn" in cloud.reasons(server)


def test_what_a_server_writes_is_what_its_move_needs_of_the_link() -> None:
    rates = {server_id(n): rate * MIB for n, rate in ((1, 200), (2, 1), (3, 1), (4, 1))}
    known = Experience(dirty_rates=rates)
    link = int(200 * MIB * HEADROOM) + LEAST_BYTES
    cloud = drained((4, 0, 0), 1, experience=known, move_bytes_per_second=link)
    moving = {move.server for move in cloud.now.moves}
    assert server_id(1) in moving and len(moving) == 2
    quiet = drained((3, 0, 0), 1, experience=Experience(), move_bytes_per_second=link)
    assert len(quiet.now.moves) == 3


def test_those_that_waited_are_moved_in_their_turn() -> None:
    cloud = drained((8, 0, 0), 1, parallel_moves_per_host=2, move_bytes_per_second=2 * UNMEASURED)
    assert cloud.settle().converged
    assert not [server for server, owner in cloud.now.servers.items() if owner.host == host_id(1)]
    assert max(len(blueprint.moves) for blueprint in cloud.history) == 2
