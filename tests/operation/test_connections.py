"""What a firewall remembers moves with its server: when it is sent, when it is taken up, what becomes of a
move to a host that cannot take it up. That it survives every fault is in `test_move`, whose server is behind
a strict firewall, too."""

from crash_plays import Strike
from moving import DESTINATION, MAC, SERVER, SOURCE, Run, frames
from older_release import before

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment

A, B = f"host/{SOURCE}", f"host/{DESTINATION}"


def done(run: Run) -> list[str]:
    """Verbs that took effect from the order on, with their host."""
    return [
        f"{step.host} {step.what.removeprefix('network.').removeprefix('hypervisor.')}"
        for step in run.world.trace
        if step.moment == Moment.AFTER and step.call is not None
    ]


def first(verbs: list[str], verb: str, *, after: int = -1) -> int:
    return verbs.index(verb, after + 1)


def test_it_goes_ahead_and_follows_with_the_switch_and_with_the_commit() -> None:
    run = Run().play()
    assert not run.problems
    verbs = done(run)
    source, destination = f"{SOURCE} ", f"{DESTINATION} "
    began = first(verbs, source + "move_state_begin")
    loaded = first(verbs, destination + "move_state_load", after=began)
    sent = first(verbs, source + "migrate_start", after=loaded)
    asked = first(verbs, source + "move_state_changes", after=sent)
    loaded = first(verbs, destination + "move_state_load", after=asked)
    switched = first(verbs, destination + "move_switch", after=loaded)
    left = first(verbs, source + "move_switch", after=switched)
    stopped = first(verbs, source + "pause", after=left)
    asked = first(verbs, source + "move_state_changes", after=stopped)
    loaded = first(verbs, destination + "move_state_load", after=asked)
    first(verbs, destination + "resume", after=loaded)


def test_connections_are_opened_while_the_server_leaves_and_go_on_after_it() -> None:
    """The window of which the agents' words are: what cannot be known is turned away, nothing after it."""
    run = Run().play()
    (flow,) = (f for f in run.world.paths.flows.values() if f.steady)
    assert 0 < flow.turned_away < 10
    assert flow.lost == {}


def test_without_groups_nothing_is_asked_and_no_message_more_is_sent() -> None:
    run = Run(guarded=False).play()
    assert not run.problems
    assert not [verb for verb in done(run) if "move_state" in verb]
    plain, guarded = (_messages(guarded=guarded) for guarded in (False, True))
    assert guarded == plain + 1, "what goes ahead; the rest goes with messages that are sent anyway"


def _messages(*, guarded: bool) -> int:
    return frames(A, B, guarded=guarded)


def test_a_move_that_was_undone_is_as_if_it_had_never_begun() -> None:
    """Before the switch too, where the path itself needs no undoing: nothing is noted any more."""
    at = Strike(SOURCE, "hypervisor", "migrate_start", 1, Moment.BEFORE)
    run = Run(at=at, act=Act.REFUSED).play()
    assert not run.problems
    assert run.status is not None and run.status.state is OperationState.UNDONE
    firewalls = run.world.paths.firewalls
    assert not firewalls.strangers(DESTINATION, MAC)
    assert firewalls.noted_changes(SOURCE, MAC, switched=False) is None


# --- a neighbouring release --------------------------------------------------------------------------


OLDER = before("MoveState", fields=("states",))


def test_a_destination_that_does_not_know_of_it_is_refused_before_the_switch() -> None:
    run = Run(dress={DESTINATION: OLDER}).play()
    assert not run.problems
    assert run.status is not None and run.status.state is OperationState.UNDONE
    error = run.status.error
    assert error is not None
    assert (error.kind, error.field) == ("refused", "destination")
    assert "web-1-p" in error.message
    assert "upgrade the agent of host-2" in error.remedy
    assert not [v for v in done(run) if v.endswith(("move_switch", "migrate_start"))]
    assert [v.host for v in run.world.running(SERVER)] == [SOURCE]


def test_a_server_without_groups_moves_to_it_all_the_same() -> None:
    run = Run(guarded=False, dress={DESTINATION: OLDER}).play()
    assert not run.problems
    assert run.status is not None and run.status.state is OperationState.DONE
