"""One move's turn to be switched, at both of its hosts, and how its pre-copy is held until it comes.

    free --near enough to be switched--> waiting --both turns--> returning --settled--> ready
     ^ |                                    ^                                            |
     | `--another is switched here--.       `------ not switched within USE_SECONDS -----'
     `------------ it has been --- hushed

Turns are asked for in the order of the hosts' names, whichever is the source: two hosts that move servers to
each other cannot wait for one another. While it waits, the pre-copy is held with little bandwidth, which
costs neither the guest nor the link much; its own bandwidth is given back some moments before the switch. No
move waits for longer than LONGEST_WAIT: it is then switched beside the others. An agent that is away for a
moment is asked again, while the pre-copy is held; away for AWAY_SECONDS, it ends the move.

Who is not near yet is held likewise while another is switched at its host: what a pre-copy takes of
processors and link at that moment, the other's guest waits for.

Decides when to ask and when to switch; what is switched is not known here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.values import Value
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.agent.turns import LEASE_SECONDS
from nahtlos.wire.messages import MoveTurn, MoveTurnBack, MoveTurnSaid

ASK_EVERY = 0.02
"""By the next in the line; those behind it ask so much more seldom as there are others before them."""
ASK_SECONDS = 1.0
AWAY_SECONDS = 25.0
"""The other agent is waited for so long. Less than what it waits for a source that says nothing
(`destination.SILENCE_SECONDS`): later it has given the move up in any case."""
HELD_BYTES = 4 << 20
"""Bytes a second while waiting: unthrottled, a held pre-copy spins, and its `stop` takes long."""
PATIENCE_SECONDS = 0.05
"""A turn that comes so soon is waited for at full speed."""
SETTLE_SECONDS = 0.12
"""From the moment the bandwidth is given back until the rest to send is small again."""
USE_SECONDS = 2.0
"""Not switched by then, it is given back, and waited for again behind the others. Less than LEASE_SECONDS:
nobody asks meanwhile."""
LONGEST_WAIT = 60.0
assert USE_SECONDS < LEASE_SECONDS


class Stage(StrEnum):
    FREE = "free"
    HUSHED = "hushed"
    WAITING = "waiting"
    RETURNING = "returning"
    READY = "ready"


class Standing(Value, frozen=True, kw_only=True):
    """Where a move stands with its turn. Times are of one clock."""

    stage: Stage = Stage.FREE
    since: float = 0.0
    """When the stage began."""
    waited: float = 0.0
    """Seconds, of earlier waits."""
    slow: bool = False

    def waited_by(self, now: float) -> float:
        held_up = self.stage in (Stage.WAITING, Stage.HUSHED)
        return self.waited + (now - self.since if held_up else 0.0)


def wanted(standing: Standing, now: float) -> Standing:
    """It could be switched now."""
    may_ask = standing.stage in (Stage.FREE, Stage.HUSHED)
    return _at(standing, Stage.WAITING, now) if may_ask else standing


def beside(standing: Standing, another: bool, now: float) -> Standing:
    """Whether `another` is switched here; it is hushed for LONGEST_WAIT at most, of all its waits."""
    if standing.stage is Stage.FREE and another and standing.waited < LONGEST_WAIT:
        return _at(standing, Stage.HUSHED, now)
    over = not another or standing.waited_by(now) >= LONGEST_WAIT
    if standing.stage is Stage.HUSHED and over:
        return _at(standing, Stage.FREE, now)
    return standing


def heard(standing: Standing, granted: bool, now: float, *, sprints: bool = False) -> Standing:
    """After it was asked for. `sprints`: its own bandwidth is less than the link's."""
    if standing.stage is not Stage.WAITING:
        return standing
    if not granted and standing.waited_by(now) < LONGEST_WAIT:
        return standing
    return _at(standing, Stage.RETURNING if standing.slow or sprints else Stage.READY, now)


def passed(standing: Standing, now: float) -> Standing:
    """Time alone has passed. A switch that did not come about in time begins anew, at the end of the line,
    unless it has waited for long enough."""
    if standing.stage is Stage.RETURNING and now - standing.since >= SETTLE_SECONDS:
        return _at(standing, Stage.READY, now)
    overdue = standing.stage is Stage.READY and now - standing.since > USE_SECONDS
    if overdue and standing.waited < LONGEST_WAIT:
        return _at(standing, Stage.FREE, now)
    return standing


def shall_be_slow(standing: Standing, now: float) -> bool:
    waits = standing.stage is Stage.WAITING
    patient = standing.slow or now - standing.since > PATIENCE_SECONDS
    return standing.stage is Stage.HUSHED or (waits and patient)


def ask_after(ahead: int) -> float:
    """Seconds from one time it asks to the next, with so many before it in the line."""
    return min(ASK_EVERY * (1 + 4 * ahead), LEASE_SECONDS / 4)


def _at(standing: Standing, stage: Stage, now: float) -> Standing:
    return Standing(stage=stage, since=now, waited=standing.waited_by(now), slow=standing.slow)


def order_of(source: HostId, destination: HostId) -> tuple[HostId, HostId]:
    """In which both are asked, by every move between any two hosts."""
    return (source, destination) if source < destination else (destination, source)


