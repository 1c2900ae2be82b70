"""Servers whose VMM is replaced where they are: whether that can be done now, and the decision to do it.

One server of a host at a time, so that what is left of its CPUs is the others'. The table of version pairs
decides whether two releases know how.
"""

from nahtlos.model.blueprint import HostPhase, PlannedMove, Waiting, WaitKind
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.prediction import Means
from nahtlos.model.version_pairs import Verdict, Way
from nahtlos.planner.admission import running
from nahtlos.planner.draft import Draft
from nahtlos.planner.moves import MAX_ATTEMPTS, REQUESTED, why_not_ready
from nahtlos.planner.ways import deferred, row_for, runs, why_over_budget


def replace_requested(draft: Draft) -> None:
    """What operators asked for. A request is served once the server is seen to run the release."""
    for server, release in sorted(draft.policy.requested_replacements.items()):
        if server not in draft.servers or runs(draft, server, release):
            continue
        draft.wanted.add(server)
        if move := draft.moving.get(server):
            if move.release != release:
                draft.wait(
                    server, WaitKind.MOVE, f"{server} is replaced by {release} once {move.id} has ended"
                )
        else:
            replace_or_wait(draft, server, release, REQUESTED)


def replace_or_wait(draft: Draft, server: ServerId, release: ReleaseId, reason: str) -> None:
    """Replace its VMM, or say what keeps it."""
    waiting = why_not_ready(draft, server) or why_not_in_place(draft, server, release)
    if waiting is not None:
        draft.waiting.append(waiting)
        return
    owner, failures = draft.servers[server], draft.attempts.get(server, 0)
    if running(draft) >= draft.policy.parallel_moves:
        draft.wait(server, WaitKind.MOVE, f"{server} waits for its turn to be replaced by {release}")
        return
    move = PlannedMove(
        id=draft.next_operation("replace"),
        server=server,
        source=owner.host,
        destination=owner.host,
        epoch=owner.epoch + 1,
        reason=reason,
        patience_seconds=2.0 ** min(failures, MAX_ATTEMPTS) if failures else 0.0,
        release=release,
    )
    draft.add_move(move)
    draft.change(f"{server} is replaced by {release} on {owner.host}: {reason}")


def why_not_in_place(draft: Draft, server: ServerId, release: ReleaseId) -> Waiting | None:
    """Why its VMM cannot be replaced by one of `release` now; None if it can."""
    host = draft.servers[server].host
    busy = next((m for m in draft.moves.values() if m.in_place and m.source == host), None)
    if busy is not None:
        text = f"{server} waits for its turn: {busy.server} is replaced on {host} first"
        return Waiting(subject=server, kind=WaitKind.MOVE, reason=text)
    if draft.hosts[host].phase is HostPhase.SWITCHING:
        return Waiting(subject=server, kind=WaitKind.HOST, reason=f"{host} is being switched")
    seen = draft.observed.host(host)
    if seen is not None and release not in seen.releases:
        return Waiting(
            subject=server,
            kind=WaitKind.BLOCKED,
            reason=f"{server} is not replaced: {host} has no intact copy of {release}",
            remedy=f"put {release} into the releases folder of {host}",
        )
    if not draft.can_run(server, release):
        return Waiting(
            subject=server,
            kind=WaitKind.BLOCKED,
            reason=f"{server} is not replaced: {release} has not its machine type",
            remedy="choose a release that still has it",
        )
    pair = row_for(draft, server, Way.IN_PLACE, release)
    if pair is not None and pair.verdict is Verdict.REFUSED:
        return Waiting(
            subject=server,
            kind=WaitKind.BLOCKED,
            reason=f"{server} is not replaced: {pair}",
            remedy="choose a release the table of version pairs knows a way to",
        )
    over = why_over_budget(draft, server, Means.IN_PLACE, release)
    return deferred(server, over) if over else None
