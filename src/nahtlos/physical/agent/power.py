"""Servers that are stopped, booted anew, or were switched off by their guests.

    asked (the guest, by its power button) -> down (or the deadline has passed) -> ended -> off, or to boot

What to do is decided by `power_step` from what was carried out before (what the ledger holds of the request)
and what is asked for now. The VMM is ended before the ledger says that the request was carried out: an agent
that is started again in between finds no VMM and goes on. Nothing is undone once the guest was asked.
"""

import asyncio
from enum import StrEnum

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.inventory import OperationKind, OperationState, RunState
from nahtlos.model.power import Power, PowerState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Journal
from nahtlos.physical.agent.steps import Steps
from nahtlos.physical.agent.volumes.rejoin import end_alike
from nahtlos.physical.ports import VmmId, VmmStatus

LOOK_SECONDS = 0.25
DOWN = (RunState.STOPPED, RunState.CRASHED)


class PowerStep(StrEnum):
    STOP = "stop"
    REBOOT = "reboot"
    BOOT = "boot"
    """Nothing runs it, and it is to run from the beginning."""
    ADOPT = "adopt"
    """There is nothing to do for it."""
    SUSPEND = "suspend"
    GO_ON = "go-on"
    """From what was saved."""


def power_step(held: ServerConfig, wanted: ServerConfig, vmm: VmmStatus | None) -> PowerStep | None:
    """What must be done for a server of this host, by the power it is asked to have; None: nothing."""
    had, asked = held.spec.power, wanted.spec.power
    runs = vmm is not None and vmm.state is not RunState.CRASHED
    if asked.serial <= had.serial:
        turned_off = had.state is PowerState.ON and vmm is not None and vmm.state is RunState.STOPPED
        left_over = had.state is not PowerState.ON and vmm is not None
        return PowerStep.STOP if turned_off or left_over else None
    match asked.state:
        case PowerState.OFF:
            return PowerStep.STOP
        case PowerState.SUSPENDED:
            if vmm is not None and vmm.state is RunState.STOPPED:
                return PowerStep.STOP
            return PowerStep.SUSPEND if runs else None
        case PowerState.ON:
            return _to_run(had, wanted, runs=runs)


def _to_run(had: Power, wanted: ServerConfig, *, runs: bool) -> PowerStep:
    if had.state is PowerState.ON:
        if wanted.spec.power.boot <= had.boot:
            return PowerStep.ADOPT
        return PowerStep.REBOOT if runs else PowerStep.BOOT
    return PowerStep.GO_ON if goes_on(wanted) else PowerStep.BOOT


def goes_on(server: ServerConfig) -> bool:
    """From what was saved: nobody has asked for a boot since."""
    return server.saved is not None and server.spec.power.boot <= server.saved.serial


def as_told(server: ServerConfig) -> ServerConfig:
    """A server that this host is given, as it takes it up: what is to go on from what was saved is suspended
    until it does."""
    if server.spec.power.state is not PowerState.ON or server.saved is None or not goes_on(server):
        return server
    return with_power(server, Power(state=PowerState.SUSPENDED, serial=server.saved.serial))


def with_power(server: ServerConfig, power: Power) -> ServerConfig:
    return msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, power=power))


def switched_off(held: ServerConfig) -> ServerConfig:
    """By its guest: the request that it run was carried out, and has ended."""
    return with_power(held, msgspec.structs.replace(held.spec.power, state=PowerState.OFF))


def stopping(held: ServerConfig, wanted: ServerConfig) -> ServerConfig:
    """What an operation that stops it is to leave behind."""
    if wanted.spec.power.serial > held.spec.power.serial:
        return wanted if wanted.spec.power.state is PowerState.OFF else switched_off(wanted)
    return held if held.spec.power.state is not PowerState.ON else switched_off(held)


class PowerOff(Steps):
    """Stops a server, or stops it so that it is booted anew. `run` may be called again after a restart of the
    agent."""

    def __init__(self, context: Context, journal: Journal) -> None:
        assert journal.power is not None, f"operation {journal.id} stops nothing"
        super().__init__(context, journal, kind=journal.kind, subject=journal.power.spec.id)
        self._wanted = journal.power
        self._power = journal.power.spec.power
        self._vmm = VmmId(journal.power.spec.id, journal.power.epoch)

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await self._context.pass_paths()
            await self._context.pass_plugging()
            await self.until_done("the guest to be asked", self._ask)
            await self._wait_until_down()
            await self.until_done("its disks to be settled", self._settle)
            await self.until_done("its VMM to end", self._end)
            self._leave()
        finally:
            self.forget_waits()
        return self.journal

    async def _ask(self) -> None:
        """One that stands still would not hear of it."""
        if self._power.hard or "asked" in self.journal.times:
            return
        vmm = await self._observed()
        if vmm is not None and vmm.state is RunState.RUNNING:
            await self._context.drivers.hypervisor.power_button(self._vmm)
            self.record("asked", durable=True)

    async def _wait_until_down(self) -> None:
        if "asked" not in self.journal.times:
            return
        until = self.journal.times["asked"] + self._power.seconds
        while not await self._seen_down():
            left = until - self._context.now()
            if left <= 0:
                self.say("cut", f"its guest did not switch itself off within {self._power.seconds:g} s")
                return
            self.wait_for(f"its guest to switch itself off, {left:.0f} s more")
            await asyncio.sleep(min(LOOK_SECONDS, left))

    async def _seen_down(self) -> bool:
        found: list[bool] = []

        async def look() -> None:
            vmm = await self._observed()
            found.append(vmm is None or vmm.state in DOWN)

        await self.until_done("the hypervisor to say what runs", look)
        return found[-1]

    async def _observed(self) -> VmmStatus | None:
        vmms = await self._context.drivers.hypervisor.observe()
        return next((each for each in vmms if each.id == self._vmm), None)

    async def _settle(self) -> None:
        await end_alike(self._context, self._wanted)

    async def _end(self) -> None:
        await self._context.drivers.hypervisor.kill(self._vmm)
        if self.journal.kind is OperationKind.STOP:
            for port in self._wanted.spec.ports:
                await self._context.drivers.network.port_delete(port.id)

    def _leave(self) -> None:
        """A server that is to boot anew is left to convergence, which starts what has no VMM."""
        held = self._context.ledger.owner(self._vmm.server)
        if held is not None and held.hold is Hold.OWNED and held.epoch == self._vmm.epoch:
            self._context.ledger.adopt(self._wanted)
        what = "stopped" if self.journal.kind is OperationKind.STOP else "ended, to boot anew"
        self._context.say("server.stopped", self._vmm.server, what)
        self.end(OperationState.DONE)
