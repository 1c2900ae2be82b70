"""How operations that ended change the blueprint.

    move    DONE    its destination owns the server from now on, by the move's epoch
            UNDONE  a failed attempt is counted; the server may be tried again
            STUCK   it stays in the blueprint and is shown to the operator until it ends otherwise
    verify  DONE    the host goes back to service once it also reports the release as verified
            else    the failure is remembered; what follows from it is the campaign's decision

An operation leaves the blueprint only here, and only when its end was seen.
"""

from collections.abc import Collection

import msgspec

from nahtlos.model.blueprint import Failure, PlannedMove, PlannedVerify, WaitKind
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.inventory import OperationState, OperationStatus
from nahtlos.model.nouns import Assignment
from nahtlos.planner.draft import Draft, Observed

STRENGTH = {OperationState.UNDONE: 1, OperationState.STUCK: 2, OperationState.DONE: 3}
"""Where the two ends of a move say different things: the destination's durable ownership decides, and an
end that is stuck must not be hidden by one that is not."""


def ended(observed: Observed, operation: OperationId, hosts: Collection[HostId]) -> OperationStatus | None:
    """How the operation ended, as one of `hosts` tells it; None while none of them says it has."""
    told = [
        status
        for host, status in observed.operations.get(operation, ())
        if host in hosts and status.state in STRENGTH
    ]
    return max(told, key=lambda status: (STRENGTH[status.state], status.error is not None), default=None)


def absorb_outcomes(draft: Draft) -> None:
    for move in tuple(draft.moves.values()):
        _absorb_move(draft, move)
    for verify in tuple(draft.verifies.values()):
        _absorb_verify(draft, verify)


def _absorb_move(draft: Draft, move: PlannedMove) -> None:
    status = ended(draft.observed, move.id, (move.source, move.destination))
    if status is None:
        _wait_for_agents(draft, move)
    elif status.state is OperationState.DONE:
        _hand_over(draft, move)
    elif status.state is OperationState.UNDONE:
        _count_attempt(draft, move, status.error)
    else:
        draft.stuck.add(move.id)
        draft.wait(
            move.server,
            WaitKind.BLOCKED,
            f"{move.id} of {move.server} to {move.destination} is stuck{_why(status.error)}",
            _remedy(status.error, f"look at both hosts, then resolve {move.id} by hand"),
        )


def _wait_for_agents(draft: Draft, move: PlannedMove) -> None:
    for host in (move.source, move.destination):
        if not draft.observed.connected(host):
            draft.wait(
                move.server,
                WaitKind.HOST,
                f"{move.id} of {move.server} to {move.destination}: the agent of {host} is not connected",
            )
    told = draft.observed.operations.get(move.id, ())
    for host, status in told:
        if status.waits_for:
            draft.wait(
                move.server,
                WaitKind.HOST,
                f"{move.id} of {move.server} to {move.destination}: {host} waits for {status.waits_for}",
            )
    if not told:
        again = f" (tried again after {move.patience_seconds:g} s)" if move.patience_seconds else ""
        draft.wait(
            move.server,
            WaitKind.MOVE,
            f"{move.id} of {move.server} to {move.destination} has not begun yet{again}",
        )


def _hand_over(draft: Draft, move: PlannedMove) -> None:
    draft.drop_move(move)
    draft.servers[move.server] = Assignment(server=move.server, host=move.destination, epoch=move.epoch)
    draft.attempts.pop(move.server, None)
    draft.failed_moves.pop(move.server, None)
    if draft.policy.campaign is not None:
        draft.ended_moves += 1
    if move.in_place:
        draft.change(f"{move.server} runs {move.release}, in place")
    else:
        draft.change(f"{move.server} has moved from {move.source} to {move.destination}")


def _count_attempt(draft: Draft, move: PlannedMove, error: ErrorRecord | None) -> None:
    draft.drop_move(move)
    attempts = draft.attempts.get(move.server, 0) + 1
    draft.attempts[move.server] = attempts
    draft.failed_moves[move.server] = Failure(
        operation=move.id, attempts=attempts, error=error, host=move.destination
    )
    draft.change(f"{move.id} of {move.server} to {move.destination} was undone{_why(error)}")


def _absorb_verify(draft: Draft, verify: PlannedVerify) -> None:
    host, seen = verify.host, draft.observed.host(verify.host)
    status = ended(draft.observed, verify.id, (host,))
    if status is None:
        if not draft.observed.connected(host):
            draft.wait(host, WaitKind.HOST, f"{verify.id}: the agent of {host} is not connected")
    elif status.state is not OperationState.DONE:
        _remember_failed_verify(draft, verify, status.error)
    elif seen is None or seen.verified_release != verify.release:
        draft.wait(
            host, WaitKind.HOST, f"{host} has ended {verify.id}, but not yet reported {verify.release}"
        )
    else:
        del draft.verifies[verify.id]
        draft.failed_verifies.pop(host, None)
        draft.return_to_service(host)
        draft.change(f"{host} has verified {verify.release}")


def _remember_failed_verify(draft: Draft, verify: PlannedVerify, error: ErrorRecord | None) -> None:
    del draft.verifies[verify.id]
    before = draft.failed_verifies.get(verify.host)
    draft.failed_verifies[verify.host] = Failure(
        operation=verify.id, attempts=before.attempts + 1 if before else 1, error=error, host=verify.host
    )
    draft.change(f"{verify.host} could not verify {verify.release}{_why(error)}")


def excused(failure: Failure) -> Failure:
    """`failure` after an operator stepped in: it may be tried anew."""
    return msgspec.structs.replace(failure, attempts=0)


def _why(error: ErrorRecord | None) -> str:
    return f": {error.message}" if error else ""


def _remedy(error: ErrorRecord | None, otherwise: str) -> str:
    return error.remedy if error and error.remedy else otherwise
