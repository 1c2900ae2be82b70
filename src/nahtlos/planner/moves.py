"""Whether a server can be moved now, and the decision to do so. Where to is not decided here."""

from nahtlos.model.blueprint import HostPhase, PlannedMove, Waiting, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Component
from nahtlos.model.power import PowerState
from nahtlos.model.prediction import Means
from nahtlos.planner.admission import why_not_admitted
from nahtlos.planner.draft import Draft
from nahtlos.planner.reserve import KEEP, why_move_breaks
from nahtlos.planner.volumes import why_held_by_volumes
from nahtlos.planner.ways import deferred, means_of_move, why_no_post_copy, why_over_budget

MAX_ATTEMPTS = 5
LONGEST_PATIENCE = 60.0
REQUESTED = "requested"
"""Reason of a move that an operator asked for."""
CAMPAIGN = "campaign: "
"""How the reason of a campaign's move begins."""


def why_not_ready(draft: Draft, server: ServerId) -> Waiting | None:
    """Why `server`, which nothing moves, cannot leave its host now; None if it can."""
    owner = draft.servers[server]
    if not draft.observed.connected(owner.host):
        return _wait(server, WaitKind.HOST, f"{server}: the agent of {owner.host} is not connected")
    if draft.attempts.get(server, 0) >= MAX_ATTEMPTS:
        return _given_up(draft, server)
    if busy := draft.observed.busy.get(server):
        return _wait(server, WaitKind.MOVE, f"{server}: {busy} is still being ended")
    status = draft.observed.server_on(server, owner.host)
    if status is None or status.epoch != owner.epoch:
        return _wait(server, WaitKind.HOST, f"{server} has not been seen on {owner.host} yet")
    if asked := _why_asked_first(draft, server):
        return asked
    if status.state is RunState.CRASHED:
        return _wait(
            server,
            WaitKind.BLOCKED,
            f"{server} has crashed on {owner.host}, so it cannot be moved",
            f"find out why from its console, or delete {server}",
        )
    if status.state is not RunState.RUNNING:
        return _wait(server, WaitKind.HOST, f"{server} is {status.state} on {owner.host}, not running yet")
    if draft.hosts[owner.host].phase is HostPhase.SWITCHING:
        return _wait(server, WaitKind.HOST, f"{server} stays while {owner.host} is switched and verified")
    if held := why_held_by_volumes(draft, server):
        return _wait(server, WaitKind.MOVE, held)
    host = draft.replaced
    if host and draft.hosts[host].replacing is Component.STORAGE and host in draft.volume_hosts(server):
        text = f"{server} is not moved while the storage daemon of {host} is replaced"
        return _wait(server, WaitKind.HOST, text)
    return None


def _why_asked_first(draft: Draft, server: ServerId) -> Waiting | None:
    """Why a server that was asked to stop, or to boot anew, is left where it is until it has."""
    spec, owner = draft.policy.servers.get(server), draft.servers[server]
    status, seen = draft.observed.server_on(server, owner.host), draft.observed.host(owner.host)
    if spec is None or status is None or seen is None or "power" not in seen.knows:
        return None
    if spec.power.state is PowerState.ON and status.power == spec.power.serial:
        return None
    what = {PowerState.ON: "boots anew", PowerState.OFF: "is stopped", PowerState.SUSPENDED: "is suspended"}
    text = f"{server} {what[spec.power.state]} first"
    return Waiting(subject=server, kind=WaitKind.MOVE, reason=text)


def _given_up(draft: Draft, server: ServerId) -> Waiting:
    failure = draft.failed_moves.get(server)
    error = failure.error if failure else None
    message = f", last: {error.message}" if error else ""
    hint = f"{error.remedy}; then " if error and error.remedy else "correct the cause, then "
    return _wait(
        server,
        WaitKind.OPERATOR,
        f"{server} could not be moved in {MAX_ATTEMPTS} attempts{message}",
        f"{hint}ask anew: pause and resume the campaign, activate and drain the host, or request the move",
    )


def _wait(server: ServerId, kind: WaitKind, reason: str, remedy: str = "") -> Waiting:
    return Waiting(subject=server, kind=kind, reason=reason, remedy=remedy)


def start_or_wait(draft: Draft, server: ServerId, destination: HostId, reason: str) -> None:
    """Move `server`, or say that it waits for its turn, or why it is left where it is."""
    means = means_of_move(draft, server)
    if over := why_over_budget(draft, server, means, draft.hosts[destination].release):
        draft.waiting.append(deferred(server, over))
        return
    if means is Means.POST_COPY and (unable := why_no_post_copy(draft, server, destination)):
        draft.waiting.append(deferred(server, f"it would not end but by post-copy, and {unable}"))
        return
    if broken := why_move_breaks(draft, server, destination):
        draft.wait(server, WaitKind.CAPACITY, f"{server} is not moved to {destination}: {broken}", KEEP)
        return
    if full := why_not_admitted(draft, server, destination):
        draft.wait(server, WaitKind.MOVE, f"{server} waits for its turn: {full}")
        return
    owner, failures = draft.servers[server], draft.attempts.get(server, 0)
    move = PlannedMove(
        id=draft.next_operation("move"),
        server=server,
        source=owner.host,
        destination=destination,
        epoch=owner.epoch + 1,
        reason=reason,
        patience_seconds=min(2.0 ** (failures - 1), LONGEST_PATIENCE) if failures else 0.0,
        slow_down=means is Means.SLOWED,
        post_copy=means is Means.POST_COPY,
    )
    draft.add_move(move)
    draft.change(f"{server} moves from {owner.host} to {destination}: {reason}")


def forget_old_failures(draft: Draft) -> None:
    """Failures count only as long as somebody wants the move: asking anew begins from zero."""
    for server in (*draft.attempts, *draft.failed_moves):
        if server not in draft.wanted and server not in draft.moving:
            draft.attempts.pop(server, None)
            draft.failed_moves.pop(server, None)
