"""A server is stopped, kept by another host, started and booted anew by the agents of the simulated world;
its guest obeys its power button, does not, or switches itself off; and its agents die at every step of it."""

import functools

import msgspec
import pytest
from crash_plays import Strike
from moving import DESTINATION, SERVER, SOURCE, Run

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import RunState, ServerStatus
from nahtlos.model.power import Power, PowerState
from nahtlos.physical.sim.faults import Act, Moment

WITHIN = 120.0
OFF = Power(state=PowerState.OFF, serial=1, seconds=20)
AGAIN = Power(state=PowerState.ON, serial=2, boot=2)
ANEW = Power(state=PowerState.ON, serial=3, boot=3, seconds=20)


class Powering(Run):
    """Off, kept by the other host while it is off, on again there, booted anew."""

    deaf = False
    hard = False

    async def _go(self) -> None:
        await self._booted(SERVER)
        self.begin()
        if self.deaf:
            self.world.deaf.add(SERVER)
        await self.ask(msgspec.structs.replace(OFF, hard=self.hard), RunState.STOPPED)
        assert not self.world.vmms_of(SERVER)
        self.conductor.places[SERVER] = (DESTINATION, 2)
        await self.becomes(RunState.STOPPED, 1, DESTINATION)
        assert self.world.facts(SERVER).boots == 1
        await self.ask(AGAIN, RunState.RUNNING, DESTINATION)
        assert self.world.facts(SERVER).boots == 2
        await self.ask(msgspec.structs.replace(ANEW, hard=self.hard), RunState.RUNNING, DESTINATION)
        assert self.world.facts(SERVER).boots == 3
        await self.world.until(self._tidy, timeout=WITHIN, what="nothing left over")

    async def ask(self, power: Power, state: RunState, host: HostId = SOURCE) -> None:
        if power.state is PowerState.OFF or power.boot == ANEW.boot:
            self.world.stop_expected(SERVER)
        spec = self.conductor.servers[SERVER]
        self.conductor.servers[SERVER] = msgspec.structs.replace(spec, power=power)
        await self.becomes(state, power.serial, host)

    async def becomes(self, state: RunState, serial: int, host: HostId) -> None:
        def reported() -> bool:
            status = self.reported(host)
            return status is not None and (status.state, status.power) == (state, serial)

        await self.world.until(reported, timeout=WITHIN, what=f"{state} by request {serial} at {host}")

    def reported(self, host: HostId) -> ServerStatus | None:
        report = self.conductor.reports.get(host)
        return next((s for s in (report.servers if report else ()) if s.id == SERVER), None)

    def _place_wanted(self) -> tuple[str, int]:
        return DESTINATION, 2


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_a_server_is_stopped_kept_elsewhere_started_and_booted_anew(deaf: bool, hard: bool) -> None:
    run = Powering()
    run.deaf, run.hard, run.loss_excused = deaf, hard, True
    run.play()
    assert not run.problems
    pressed = [s for s in run.seen if s.verb == "power_button" and s.moment is Moment.AFTER]
    assert len(pressed) == (0 if hard else 2)


def test_a_guest_that_does_not_listen_has_its_time_and_no_more() -> None:
    run = Powering()
    run.deaf = run.loss_excused = True
    run.play()
    pauses = [step for step in run.world.trace if step.what == "hypervisor.power_button"]
    kills = [step for step in run.world.trace if step.what == "hypervisor.kill" and step.host == SOURCE]
    first = min(step.at for step in kills if step.at > pauses[0].at)
    assert OFF.seconds <= first - pauses[0].at < OFF.seconds + 2


@functools.cache
def moments() -> tuple[Strike, ...]:
    """Of the drivers' verbs that change something, and of every write of a ledger."""
    run = Powering()
    run.loss_excused = True
    run.play()
    assert not run.problems
    quiet = ("observe", "reconcile", "releases", "release", "network", "pool", "snapshots", "load_balancers")
    return tuple(s for s in run.seen if s.verb not in quiet and s.host in (SOURCE, DESTINATION))


def of(driver: str, most: int) -> list[Strike]:
    return [s for s in dict.fromkeys(moments()) if s.driver == driver and s.occurrence <= most]


@pytest.mark.parametrize(
    ("driver", "act", "most"),
    [
        ("ledger", Act.CRASH, 2),
        ("hypervisor", Act.CRASH, 2),
        ("network", Act.CRASH, 1),
        ("hypervisor", Act.UNAVAILABLE, 1),
        ("network", Act.UNAVAILABLE, 1),
    ],
)
def test_agents_that_die_or_drivers_that_fail_at_any_step_of_it(driver: str, act: Act, most: int) -> None:
    found = of(driver, most)
    assert len(found) >= 4
    for strike in found:
        run = Powering(at=strike, act=act)
        run.loss_excused = True
        run.play()
        assert run.struck
        assert not run.problems, (str(strike), run.problems)


class SwitchedOff(Powering):
    """By its guest, while nobody asked; then it is started."""

    async def _go(self) -> None:
        await self._booted(SERVER)
        (vmm,) = self.world.vmms_of(SERVER)
        self.begin()
        self.world.switch_off(vmm)
        await self.becomes(RunState.STOPPED, 0, SOURCE)
        boots = self.world.facts(SERVER).boots
        assert boots == 1
        await self.ask(Power(state=PowerState.ON, serial=1, boot=1), RunState.RUNNING)
        assert self.world.facts(SERVER).boots == 2

    def _place_wanted(self) -> tuple[str, int]:
        return SOURCE, 1


@pytest.mark.parametrize("crash", [False, True])
def test_a_guest_that_switches_itself_off_stays_so_until_it_is_started(crash: bool) -> None:
    at = Strike(SOURCE, "hypervisor", "kill", 1, Moment.AFTER) if crash else None
    run = SwitchedOff(at=at, act=Act.CRASH)
    run.loss_excused = True
    run.play()
    assert run.struck is crash
    assert not run.problems
