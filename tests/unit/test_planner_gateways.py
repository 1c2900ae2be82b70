"""Where ways out of routers go, and when: asked for, drained, with nobody to take them."""

from typing import Any

import msgspec
import pytest
from planner_world import REFUSED, Cloud, host_id, running_cloud

from nahtlos.model.availability import Off
from nahtlos.model.blueprint import GatewayPlace, HostIntent, HostPhase
from nahtlos.model.ids import RouterId
from nahtlos.model.inventory import Inventory, OperationKind, OperationState, OperationStatus
from nahtlos.model.nouns import HostRole
from nahtlos.planner.check import violations
from nahtlos.planner.plan import plan

WAN = RouterId("wan")


def edges(*, ways: dict[str, int], outside: tuple[int, ...] = (2, 3)) -> Cloud:
    """One compute host and two edge hosts."""
    cloud = running_cloud((0, 0, 0))
    hosts = dict(cloud.policy.hosts)
    for number in (2, 3):
        hosts[host_id(number)] = msgspec.structs.replace(hosts[host_id(number)], role=HostRole.EDGE)
    gateways = {RouterId(router): host_id(at) for router, at in ways.items()}
    cloud.want(hosts=hosts, gateways=gateways, outside=frozenset(map(host_id, outside)))
    cloud.settle()
    return cloud


def ask(cloud: Cloud, at: int) -> None:
    cloud.want(gateways={**cloud.policy.gateways, WAN: host_id(at)})


def end(cloud: Cloud, state: OperationState, error: Any = None) -> None:
    """Every move of a way out that runs ends so, and that is planned with."""
    seen = cloud.world.look()
    hosts = dict(seen.hosts)
    for move in cloud.now.gateway_moves:
        status = OperationStatus(
            id=move.id, kind=OperationKind.GATEWAY, state=state, step="done", router=move.router, error=error
        )
        at = hosts[move.destination]
        hosts[at.host] = msgspec.structs.replace(at, operations=(*at.operations, status))
    seen = Inventory(hosts=hosts, connected=seen.connected)
    cloud.blueprint, cloud.report = plan(cloud.policy, seen, cloud.blueprint)


def test_a_new_way_out_is_where_it_is_asked_for_and_needs_no_move() -> None:
    cloud = edges(ways={"wan": 2})
    assert cloud.now.gateways[WAN].host == host_id(2) and cloud.now.gateway_moves == ()
    cloud.want(gateways={})
    cloud.settle()
    assert cloud.now.gateways == {}


def test_asked_elsewhere_it_moves_once_and_its_epoch_rises() -> None:
    cloud = edges(ways={"wan": 2})
    before = cloud.now.gateways[WAN]
    ask(cloud, 3)
    cloud.plan()
    (move,) = cloud.now.gateway_moves
    assert (move.source, move.destination, move.reason) == (host_id(2), host_id(3), "requested")
    assert cloud.now.gateways[WAN] == before, "it is its source's until the move is done"
    cloud.plan()
    assert cloud.now.gateway_moves == (move,)
    end(cloud, OperationState.DONE)
    assert cloud.now.gateways[WAN] == GatewayPlace(host=host_id(3), epoch=move.epoch)
    assert move.epoch > before.epoch and cloud.settle().converged


def test_undone_it_is_tried_again_more_slowly_and_then_waits_for_people() -> None:
    cloud = edges(ways={"wan": 2})
    ask(cloud, 3)
    patience: list[float] = []
    for _ in range(5):
        cloud.plan()
        patience.append(cloud.now.gateway_moves[0].patience_seconds)
        end(cloud, OperationState.UNDONE, REFUSED)
    # the last end is planned on at once, so a move may be there again only while attempts are left
    cloud.plan()
    assert patience == sorted(patience) and patience[0] == 0.0 and patience[-1] > 1.0
    assert cloud.now.gateways[WAN].host == host_id(2)
    assert "could not be moved in 5 attempts" in cloud.reasons(WAN)
    ask(cloud, 2)
    assert cloud.settle().converged, "nobody asks for it any more"


