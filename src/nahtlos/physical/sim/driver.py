"""What all simulated drivers share: every verb takes its time, may fail before or after its effect, and
does nothing for an agent that is dead."""

import asyncio

from nahtlos.model.errors import Unavailable
from nahtlos.physical.sim.facts import SimHost
from nahtlos.physical.sim.faults import Call, Life, Moment
from nahtlos.physical.sim.world import World

BY_SUPERVISOR = frozenset({"start", "incoming_start", "incoming_in_place", "kill", "verify", "observe"})
"""Verbs of the hypervisor that need it."""


class SimDriver:
    name = ""

    def __init__(self, world: World, host: SimHost, life: Life) -> None:
        self.world = world
        self.host = host
        self.life = life

    def verb(self, verb: str, subject: str = "") -> "_Verb":
        """`async with`: the effect goes into the body."""
        return _Verb(self, self.world.next_call(self.host.id, self.name, verb, subject))


class _Verb:
    def __init__(self, driver: SimDriver, call: Call) -> None:
        self._driver = driver
        self._call = call
        self._half = driver.world.troubles.latency(call) / 2

    async def __aenter__(self) -> None:
        driver = self._driver
        driver.life.check()
        await asyncio.sleep(self._half)
        await driver.life.thawed()
        driver.world.befall(self._call, Moment.BEFORE, driver.life)
        if not driver.host.powered:
            raise Unavailable(f"{driver.host.id} has no power")
        if not driver.host.supervisor_up and self._needs_supervisor:
            raise Unavailable(f"the supervisor of {driver.host.id} does not answer")

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            driver = self._driver
            driver.world.befall(self._call, Moment.AFTER, driver.life)
            await asyncio.sleep(self._half)
            await driver.life.thawed()
            driver.life.check()

    @property
    def _needs_supervisor(self) -> bool:
        verb = self._call.verb
        return self._call.driver == "supervisor" or (
            self._call.driver == "hypervisor" and verb in BY_SUPERVISOR
        )
