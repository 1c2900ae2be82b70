"""When a pre-copy is switched, and what convergence does for the servers of a host: as tables."""

import pytest
from test_agent_ledger import VM, order, server

from nahtlos.model.config import HostConfig, NetworkConfig
from nahtlos.model.ids import HostId, NetworkId, PortId
from nahtlos.model.inventory import RunState
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import Size
from nahtlos.physical.agent.converge import Act, pinned_ports, server_steps
from nahtlos.physical.agent.convergence import ENOUGH_PASSES, Course, Pass, Permitted
from nahtlos.physical.agent.ledger import Hold, Ownership
from nahtlos.physical.agent.precopy import (
    LATEST_LOOK,
    SOONEST_LOOK,
    Look,
    Sync,
    Verdict,
    fraction,
    look_again,
    seen,
    to_send,
    verdict,
    with_to_come,
)
from nahtlos.physical.ports import MigrationPhase, MigrationProgress, VmmId, VmmStatus

MB = 1 << 20


def progress(passes: int, remaining: int, *, transferred: int = 100 * MB) -> MigrationProgress:
    return MigrationProgress(
        phase=MigrationPhase.ACTIVE,
        passes=passes,
        remaining=remaining,
        total=256 * MB,
        transferred=transferred,
    )


@pytest.mark.parametrize(
    ("sync", "now", "seen_now", "expected"),
    [
        (Sync(passes=1, at=1.0, remaining=MB), 1.0, progress(1, MB), Verdict.WAIT),
        (Sync(passes=2, at=1.0, remaining=MB), 1.001, progress(2, MB), Verdict.SWITCH),
        (Sync(passes=2, at=1.0, remaining=MB), 1.1, progress(2, MB), Verdict.WAIT),
        (Sync(passes=5, at=1.0, remaining=90 * MB), 1.001, progress(5, MB), Verdict.WAIT),
        (Sync(passes=2, at=1.0, remaining=MB), 1.001, progress(2, 5 * MB), Verdict.WAIT),
        (
            Sync(passes=9, at=8.995, remaining=9 * MB),
            9.0,
            progress(9, 9 * MB, transferred=900 * MB),
            Verdict.SWITCH,
        ),
        (
            Sync(passes=9, at=8.9, remaining=99 * MB),
            9.0,
            progress(9, 9 * MB, transferred=900 * MB),
            Verdict.WAIT,
        ),
        (Sync(passes=9, at=8.9, remaining=99 * MB), 9.0, progress(9, 90 * MB), Verdict.WAIT),
        (Sync(passes=9, at=30.9, remaining=99 * MB), 31.0, progress(9, 90 * MB), Verdict.GIVE_UP),
        (Sync(), 31.0, MigrationProgress(phase=MigrationPhase.NONE), Verdict.GIVE_UP),
    ],
    ids=[
        "first pass",
        "fresh and small",
        "stale",
        "large at its sync",
        "too much now",
        "late, cheap enough",
        "late, and late in its pass",
        "late, too dear",
        "deadline",
        "never began",
    ],
)
def test_the_moment_to_switch(sync, now, seen_now, expected):
    assert verdict(sync, seen_now, now=now, started=0.0, deadline=30.0) is expected


def test_a_sync_is_remembered_when_it_is_first_seen():
    first = seen(Sync(), progress(1, 7), 3.0)
    assert first == Sync(passes=1, at=3.0, remaining=7, dirtied_since=3.0)
    assert seen(first, progress(1, 5), 4.0) is first


def test_progress_is_a_share_of_the_first_pass():
    assert fraction(progress(0, 256 * MB)) == 0.0
    assert fraction(progress(1, 64 * MB)) == 0.75
    assert fraction(progress(2, 64 * MB)) == 1.0


def config(*servers, removed=()) -> HostConfig:
    spec = NetworkSpec(
        id=NetworkId("tenant"),
        vni=100,
        cidr="10.77.0.0/24",
        gateway_ip="10.77.0.1",
        gateway_mac="02:00:00:00:00:01",
        gateway_host=HostId("edge-1"),
        dhcp_ip="10.77.0.2",
    )
    network = NetworkConfig(spec=spec, ports=order().ports, gateway_vtep="10.99.0.5", vteps=())
    return HostConfig(
        host=HostId("host-1"),
        generation=1,
        release=None,
        networks=(network,),
        servers=servers,
        removed_servers=removed,
    )


def held(epoch: int, hold: Hold = Hold.OWNED) -> dict:
    return {VM: Ownership(epoch=epoch, hold=hold, server=server(epoch))}


def vmm(epoch: int, state: RunState = RunState.RUNNING) -> VmmStatus:
    return VmmStatus(id=VmmId(VM, epoch), state=state, release=None, size=Size())


