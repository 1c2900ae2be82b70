"""Answers operators about hosts that fail; `availability` says what is asked."""

from collections.abc import Callable

import msgspec
from msgspec import UNSET

from nahtlos.model.availability import AvailabilitySettings, Off
from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId
from nahtlos.runtime.controllers import requests
from nahtlos.runtime.controllers.availability import (
    AvailabilityChange,
    AvailabilityView,
    HostStanding,
    PowerChange,
)
from nahtlos.runtime.controllers.look import Look, Looks
from nahtlos.runtime.store import availability as stored

SHORTEST_LEASE, LONGEST_LEASE = 2.0, 600.0
SHORTEST_LOSS = 2.0


class AvailabilityService:
    def __init__(self, looks: Looks, *, said: Callable[[str, str, str], None]) -> None:
        self._looks = looks
        self._said = said

    async def view(self) -> AvailabilityView:
        look = await self._looks.now()
        settings = look.state.availability.settings
        return AvailabilityView(
            lease_seconds=settings.lease_seconds,
            lost_seconds=settings.lost_seconds,
            hosts=tuple(standing(look, host) for host in sorted(look.state.hosts)),
        )

    async def change(self, change: AvailabilityChange) -> AvailabilityView:
        async with self._looks.changing() as tx:
            before = (await stored.read(tx)).settings
            await stored.set_settings(tx, changed(before, change))
        self._said("availability", "cloud", "what is known of host failures is different")
        return await self.view()

    async def set_power(self, host: HostId, change: PowerChange) -> AvailabilityView:
        async with self._looks.changing() as tx:
            requests.known_host(await self._looks.state(tx), host)
            before = (await stored.read(tx)).settings
            power = {name: command for name, command in before.power.items() if name != host}
            if change.command:
                power[host] = checked_command(change.command)
            await stored.set_settings(tx, msgspec.structs.replace(before, power=power))
        self._said("host.power", host, f"{host} can {'' if change.command else 'not '}be switched off")
        return await self.view()

    async def fence(self, host: HostId) -> AvailabilityView:
        async with self._looks.changing() as tx:
            requests.known_host(await self._looks.state(tx), host)
            if host in self._looks.connected:
                raise Conflict(
                    f"{host} is connected, so it is not off",
                    field="host",
                    remedy=f"drain it: nahtlos host drain {host}; or switch it off first",
                )
            await stored.set_off(tx, host, Off(by="an operator vouches for it", at=self._looks.wall()))
        self._said("host.fence", host, f"an operator vouches for {host} being off")
        return await self.view()


def changed(before: AvailabilitySettings, change: AvailabilityChange) -> AvailabilitySettings:
    if change == AvailabilityChange():
        raise Refused("nothing to change", field="lease_seconds", remedy="give a lease, or a loss")
    lease = before.lease_seconds if change.lease_seconds is UNSET else change.lease_seconds
    lost = before.lost_seconds if change.lost_seconds is UNSET else change.lost_seconds
    if not SHORTEST_LEASE <= lease <= LONGEST_LEASE:
        raise Refused(
            f"a lease of {lease:g} s",
            field="lease_seconds",
            remedy=f"give {SHORTEST_LEASE:g} to {LONGEST_LEASE:g} seconds",
        )
    if not SHORTEST_LOSS <= lost <= LONGEST_LEASE:
        raise Refused(
            f"a host that counts as lost after {lost:g} s",
            field="lost_seconds",
            remedy=f"give {SHORTEST_LOSS:g} to {LONGEST_LEASE:g} seconds",
        )
    return msgspec.structs.replace(before, lease_seconds=lease, lost_seconds=lost)


def checked_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command[0].startswith("/"):
        raise Refused(
            f"'{command[0]}' is no absolute path",
            field="command",
            remedy="name the program as /path/of/program, with its arguments after it",
        )
    return command


def standing(look: Look, host: HostId) -> HostStanding:
    plan = look.state.blueprint.hosts.get(host) if look.state.blueprint else None
    seen = look.inventory.hosts.get(host)
    passed = look.state.blueprint.passed_over.get(host, {}) if look.state.blueprint else {}
    connected, lost = host in look.inventory.connected, host in look.state.policy().lost
    why = "; ".join(w.reason for w in look.report.waiting if w.subject == host)
    if plan is not None and plan.denial is not None:
        state = "back" if connected else "fenced" if plan.fenced else "denied"
        why = plan.fenced if state == "fenced" else why
    elif connected or not lost:
        state, why = "up", ""
    else:
        state = "cut off" if "cut off" in why else "lost"
    return HostStanding(
        host=host,
        state=state,
        why=why,
        lease=plan.lease if plan else None,
        lease_held=bool(connected and seen and seen.standing and seen.standing.held),
        passed_over=passed,
        power=host in look.state.availability.settings.power,
    )
