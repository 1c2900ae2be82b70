"""Whose turn it is to be switched, and how a pre-copy waits for it: as tables, and by chance."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from nahtlos.model.ids import HostId, OperationId
from nahtlos.physical.agent.switch_turn import (
    LONGEST_WAIT,
    PATIENCE_SECONDS,
    SETTLE_SECONDS,
    USE_SECONDS,
    Stage,
    Standing,
    ask_after,
    beside,
    heard,
    order_of,
    passed,
    shall_be_slow,
    take_turn,
    wanted,
)
from nahtlos.physical.agent.turns import LEASE_SECONDS, Line, Place, Turns, asked, given_back
from nahtlos.physical.sim.clock import run_virtual

A, B, C = OperationId("move-a"), OperationId("move-b"), OperationId("move-c")


def place(operation: OperationId, at: float = 0.0) -> Place:
    return Place(operation=operation, asked_at=at)


HELD = Line(holder=place(A), waiting=(place(B), place(C)))
LATE = LEASE_SECONDS + 0.1


@pytest.mark.parametrize(
    ("line", "who", "now", "expected"),
    [
        (Line(), A, 0.0, Line(holder=place(A))),
        (Line(holder=place(A)), A, 1.0, Line(holder=place(A, 1.0))),
        (Line(holder=place(A)), B, 1.0, Line(holder=place(A), waiting=(place(B, 1.0),))),
        (HELD, B, 1.0, Line(holder=place(A), waiting=(place(B, 1.0), place(C)))),
        (
            Line(waiting=(place(B), place(C))),
            C,
            1.0,
            Line(waiting=(place(B), place(C, 1.0))),
        ),
        (Line(waiting=(place(B), place(C))), B, 1.0, Line(holder=place(B, 1.0), waiting=(place(C),))),
        (HELD, C, LATE, Line(holder=place(C, LATE))),
    ],
    ids=[
        "free",
        "kept by asking",
        "behind the holder",
        "a place in the line is kept",
        "not before those who came first",
        "the first in the line",
        "who does not ask any more is gone",
    ],
)
def test_the_line_of_a_host(line: Line, who: OperationId, now: float, expected: Line) -> None:
    assert asked(line, who, now) == expected


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (A, Line(waiting=(place(B), place(C)))),
        (B, Line(holder=place(A), waiting=(place(C),))),
        (OperationId("move-d"), HELD),
    ],
)
def test_what_is_given_back(who: OperationId, expected: Line) -> None:
    assert given_back(HELD, who) == expected


WAITS = Standing(stage=Stage.WAITING, since=10.0)
SLOW = Standing(stage=Stage.WAITING, since=10.0, slow=True)
RETURNING = Standing(stage=Stage.RETURNING, since=10.0, waited=3.0, slow=True)
READY = Standing(stage=Stage.READY, since=10.0, waited=3.0)
WEARY = Standing(stage=Stage.READY, since=10.0, waited=LONGEST_WAIT)


@pytest.mark.parametrize(
    ("before", "act", "now", "stage", "waited"),
    [
        (Standing(), wanted, 10.0, Stage.WAITING, 0.0),
        (READY, wanted, 11.0, Stage.READY, 3.0),
        (WAITS, lambda s, now: heard(s, False, now), 11.0, Stage.WAITING, 0.0),
        (WAITS, lambda s, now: heard(s, True, now), 11.0, Stage.READY, 1.0),
        (SLOW, lambda s, now: heard(s, True, now), 11.0, Stage.RETURNING, 1.0),
        (WAITS, lambda s, now: heard(s, True, now, sprints=True), 11.0, Stage.RETURNING, 1.0),
        (SLOW, lambda s, now: heard(s, False, now), 10.0 + LONGEST_WAIT, Stage.RETURNING, LONGEST_WAIT),
        (RETURNING, passed, 10.0 + SETTLE_SECONDS / 2, Stage.RETURNING, 3.0),
        (RETURNING, passed, 10.1 + SETTLE_SECONDS, Stage.READY, 3.0),
        (READY, passed, 10.0 + USE_SECONDS, Stage.READY, 3.0),
        (READY, passed, 10.1 + USE_SECONDS, Stage.FREE, 3.0),
        (WEARY, passed, 99.0, Stage.READY, LONGEST_WAIT),
    ],
    ids=[
        "near: it asks",
        "near again",
        "not yet",
        "at full speed still",
        "it was held: first the bandwidth",
        "it has a share only: first all of the link",
        "it waited for long enough",
        "the bandwidth was given back just now",
        "settled",
        "it may still be switched",
        "not switched in time: behind the others",
        "but not for ever",
    ],
)
def test_where_a_move_stands(before, act, now, stage, waited) -> None:
    after = act(before, now)
    assert (after.stage, after.waited) == (stage, waited)


@pytest.mark.parametrize(
    ("standing", "now", "expected"),
    [
        (Standing(), 99.0, False),
        (WAITS, 10.0 + PATIENCE_SECONDS / 2, False),
        (WAITS, 10.0 + PATIENCE_SECONDS * 2, True),
        (SLOW, 10.0, True),
        (RETURNING, 10.0, False),
        (READY, 10.0, False),
    ],
)
def test_when_a_pre_copy_is_held(standing: Standing, now: float, expected: bool) -> None:
    assert shall_be_slow(standing, now) is expected


HUSHED = Standing(stage=Stage.HUSHED, since=10.0, waited=3.0, slow=True)
WEARIED = 7.0 + LONGEST_WAIT


@pytest.mark.parametrize(
    ("before", "another", "now", "expected"),
    [
        (Standing(), True, 10.0, Standing(stage=Stage.HUSHED, since=10.0)),
        (Standing(), False, 10.0, Standing()),
        (HUSHED, True, 12.0, HUSHED),
        (HUSHED, False, 12.0, Standing(since=12.0, waited=5.0, slow=True)),
        (
            HUSHED,
            True,
            7.0 + LONGEST_WAIT,
            Standing(since=WEARIED, waited=LONGEST_WAIT, slow=True),
        ),
        (Standing(waited=LONGEST_WAIT), True, 10.0, Standing(waited=LONGEST_WAIT)),
        (WAITS, True, 11.0, WAITS),
        (READY, True, 11.0, READY),
    ],
    ids=[
        "held at once",
        "nobody is switched",
        "still",
        "on it goes, and the time does not count against it",
        "but not for ever",
        "never again after that",
        "who waits in the line is held by that",
        "whose turn it is goes on",
    ],
)
def test_a_pre_copy_is_held_while_another_is_switched_here(before, another, now, expected) -> None:
    assert beside(before, another, now) == expected
    assert shall_be_slow(HUSHED, 10.0)


def test_a_turn_that_nobody_asks_for_any_more_holds_nobody_back() -> None:
    turns = Turns()
    turns.ask(A, 0.0)
    assert (turns.is_anothers(A, 0.1), turns.is_anothers(B, 0.1), turns.is_anothers(B, LATE)) == (
        False,
        True,
        False,
    )


def test_who_is_far_back_in_the_line_asks_seldom_but_keeps_its_place() -> None:
    turns = Turns()
    for operation in (A, B, C):
        turns.ask(operation, 0.0)
    assert [turns.ahead(operation) for operation in (A, B, C)] == [0, 0, 1]
    assert ask_after(0) < ask_after(1) < ask_after(1000) < LEASE_SECONDS / 2


def test_both_hosts_are_asked_in_one_order_whoever_sends() -> None:
    one, two = HostId("host-1"), HostId("host-2")
    assert order_of(one, two) == order_of(two, one) == (one, two)


@pytest.mark.parametrize("seed", range(30))
def test_moves_criss_cross_never_wait_for_one_another_for_ever(seed: int) -> None:
    """Every move asks both of its hosts in their order, keeps what it got, works for a while, and at times
    dies with its turns: all others come to their end, and no host ever has two at once."""
    chance = random.Random(seed)
    hosts = [HostId(f"host-{n}") for n in range(chance.randint(2, 5))]
    turns = {host: Turns() for host in hosts}
    moves = {OperationId(f"move-{n}"): order_of(*chance.sample(hosts, 2)) for n in range(25)}
    working: dict[OperationId, float] = {}
    now = 0.0
    while moves:
        now += 0.02
        assert now < 25 * (1.0 + LEASE_SECONDS), f"{len(moves)} moves wait for ever"
        for move in chance.sample(sorted(moves), len(moves)):
            if chance.random() < 0.002:
                del moves[move]  # killed: it gives nothing back
                working.pop(move, None)
            elif move in working:
                if working[move] <= now:
                    for host in moves.pop(move):
                        turns[host].give_back(move)
                    del working[move]
            elif all(turns[host].ask(move, now) for host in moves[move]):
                busy = [moves[other] for other in working]
                assert not any(host in pair for pair in busy for host in moves[move]), "two at once"
                working[move] = now + chance.uniform(0.05, 1.0)


def test_a_change_of_one_host_waits_for_its_turn_until_it_is_given_up_or_for_long_enough() -> None:
    waited = [waiting(), waiting(freed_after=2.0), waiting(given_up_after=3.0), waiting(held=False)]
    assert waited == [pytest.approx(LONGEST_WAIT, abs=0.1), pytest.approx(2.0, abs=0.1), 3.0, 0.0]


def waiting(*, held: bool = True, freed_after: float = 1e9, given_up_after: float = 1e9) -> float:
    """Virtual seconds."""
    took: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began, turns = loop.time(), Turns()
        context = SimpleNamespace(turns=turns, waits={})

        async def holding() -> None:
            while loop.time() - began < freed_after:
                turns.ask(A, loop.time())
                await asyncio.sleep(0.5)
            turns.give_back(A)

        other = asyncio.create_task(holding()) if held else None
        await asyncio.sleep(0)
        began = loop.time()
        await take_turn(context, B, lambda: loop.time() - began >= given_up_after)  # type: ignore[arg-type]
        took.append(round(loop.time() - began, 1))
        assert context.waits == {}
        if other is not None:
            other.cancel()

    run_virtual(main(), seed=1, limit_seconds=1000)
    return took[0]