BUSY = frozenset({VM})


@pytest.mark.parametrize(
    ("wanted", "owned", "vmms", "busy", "expected"),
    [
        (config(server(1)), {}, (), frozenset(), [(Act.START, 1)]),
        (config(server(1)), {}, (), BUSY, []),
        (config(server(1)), held(1), (vmm(1),), frozenset(), []),
        (config(server(1)), held(1), (), frozenset(), [(Act.RESTART, 1)]),
        (config(server(1)), held(1), (vmm(1, RunState.CRASHED),), frozenset(), [(Act.RESTART, 1)]),
        (config(server(1)), held(1), (), BUSY, []),
        (config(server(1)), held(2, Hold.YIELDED), (), frozenset(), []),
        (config(server(1)), held(3), (vmm(3),), frozenset(), []),
        (config(), held(3), (), frozenset(), [(Act.RESTART, 3)]),
        (config(removed=(VM,)), held(3), (vmm(3),), frozenset(), [(Act.REMOVE, 3)]),
        (config(removed=(VM,)), held(3), (vmm(3),), BUSY, []),
        (config(), held(2, Hold.YIELDED), (vmm(1),), frozenset(), [(Act.END_STRAY, 1)]),
        (config(), held(2, Hold.YIELDED), (vmm(1),), BUSY, []),
        (config(), {}, (vmm(1),), frozenset(), []),
    ],
    ids=[
        "new",
        "arriving by a move",
        "as it should be",
        "gone",
        "crashed",
        "gone, but moving",
        "handed over, configuration late",
        "back by a later epoch",
        "unmentioned but owned: kept",
        "removed",
        "removed while moving: later",
        "old copy after a hand-over",
        "old copy while moving",
        "foreign: left alone",
    ],
)
def test_what_is_done_for_a_server(wanted, owned, vmms, busy, expected):
    assert [(s.act, s.epoch) for s in server_steps(wanted, owned, vmms, busy)] == expected


@pytest.mark.parametrize(
    ("owned", "busy", "pinned"),
    [
        ({}, frozenset(), False),
        ({}, BUSY, True),
        (held(1), frozenset(), False),
        (held(2, Hold.YIELDED), frozenset(), True),
    ],
    ids=["unknown", "moving", "here as configured", "handed over, configuration late"],
)
def test_ports_the_host_knows_better(owned, busy, pinned):
    assert pinned_ports(config(), owned, busy) == (frozenset({PortId("p1")}) if pinned else frozenset())


@pytest.mark.parametrize(
    ("before", "now", "seen_now", "expected"),
    [
        (None, 1.0, progress(1, 100 * MB), SOONEST_LOOK),
        (Look(at=1.0, passes=1, remaining=100 * MB), 1.01, progress(1, 99 * MB), LATEST_LOOK),
        (Look(at=1.0, passes=1, remaining=3 * MB), 1.01, progress(1, 2 * MB), 0.01),
        (Look(at=1.0, passes=1, remaining=3 * MB), 1.01, progress(1, 0), SOONEST_LOOK),
        (Look(at=1.0, passes=1, remaining=MB), 1.01, progress(2, 30 * MB), SOONEST_LOOK),
        (Look(at=1.0, passes=1, remaining=MB), 1.01, progress(1, MB), SOONEST_LOOK),
    ],
    ids=["the first", "far from its end", "nearer", "at its end", "a new pass", "it stands still"],
)
def test_a_pre_copy_is_looked_at_more_often_near_the_end_of_a_pass(before, now, seen_now, expected) -> None:
    assert look_again(before, seen_now, now).again == pytest.approx(expected)


def test_what_is_on_its_way_and_what_is_still_touched_counts_against_the_budget():
    """32 MiB left at 100 MiB/s fit 0.35 s; with 6 MiB more between the hosts, or touched, they do not."""
    course = Course(
        since=0.0, count=2, at=1.0, passes=(Pass(seconds=1.0, sent=100 * MB, left=32 * MB),) * ENOUGH_PASSES
    )
    settled, permitted = progress(9, 32 * MB), Permitted(pause=0.35)

    def said(sync: Sync) -> Verdict:
        return verdict(sync, settled, now=9.0, started=0.0, deadline=30.0, course=course, permitted=permitted)

    fresh = Sync(passes=9, at=9.0, remaining=32 * MB)
    assert said(fresh) is Verdict.SWITCH
    assert said(with_to_come(fresh, 6 * MB, None)) is not Verdict.SWITCH
    assert said(with_to_come(fresh, 0, 300 * MB)) is not Verdict.SWITCH
    assert to_send(with_to_come(fresh, 5, 1 << 40), settled) == settled.total + 5
