"""What is set for host failures, and who vouched for which host being off. One setting each."""

from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.availability import AvailabilitySettings, Off
from nahtlos.model.ids import HostId
from nahtlos.model.values import Value
from nahtlos.runtime.store.settings import set_setting, setting_of

SETTINGS = "availability"
OFF = "hosts-off"


class Availability(Value, frozen=True, kw_only=True):
    settings: AvailabilitySettings = AvailabilitySettings()
    off: dict[HostId, Off] = {}

    def off_since(self, received: Mapping[HostId, float]) -> dict[HostId, Off]:
        """Those from which nothing was heard since."""
        return {host: off for host, off in self.off.items() if received.get(host, 0.0) < off.at}


async def read(tx: AsyncConnection) -> Availability:
    settings = await setting_of(tx, SETTINGS, AvailabilitySettings)
    return Availability(settings=settings or AvailabilitySettings(), off=await _off(tx))


async def set_settings(tx: AsyncConnection, settings: AvailabilitySettings) -> None:
    await set_setting(tx, SETTINGS, settings)


async def set_off(tx: AsyncConnection, host: HostId, off: Off) -> None:
    await set_setting(tx, OFF, {**await _off(tx), host: off})


async def _off(tx: AsyncConnection) -> dict[HostId, Off]:
    return await setting_of(tx, OFF, dict[HostId, Off]) or {}


def lost_hosts(
    settings: AvailabilitySettings, received: Mapping[HostId, float], now: float
) -> frozenset[HostId]:
    """By what other hosts have reported since: who was away may be this orchestrator."""
    until = min(now, max(received.values(), default=0.0)) - settings.lost_seconds
    return frozenset(host for host, at in received.items() if at < until)
