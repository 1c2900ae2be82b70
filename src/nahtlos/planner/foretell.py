"""What is said of one move beforehand: its way, the row of the table that decides, what is predicted, and
what the other ways would have cost. Says; decides nothing.
"""

import msgspec

from nahtlos.model.blueprint import ForecastMove, PlannedMove, Strategy
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.prediction import Estimate, Means
from nahtlos.model.version_pairs import Verdict, Way
from nahtlos.planner.destinations import open_hosts, pack, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.estimate import ORDER
from nahtlos.planner.ways import predicted, row_for, why_no_post_copy, why_not_moved

WAYS = {
    Means.IN_PLACE: Way.IN_PLACE,
    Means.PRE_COPY: Way.MOVE,
    Means.SLOWED: Way.MOVE,
    Means.POST_COPY: Way.MOVE,
}


def means_of(move: PlannedMove) -> Means:
    if move.in_place:
        return Means.IN_PLACE
    if move.post_copy:
        return Means.POST_COPY
    return Means.SLOWED if move.slow_down else Means.PRE_COPY


def release_of(draft: Draft, move: PlannedMove) -> ReleaseId | None:
    """By which it runs afterwards."""
    return move.release or draft.hosts[move.destination].release


def prediction(draft: Draft, move: PlannedMove) -> Estimate:
    return predicted(draft, move.server, means_of(move), release_of(draft, move))


def foretold(draft: Draft, move: PlannedMove) -> ForecastMove:
    """`draft` as of the moment it was begun: the server is still its source's."""
    means, release, said = means_of(move), release_of(draft, move), prediction(draft, move)
    row = row_for(draft, move.server, WAYS[means], release)
    return ForecastMove(
        server=move.server,
        source=move.source,
        destination=move.destination,
        seconds=said.seconds,
        gap_ms=said.blackout_ms,
        gap_ms_max=said.blackout_ms_max,
        brownout_seconds=said.brownout_seconds,
        means=means,
        row=str(row) if row is not None else "",
        row_source=row.source if row is not None else "",
        why=_why(draft, move),
        alternatives=_alternatives(draft, move.server, means, release),
    )


def _why(draft: Draft, move: PlannedMove) -> str:
    campaign = draft.open_campaign
    if not move.in_place or campaign is None:
        return ""
    if campaign.strategy is Strategy.IN_PLACE:
        return "as was asked for"
    if why := why_not_moved(draft, campaign, move.server):
        return why
    others = open_hosts(draft, without=move.source, as_if_connected=True)
    if not pack(draft, [move.server], others).left:
        return ""
    nowhere = why_nowhere(draft, move.server, others)
    return nowhere.reason if nowhere.barred else "no room on another host"


def _alternatives(
    draft: Draft, server: ServerId, taken: Means, release: ReleaseId | None
) -> tuple[Estimate, ...]:
    others = [_alternative(draft, server, means, release) for means in ORDER if means is not taken]
    return tuple(sorted(others, key=lambda e: (bool(e.refused), not e.converges, e.blackout_ms)))


def _alternative(draft: Draft, server: ServerId, means: Means, release: ReleaseId | None) -> Estimate:
    said, spec = predicted(draft, server, means, release), draft.policy.servers.get(server)
    row = row_for(draft, server, WAYS[means], release)
    if row is not None and row.verdict is Verdict.REFUSED:
        return msgspec.structs.replace(said, refused=f"{row.why} ({row.source})")
    if means is Means.SLOWED and not (spec is not None and spec.allow_slowdown):
        return msgspec.structs.replace(said, refused="its owner has not permitted to slow it down")
    if means is Means.POST_COPY and not (spec is not None and spec.allow_post_copy):
        return msgspec.structs.replace(said, refused="its owner has not permitted post-copy")
    if means is Means.POST_COPY and (unable := why_no_post_copy(draft, server)):
        return msgspec.structs.replace(said, refused=unable)
    return said