def test_a_drained_host_gives_it_to_the_one_with_fewest() -> None:
    cloud = edges(ways={"wan": 2, "lan": 2})
    cloud.want(parallel_moves=2)
    cloud.intend(2, HostIntent.DRAINED)
    cloud.plan()
    assert cloud.phase(2) is HostPhase.EMPTYING
    assert {m.destination for m in cloud.now.gateway_moves} == {host_id(3)}
    end(cloud, OperationState.DONE)
    cloud.settle()
    assert {p.host for p in cloud.now.gateways.values()} == {host_id(3)}
    assert cloud.phase(2) is HostPhase.DRAINED, "and it stays there, though host-2 is what was asked for"


@pytest.mark.parametrize(
    ("outside", "intent", "away", "words"),
    [
        ((2,), HostIntent.ACTIVE, False, "no other active edge host"),
        ((2, 3), HostIntent.CORDONED, False, "no other active edge host"),
        ((2, 3), HostIntent.ACTIVE, True, "the agent of host-3 is not connected"),
    ],
)
def test_without_a_host_to_take_it_it_stays_and_says_why(
    outside: tuple[int, ...], intent: HostIntent, away: bool, words: str
) -> None:
    cloud = edges(ways={"wan": 2}, outside=outside)
    cloud.intend(3, intent)
    if away:
        cloud.world.away.add(host_id(3))
    cloud.intend(2, HostIntent.DRAINED)
    cloud.settle()
    assert cloud.now.gateway_moves == () and words in cloud.reasons(WAN)
    assert cloud.report and all(w.remedy for w in cloud.report.waiting if w.subject == WAN)
    assert cloud.phase(2) is HostPhase.EMPTYING


def test_one_after_the_other_as_many_as_may_move_at_once() -> None:
    cloud = edges(ways={"wan": 2, "lan": 2, "dmz": 2})
    cloud.intend(2, HostIntent.DRAINED)
    cloud.plan()
    assert len(cloud.now.gateway_moves) == 1
    assert "waits for its turn" in " ".join(w.reason for w in cloud.report.waiting if cloud.report)


def test_a_place_that_changes_without_a_move_is_unsafe() -> None:
    cloud = edges(ways={"wan": 2})
    place = GatewayPlace(host=host_id(3), epoch=99)
    child = msgspec.structs.replace(
        cloud.now, id="bp-999", parent=cloud.now.id, gateways={**cloud.now.gateways, WAN: place}
    )
    found = violations(cloud.policy, cloud.world.look(), cloud.now, child)
    assert any("without a move" in words for words in found)


# --- its host fails ------------------------------------------------------------------------------------


def fail(cloud: Cloud, number: int, *, by: str = "an operator vouches for it") -> None:
    """The host is away, and somebody vouches for its having no power."""
    cloud.world.away.add(host_id(number))
    cloud.want(lost=frozenset({host_id(number)}), off={host_id(number): Off(by=by)} if by else {})
    cloud.settle()


def test_a_way_out_is_placed_anew_when_its_host_has_failed_and_returns_once_it_is_back() -> None:
    cloud = edges(ways={"wan": 2})
    before = cloud.now.gateways[WAN]
    fail(cloud, 2)
    assert cloud.now.hosts[host_id(2)].fenced
    place = cloud.now.gateways[WAN]
    assert place.host == host_id(3) and place.epoch > before.epoch and cloud.now.gateway_moves == ()
    cloud.world.away.clear()
    cloud.want(lost=frozenset(), off={})
    cloud.settle()
    assert cloud.now.hosts[host_id(2)].fenced == ""
    assert [(m.source, m.destination) for m in cloud.now.gateway_moves] == [(host_id(3), host_id(2))]


def test_a_way_out_of_a_host_that_nobody_knows_to_be_off_waits_and_says_what_to_do() -> None:
    cloud = edges(ways={"wan": 2})
    fail(cloud, 2, by="")
    assert cloud.now.gateways[WAN].host == host_id(2)
    (told,) = [w for w in cloud.report.waiting if w.subject == host_id(2)]
    assert "wan" in told.reason and "nahtlos host fence" in told.remedy


def test_the_only_way_out_waits_for_another_edge_host() -> None:
    cloud = edges(ways={"wan": 2}, outside=(2,))
    fail(cloud, 2)
    assert cloud.now.gateways[WAN].host == host_id(2)
    assert [w for w in cloud.report.waiting if w.subject == WAN]
