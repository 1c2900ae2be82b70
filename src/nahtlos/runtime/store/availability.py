"""What is set for host failures, who vouched for which host being off, and since when hosts are heard. One
setting each."""

from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.availability import AvailabilitySettings, Off
from nahtlos.model.ids import HostId
from nahtlos.model.values import Value
from nahtlos.runtime.store.remembered import remembered
from nahtlos.runtime.store.settings import set_setting, setting_of

SETTINGS = "availability"
OFF = "hosts-off"
HEARING = "hosts-heard-since"
DEAF_SECONDS = 5.0
"""Without any report for longer, it is this side that heard nothing: each is stored every 4 s at least."""


class Availability(Value, frozen=True, kw_only=True):
    settings: AvailabilitySettings = AvailabilitySettings()
    off: dict[HostId, Off] = {}
    hearing_since: float = 0.0
    """Before that nobody was heard: the orchestrator was down, or cut off itself."""

    def off_since(self, received: Mapping[HostId, float]) -> dict[HostId, Off]:
        """Those from which nothing was heard since."""
        return {host: off for host, off in self.off.items() if received.get(host, 0.0) < off.at}


@remembered
async def read(tx: AsyncConnection) -> Availability:
    settings = await setting_of(tx, SETTINGS, AvailabilitySettings)
    return Availability(
        settings=settings or AvailabilitySettings(),
        off=await _off(tx),
        hearing_since=await setting_of(tx, HEARING, float) or 0.0,
    )


async def set_settings(tx: AsyncConnection, settings: AvailabilitySettings) -> None:
    await set_setting(tx, SETTINGS, settings)


async def set_off(tx: AsyncConnection, host: HostId, off: Off) -> None:
    await set_setting(tx, OFF, {**await _off(tx), host: off})


async def _off(tx: AsyncConnection) -> dict[HostId, Off]:
    return await setting_of(tx, OFF, dict[HostId, Off]) or {}


async def hear(tx: AsyncConnection, received: Mapping[HostId, float], now: float) -> None:
    """A report comes, `now`; `received` are those before it."""
    if now - max(received.values(), default=0.0) > DEAF_SECONDS:
        await set_setting(tx, HEARING, now)


def silent_for(
    seconds: float, received: Mapping[HostId, float], now: float, hearing_since: float
) -> frozenset[HostId]:
    """Hosts that were not heard for so long while others were. Who was away may be this orchestrator: then
    each has as long again to come back."""
    until = min(now, max(received.values(), default=0.0)) - seconds
    return frozenset(host for host, at in received.items() if max(at, hearing_since) < until)
