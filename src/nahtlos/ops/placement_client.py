"""The operator API of places as a typed client: the same methods as `Placement` of `runtime.controllers`.
Sending is `ops.client`'s."""

from nahtlos.model.blueprint import DrainForecast
from nahtlos.model.ids import HostId, ServerGroupId
from nahtlos.model.placement import MoveLimits, ReserveReport
from nahtlos.ops.bodies import ReserveChange
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.placement import MoveLimitsChange, ServerGroupRequest, ServerGroupView


class PlacementClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def server_groups(self) -> tuple[ServerGroupView, ...]:
        return await self._ask("GET", ("server-groups",), None, tuple[ServerGroupView, ...])

    async def server_group(self, group: ServerGroupId) -> ServerGroupView:
        return await self._ask("GET", ("server-groups", group), None, ServerGroupView)

    async def create_server_group(self, request: ServerGroupRequest) -> ServerGroupView:
        return await self._ask("POST", ("server-groups",), request, ServerGroupView)

    async def delete_server_group(self, group: ServerGroupId) -> ServerGroupView:
        return await self._ask("DELETE", ("server-groups", group), None, ServerGroupView)

    async def reserve(self) -> ReserveReport:
        return await self._ask("GET", ("reserve",), None, ReserveReport)

    async def set_reserve(self, hosts: int) -> ReserveReport:
        return await self._ask("PUT", ("reserve",), ReserveChange(hosts=hosts), ReserveReport)

    async def plan_drain(self, host: HostId) -> DrainForecast:
        return await self._ask("GET", ("hosts", host, "drain-plan"), None, DrainForecast)

    async def move_limits(self) -> MoveLimits:
        return await self._ask("GET", ("moves",), None, MoveLimits)

    async def limit_moves(self, change: MoveLimitsChange) -> MoveLimits:
        return await self._ask("PUT", ("moves",), change, MoveLimits)
