"""Hosts that fail, through the operator API: the methods of
`runtime.controllers.availability.AvailabilityApi`."""

from nahtlos.model.ids import HostId
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.availability import AvailabilityChange, AvailabilityView, PowerChange


class AvailabilityClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def view(self) -> AvailabilityView:
        return await self._ask("GET", ("availability",), None, AvailabilityView)

    async def change(self, change: AvailabilityChange) -> AvailabilityView:
        return await self._ask("PATCH", ("availability",), change, AvailabilityView)

    async def set_power(self, host: HostId, change: PowerChange) -> AvailabilityView:
        return await self._ask("PUT", ("hosts", host, "power"), change, AvailabilityView)

    async def fence(self, host: HostId) -> AvailabilityView:
        return await self._ask("POST", ("hosts", host, "fence"), None, AvailabilityView)