class SwitchTurn:
    """`pace(slow)` holds the pre-copy, or gives it its own bandwidth back. `sprint` gives it all of the link
    for the moments before the switch, where its own is less: a stream that keeps to a bandwidth rests for up
    to 100 ms at a time, and would do so in the blackout."""

    def __init__(
        self,
        context: Context,
        operation: OperationId,
        hosts: tuple[HostId, HostId],
        peer: Peer,
        pace: Callable[[bool], Awaitable[None]],
        *,
        sprint: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._context = context
        self._operation = operation
        self._order = order_of(*hosts)
        self._peer = peer
        self._pace = pace
        self._sprint = sprint
        self._standing = Standing()
        self._asked_at = float("-inf")
        self._ahead = 0
        """Others that are before it in the line, where it was last asked for."""
        self._alone = False
        """The other agent knows of no turns."""
        self._away_since: float | None = None
        """The other agent has not answered since."""

    def waited(self, now: float) -> float:
        """Seconds that a pre-copy spent on nothing but waiting."""
        return self._standing.waited_by(now)

    @property
    def is_held(self) -> bool:
        """It does not go at its own speed, or did not until a moment ago."""
        return self._standing.slow or self._standing.stage is Stage.RETURNING

    @property
    def waits(self) -> bool:
        return self._standing.stage in (Stage.WAITING, Stage.HUSHED)

    async def step(self, now: float, *, near: bool) -> bool:
        """Whether to switch now. `near`: it would cost little. To be called again and again from then on,
        whatever is said of `near`."""
        another = self._context.turns.is_anothers(self._operation, now)
        self._standing = beside(self._standing, another, now)
        if near:
            self._standing = wanted(self._standing, now)
        if self._standing.stage is Stage.WAITING and now - self._asked_at >= ask_after(self._ahead):
            self._asked_at = now
            granted, sprint = await self._ask(now), self._sprint
            self._standing = heard(self._standing, granted, now, sprints=sprint is not None)
            self._say(now)
            if sprint is not None and self._standing.stage is Stage.RETURNING:
                await sprint()
        before = self._standing.stage
        self._standing = passed(self._standing, now)
        if before is Stage.READY and self._standing.stage is Stage.FREE:
            await self.give_back()
            if self._sprint is not None:
                await self._pace(False)
        await self._keep_pace(now)
        return near and self._standing.stage is Stage.READY

    async def _keep_pace(self, now: float) -> None:
        slow = shall_be_slow(self._standing, now)
        if slow != self._standing.slow:
            if slow or self._sprint is None:
                await self._pace(slow)
            stage, since, waited = self._standing.stage, self._standing.since, self._standing.waited
            self._standing = Standing(stage=stage, since=since, waited=waited, slow=slow)

    async def _ask(self, now: float) -> bool:
        """Of the second host only with the turn of the first; asking keeps what was given."""
        for host in self._order:
            mine = host == self._context.settings.host
            said = self._ask_here(now) if mine else await self._ask_there(now)
            self._ahead = said.ahead
            if not said.granted:
                return False
        return True

    def _ask_here(self, now: float) -> MoveTurnSaid:
        turns = self._context.turns
        granted = turns.ask(self._operation, now)
        return MoveTurnSaid(id=self._operation, granted=granted, ahead=turns.ahead(self._operation))

    async def _ask_there(self, now: float) -> MoveTurnSaid:
        """Not granted while it is away."""
        granted = MoveTurnSaid(id=self._operation, granted=True)
        if self._alone:
            return granted
        try:
            said = await self._peer.ask(MoveTurn(id=self._operation), MoveTurnSaid, ASK_SECONDS)
        except Refused as refused:
            if refused.field != "message":
                raise
            self._alone = True  # an older agent: only what this host does is done one after another
            return granted
        except Unavailable as away:
            self._stay_away(now, away)
            return MoveTurnSaid(id=self._operation, granted=False)
        self._away_since = None
        return said

    def _stay_away(self, now: float, away: Unavailable) -> None:
        self._away_since = now if self._away_since is None else self._away_since
        if now - self._away_since >= AWAY_SECONDS:
            raise Unavailable(
                f"{self._other} has not answered for {now - self._away_since:.0f} s: {away.message}",
                field="destination",
                remedy=f"see that the agent of {self._other} runs and can be reached",
            ) from away

    @property
    def _other(self) -> HostId:
        return next(host for host in self._order if host != self._context.settings.host)

    def _say(self, now: float) -> None:
        """Whom an operator sees it wait for."""
        holder = self._context.turns.holder
        if self._standing.stage is Stage.WAITING and self._away_since is not None:
            self._context.waits[self._operation] = f"{self._other}, which does not answer"
        elif self._standing.stage is Stage.WAITING and now - self._standing.since > PATIENCE_SECONDS:
            whom = f" ({holder} is switched here)" if holder not in (None, self._operation) else ""
            self._context.waits[self._operation] = f"its turn to be switched{whom}"
        else:
            self._context.waits.pop(self._operation, None)

    async def give_back(self) -> None:
        """At both hosts. What cannot be said to the other one ends there by itself."""
        self._context.turns.give_back(self._operation)
        if not self._alone and self._asked_at > float("-inf"):
            try:
                await self._peer.tell(MoveTurnBack(id=self._operation), ASK_SECONDS)
            except Exception as error:
                why = self._context.error_of(error)
                self._context.say("move.turn", self._operation, f"not given back at the other host: {why}")


async def take_turn(context: Context, operation: OperationId, given_up: Callable[[], bool]) -> None:
    """Of a change of one host alone, where nothing has to be held meanwhile. Returns with the turn, without
    it after LONGEST_WAIT, or as soon as the change is `given_up`."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not given_up() and not context.turns.ask(operation, loop.time()):
        if loop.time() - began >= LONGEST_WAIT:
            break
        context.waits[operation] = f"its turn to be switched ({context.turns.holder} is switched here)"
        await asyncio.sleep(ASK_EVERY)
    context.waits.pop(operation, None)
