"""Ways out of routers: which edge host each is at, and when it goes to another one.

    nowhere --asked for--> at its place --asked elsewhere, or drained--> moving --done--> at the new place
                               ^                                            |
                               '------------------ undone ------------------'
                              at its place --its host is fenced--> at another one, connections lost

A way out that has a place changes it by a move, because connections live there, unless its host has failed.
Where an operator wants it is policy; a drain sends it to another host with an interface to the outside, and
it stays there. From a host that has failed it returns by a move once that is back.
"""

from nahtlos.model.blueprint import Failure, GatewayPlace, HostIntent, PlannedGatewayMove, WaitKind
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, RouterId
from nahtlos.model.inventory import OperationState
from nahtlos.planner.draft import Draft
from nahtlos.planner.outcome import ended

MAX_ATTEMPTS = 5
LONGEST_PATIENCE = 60.0
ASKED = "requested"


def plan_gateways(draft: Draft) -> None:
    for move in tuple(draft.gateway_moves.values()):
        _absorb(draft, move)
    _follow_policy(draft)
    _leave_failed_hosts(draft)
    for router in sorted(draft.gateways):
        if router not in draft.moving_gateways:
            _settle(draft, router)
    _tell_of_uplinks(draft)


# --- ends --------------------------------------------------------------------------------------------


def _absorb(draft: Draft, move: PlannedGatewayMove) -> None:
    status = ended(draft.observed, move.id, (move.source, move.destination))
    what = f"{move.id} of the way out of {move.router} to {move.destination}"
    if status is None:
        for host in (move.source, move.destination):
            if not draft.observed.connected(host):
                draft.wait(move.router, WaitKind.HOST, f"{what}: the agent of {host} is not connected")
    elif status.state is OperationState.DONE:
        del draft.gateway_moves[move.id]
        draft.failed_gateway_moves.pop(move.router, None)
        if move.router in draft.gateways:
            draft.gateways[move.router] = GatewayPlace(host=move.destination, epoch=move.epoch)
        draft.change(f"the way out of {move.router} has moved from {move.source} to {move.destination}")
    elif status.state is OperationState.UNDONE:
        del draft.gateway_moves[move.id]
        _count_failure(draft, move, status.error)
    else:
        remedy = status.error.remedy if status.error and status.error.remedy else f"look at {move.source}"
        draft.wait(move.router, WaitKind.BLOCKED, f"{what} is stuck{_why(status.error)}", remedy)


def _count_failure(draft: Draft, move: PlannedGatewayMove, error: ErrorRecord | None) -> None:
    before = draft.failed_gateway_moves.get(move.router)
    draft.failed_gateway_moves[move.router] = Failure(
        operation=move.id, attempts=before.attempts + 1 if before else 1, error=error, host=move.destination
    )
    draft.change(f"{move.id} of the way out of {move.router} to {move.destination} was undone{_why(error)}")


def _why(error: ErrorRecord | None) -> str:
    return f": {error.message}" if error else ""


# --- what there is -----------------------------------------------------------------------------------


def _follow_policy(draft: Draft) -> None:
    """A new way out begins where it is asked for: it has no connections yet. One that is gone, or whose host
    is, has none any more."""
    for router, host in sorted(draft.policy.gateways.items()):
        if router not in draft.gateways and host in draft.policy.hosts:
            _put(draft, router, host)
    for router, place in tuple(draft.gateways.items()):
        if router in draft.moving_gateways:
            continue
        if router not in draft.policy.gateways:
            del draft.gateways[router]
            draft.failed_gateway_moves.pop(router, None)
            draft.change(f"{router} has no way out any more")
        elif place.host not in draft.policy.hosts and draft.policy.gateways[router] in draft.policy.hosts:
            _put(draft, router, draft.policy.gateways[router])


def _leave_failed_hosts(draft: Draft) -> None:
    """Its connections went with the host: there is nothing to be carried over. One whose move to or from that
    host was just being decided waits for the other side's word."""
    for router, place in sorted(draft.gateways.items()):
        if router in draft.moving_gateways or not _has_failed(draft, place.host):
            continue
        elsewhere = _another(draft, router, place.host)
        if elsewhere is not None:
            _put(draft, router, elsewhere)
            draft.change(f"the way out of {router} is placed anew, as {place.host} has failed")


def _has_failed(draft: Draft, host: HostId) -> bool:
    plan = draft.hosts.get(host)
    return plan is not None and bool(plan.fenced) and not draft.observed.connected(host)


