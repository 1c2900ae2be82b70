"""`Placement` over the store: reads the state, checks the request, writes intent."""

from nahtlos.model.blueprint import DrainForecast
from nahtlos.model.ids import HostId, ServerGroupId
from nahtlos.model.placement import MoveLimits, ReserveReport
from nahtlos.planner.obstacles import drain_forecast
from nahtlos.runtime.controllers import placement_requests
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.placement import MoveLimitsChange, ServerGroupRequest, ServerGroupView
from nahtlos.runtime.controllers.project_service import Said
from nahtlos.runtime.controllers.requests import compute_host
from nahtlos.runtime.store import intent as intents
from nahtlos.runtime.store import placement as rows


class PlacementService:
    """`said`: what has been asked for, as an event."""

    def __init__(self, looks: Looks, *, said: Said) -> None:
        self._looks = looks
        self._said = said

    async def server_groups(self) -> tuple[ServerGroupView, ...]:
        state = (await self._looks.now()).state
        return tuple(placement_requests.group_view(state, group) for group in state.server_groups)

    async def server_group(self, group: ServerGroupId) -> ServerGroupView:
        return placement_requests.group_view((await self._looks.now()).state, group)

    async def create_server_group(self, request: ServerGroupRequest) -> ServerGroupView:
        async with self._looks.changing() as tx:
            group = placement_requests.new_group(await self._looks.state(tx), request)
            await rows.add_group(tx, group)
        self._said("server-group.created", group.id, f"{group.id} is a group of {group.policy}")
        return await self.server_group(group.id)

    async def delete_server_group(self, group: ServerGroupId) -> ServerGroupView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            placement_requests.check_deletable(state, group)
            view = placement_requests.group_view(state, group)
            await rows.delete_group(tx, group)
        self._said("server-group.deleted", group, f"{group} is deleted")
        return view

    async def plan_drain(self, host: HostId) -> DrainForecast:
        look = await self._looks.now()
        state, inventory = look.state, look.inventory
        return drain_forecast(state.policy(), inventory, state.blueprint, compute_host(state, host))

    async def reserve(self) -> ReserveReport:
        look = await self._looks.now()
        return placement_requests.reserve_view(look.state, look.inventory)

    async def set_reserve(self, hosts: int) -> ReserveReport:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            placement_requests.check_reserve(state, state.inventory(self._looks.connected), hosts)
            await intents.set_setting(tx, rows.RESERVE, hosts)
        self._said("reserve", "cloud", f"capacity is kept for the failure of {hosts} hosts")
        return await self.reserve()

    async def move_limits(self) -> MoveLimits:
        look = await self._looks.now()
        return placement_requests.move_limits(look.state)

    async def limit_moves(self, change: MoveLimitsChange) -> MoveLimits:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            limits = placement_requests.changed_limits(placement_requests.move_limits(state), change)
            await intents.set_setting(tx, intents.PARALLEL_MOVES, limits.at_once)
            await intents.set_setting(tx, intents.PARALLEL_MOVES_PER_HOST, limits.per_host)
        text = f"{limits.at_once} moves may run at once, {limits.per_host} from and to a host"
        self._said("moves", "cloud", text)
        return await self.move_limits()
