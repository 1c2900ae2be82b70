"""What goes wrong between an agent and its host, and how long things take.

Every verb of every simulated driver is a `Call`. Before and after it takes effect the world asks its
`Troubles` what befalls it: nothing, an error, or the death of the agent that called. Owns no state of the
world; given a seed or a script, always answers the same.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.physical.ports import Crash


class Moment(StrEnum):
    BEFORE = "before"
    """The verb has had no effect."""
    AFTER = "after"
    """It has taken effect, and its caller does not know."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    """Counted over the whole world, from 1."""
    occurrence: int
    """Of this verb on this host, from 1: names the same call again in a run with other timing."""
    host: HostId
    driver: str
    verb: str
    subject: str


class Act(StrEnum):
    PASS = "pass"
    UNAVAILABLE = "unavailable"
    REFUSED = "refused"
    CRASH = "crash"


class Troubles(Protocol):
    def latency(self, call: Call) -> float:
        """Seconds the verb takes; half of it passes before its effect."""
        ...

    def befall(self, call: Call, moment: Moment) -> Act: ...


SECONDS: Mapping[str, tuple[float, float]] = {
    "start": (0.05, 0.15),
    "incoming_start": (0.045, 0.115),
    "verify": (1.0, 3.0),
    "kill": (0.002, 0.01),
    "pause": (0.0003, 0.0008),
    "resume": (0.0005, 0.002),
    "migrate_progress": (0.0003, 0.0005),
    "port_create": (0.001, 0.004),
    "host_init": (0.005, 0.02),
}
"""How long a verb takes, drawn evenly; what is not listed takes USUAL_SECONDS."""
USUAL_SECONDS = (0.0002, 0.0012)


class Calm:
    """Nothing goes wrong; things take their usual time."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def latency(self, call: Call) -> float:
        return self._random.uniform(*SECONDS.get(call.verb, USUAL_SECONDS))

    def befall(self, call: Call, moment: Moment) -> Act:
        return Act.PASS


class Seeded(Calm):
    """By chance. `failing`, `refusing` and `crashing` are probabilities per call and moment; with
    `slow` a call takes up to a second longer."""

    def __init__(
        self,
        seed: int,
        *,
        failing: float = 0.0,
        refusing: float = 0.0,
        crashing: float = 0.0,
        slow: float = 0.0,
    ) -> None:
        super().__init__(seed)
        self.failing = failing
        self.refusing = refusing
        self.crashing = crashing
        self.slow = slow

    def calm(self) -> None:
        """From now on nothing goes wrong."""
        self.failing = self.refusing = self.crashing = self.slow = 0.0

    def latency(self, call: Call) -> float:
        usual = super().latency(call)
        if self.slow and self._random.random() < self.slow:
            return usual + self._random.uniform(0.05, 1.0)
        return usual

    def befall(self, call: Call, moment: Moment) -> Act:
        if not (self.failing or self.refusing or self.crashing):
            return Act.PASS
        drawn = self._random.random()
        for act, chance in (
            (Act.UNAVAILABLE, self.failing),
            (Act.REFUSED, self.refusing),
            (Act.CRASH, self.crashing),
        ):
            if drawn < chance:
                return act
            drawn -= chance
        return Act.PASS


class Scripted(Calm):
    """`when` decides for each call; used to strike exactly one call of a run."""

    def __init__(self, when: Callable[[Call, Moment], Act], seed: int = 0) -> None:
        super().__init__(seed)
        self._when = when

    def befall(self, call: Call, moment: Moment) -> Act:
        return self._when(call, moment)


class Life:
    """One incarnation of a process. Once it has ended nothing it tries has any effect: every use of a
    driver, of the ledger or of the network raises Crash, whatever the code in its `finally` blocks does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.cause = ""
        self._on_end: list[Callable[[], None]] = []
        self._thaw: asyncio.Event | None = None

    def freeze(self) -> None:
        """SIGSTOP: from here on it does nothing that others could notice, until it is thawed or ended."""
        if self.alive and self._thaw is None:
            self._thaw = asyncio.Event()

    def thaw(self) -> None:
        if self._thaw is not None:
            self._thaw.set()
            self._thaw = None

    async def thawed(self) -> None:
        """Returns once it is not frozen, or has ended."""
        while self._thaw is not None:
            await self._thaw.wait()

    def check(self) -> None:
        if not self.alive:
            raise Crash(f"{self.name} is dead ({self.cause})")

    def on_end(self, act: Callable[[], None]) -> None:
        self._on_end.append(act)

    def end(self, cause: str) -> None:
        """kill -9."""
        if self.alive:
            self.alive = False
            self.cause = cause
            self.thaw()
            for act in self._on_end:
                act()


def strike(act: Act, call: Call, moment: Moment, life: Life) -> None:
    """Carry out what befalls `call`: returns, or raises."""
    if act is Act.PASS:
        return
    what = f"simulated: {call.driver}.{call.verb} {call.subject} {moment} its effect"
    if act is Act.CRASH:
        life.end(what)
        raise Crash(what)
    raise (Unavailable if act is Act.UNAVAILABLE else Refused)(what)
