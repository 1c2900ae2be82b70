"""Moves an operator asked for. A request is served once; that is remembered until policy drops it."""

from nahtlos.model.blueprint import WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.destinations import choose, open_hosts, pack, why_closed, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.moves import REQUESTED, start_or_wait, why_not_ready
from nahtlos.planner.power import carry
from nahtlos.planner.suitability import why_tied


def serve_requests(draft: Draft) -> None:
    _note_served(draft)
    for server, destination in sorted(draft.policy.requested_moves.items()):
        if server in draft.servers and server not in draft.served_requests:
            draft.wanted.add(server)
            _serve(draft, server, destination)


def _note_served(draft: Draft) -> None:
    asked = draft.policy.requested_moves
    for server, served in tuple(draft.served_requests.items()):
        if server not in asked or asked[server] != served:
            del draft.served_requests[server]
    before = {move.id: move for move in draft.parent.moves} if draft.parent else {}
    for server, destination in asked.items():
        owner = draft.servers.get(server)
        if owner is None or server in draft.moving or server in draft.served_requests:
            continue
        arrived = any(
            move.server == server
            and move.reason == REQUESTED
            and move.destination == owner.host
            and destination is None
            for move in before.values()
        )
        if arrived or owner.host == destination:
            draft.served_requests[server] = destination


def _serve(draft: Draft, server: ServerId, destination: HostId | None) -> None:
    if move := draft.moving.get(server):
        if move.reason != REQUESTED:
            draft.wait(server, WaitKind.MOVE, f"{server} is moving to {move.destination} first ({move.id})")
    elif server in draft.off:
        _carry(draft, server, destination)
    elif waiting := why_not_ready(draft, server):
        draft.waiting.append(waiting)
    elif place := _destination(draft, server, destination):
        start_or_wait(draft, server, place, REQUESTED)


def _carry(draft: Draft, server: ServerId, asked: HostId | None) -> None:
    """It is off: another host is decided to keep it, and that is all."""
    others = [h for h in open_hosts(draft, without=draft.servers[server].host) if asked in (None, h)]
    if carry(draft, server, others) is not None:
        draft.served_requests[server] = asked


def _destination(draft: Draft, server: ServerId, asked: HostId | None) -> HostId | None:
    others = open_hosts(draft, without=draft.servers[server].host)
    if tied := why_tied(draft, server):
        draft.wait(server, WaitKind.BLOCKED, tied.reason, tied.remedy)
        return None
    if asked is None:
        place = pack(draft, [server], others).places.get(server)
        if place is None:
            nowhere = why_nowhere(draft, server, others)
            draft.wait(server, nowhere.kind, nowhere.reason, nowhere.remedy)
        return place
    if closed := why_closed(draft, asked):
        draft.wait(server, closed.kind, f"{server} is to move to {asked}, but {closed.reason}", closed.remedy)
        return None
    if choose(draft, server, [asked]):
        return asked
    elsewhere = [host for host in others if choose(draft, server, [host])]
    nowhere = why_nowhere(draft, server, [asked])
    remedy = f"it would fit on {', '.join(elsewhere)}" if elsewhere else nowhere.remedy
    draft.wait(server, nowhere.kind, nowhere.reason, remedy or "free or add capacity")
    return None
