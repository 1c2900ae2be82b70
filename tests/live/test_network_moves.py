"""Handovers under load on real namespaces, every frame counted: the short form of `make bench-network`."""

import pytest
from benchmarks import network_moves as moves
from benchmarks.network_hosts import World, missing_programs
from benchmarks.network_learning import Learning

from nahtlos.lab import topology

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]


OUTSIDE = (("from-outside",), ("to-outside",), ("from-outside6",), ("to-outside6",))


@pytest.mark.parametrize("hosts", [2, 3])
async def test_no_frame_is_lost_or_doubled_in_any_direction(hosts: int) -> None:
    with World(hosts) as world:
        names = [host.name for host in world.compute]
        plan = moves.rounds(4, names, seed=hosts)
        outcome = await moves.run(moves.Gate(world), world.topology.client, names, plan)
    assert outcome.handovers >= 4
    assert outcome.losses() == []
    assert (outcome.total("lost"), outcome.total("duplicated")) == (0, 0)
    assert (outcome.counts.strays, outcome.counts.spoiled) == (0, 0)
    for kinds in (("inside", "ipv4"), ("inside", "ipv6"), *OUTSIDE):
        assert outcome.total("sent", *kinds) > 100, kinds


async def test_the_same_load_shows_what_a_learning_bridge_loses() -> None:
    """The count can fail: this way to move loses what is sent during the blackout."""
    cables = topology.create("nlt-learn", 2)
    way = Learning(cables)
    try:
        names = [node.name for node in cables.hosts]
        plan = [(moves.Leg("mover-0", names[0], names[1], 0.1),)]
        outcome = await moves.run(way, cables.client, names, plan, ipv6_outside=False)
    finally:
        way.close()
        topology.destroy("nlt-learn")
    assert outcome.total("lost", "to-mover-0") >= 50
    assert outcome.total("lost", "to-mover-1") == 0