def _put(draft: Draft, router: RouterId, host: HostId) -> None:
    draft.counter += 1  # epochs rise with the numbers of operations, so that none is used twice
    draft.gateways[router] = GatewayPlace(host=host, epoch=draft.counter)
    draft.change(f"the way out of {router} is at {host}")


# --- where to ----------------------------------------------------------------------------------------


def _settle(draft: Draft, router: RouterId) -> None:
    host, asked = draft.gateways[router].host, draft.policy.gateways.get(router)
    if asked is None:
        return
    if asked != host and _has_failed(draft, asked):
        return
    if asked != host and draft.intent(asked) is not HostIntent.DRAINED:
        _move(draft, router, asked, ASKED)
    elif draft.intent(host) is HostIntent.DRAINED:
        destination = _another(draft, router, host)
        if destination is not None:
            _move(draft, router, destination, f"{host} is drained")
    else:
        draft.failed_gateway_moves.pop(router, None)


def _another(draft: Draft, router: RouterId, host: HostId) -> HostId | None:
    """The active host with an interface to the outside that has fewest ways out; one that failed it last."""
    able = [h for h in sorted(draft.policy.outside) if h != host and draft.intent(h) is HostIntent.ACTIVE]
    if not able:
        draft.wait(
            router,
            WaitKind.BLOCKED,
            f"the way out of {router} stays at {host}: no other active edge host has a way to the outside",
            f"join or activate one, name its interface under `external` in the settings, or activate {host}",
        )
        return None
    there = [h for h in able if draft.observed.connected(h)]
    if not there:
        text = f"the way out of {router} stays at {host}: the agent of {', '.join(able)} is not connected"
        draft.wait(router, WaitKind.HOST, text, f"start the agent of {able[0]}")
        return None
    failure = draft.failed_gateway_moves.get(router)
    taken = [place.host for place in draft.gateways.values()]
    taken += [move.destination for move in draft.gateway_moves.values()]
    return min(there, key=lambda h: (failure is not None and failure.host == h, taken.count(h), h))


def _move(draft: Draft, router: RouterId, destination: HostId, reason: str) -> None:
    place, failure = draft.gateways[router], draft.failed_gateway_moves.get(router)
    if _is_held_up(draft, router, destination):
        return
    attempts = failure.attempts if failure else 0
    move = PlannedGatewayMove(
        id=draft.next_operation("gateway"),
        router=router,
        source=place.host,
        destination=destination,
        epoch=draft.counter,
        reason=reason,
        patience_seconds=min(2.0 ** (attempts - 1), LONGEST_PATIENCE) if attempts else 0.0,
    )
    draft.gateway_moves[move.id] = move
    draft.change(f"the way out of {router} moves from {place.host} to {destination}: {reason}")


def _is_held_up(draft: Draft, router: RouterId, destination: HostId) -> bool:
    source, failure = draft.gateways[router].host, draft.failed_gateway_moves.get(router)
    what = f"the way out of {router} stays at {source}"
    if destination not in draft.policy.outside:
        draft.wait(
            router,
            WaitKind.BLOCKED,
            f"{what}: {destination} has no interface to the outside",
            "name it under `external` in the orchestrator's settings, or ask for another host",
        )
        return True
    for host in (source, destination):
        if not draft.observed.connected(host):
            text = f"{what}: the agent of {host} is not connected"
            remedy = f"start the agent of {host}"
            if host == source:
                remedy += (
                    f"; if it is lost with all connections: nahtlos router gateway unset {router}, then set"
                )
            draft.wait(router, WaitKind.HOST, text, remedy)
            return True
    if failure is not None and failure.attempts >= MAX_ATTEMPTS and failure.host == destination:
        draft.wait(
            router,
            WaitKind.OPERATOR,
            f"{what}: it could not be moved in {failure.attempts} attempts{_why(failure.error)}",
            f"correct the cause, then ask anew: activate and drain {source}, or name it, then another host",
        )
        return True
    if len(draft.gateway_moves) >= draft.policy.parallel_moves:
        draft.wait(router, WaitKind.MOVE, f"the way out of {router} waits for its turn to move")
        return True
    return False


def _tell_of_uplinks(draft: Draft) -> None:
    """A network's own way out is routed as it is, by one host: it cannot be elsewhere."""
    for network in draft.policy.networks:
        host = network.gateway_host
        if host and host in draft.policy.hosts and draft.intent(host) is HostIntent.DRAINED:
            draft.wait(
                host,
                WaitKind.BLOCKED,
                f"the uplink of network {network.id} stays at {host}",
                f"activate {host}, or lead {network.id} out by a router instead",
            )
