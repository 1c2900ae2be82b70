"""The operator API of places: paths over `runtime.controllers.placement.Placement`. How bodies are read and
answers written it is given; errors, callers and logging are `ops.api`'s."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import HostId, ServerGroupId
from nahtlos.ops.bodies import ReserveChange
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.placement import MoveLimitsChange, Placement, ServerGroupRequest


def placement_routes(routes: APIRouter, of: Callable[[], Placement], body: Body, answer: Answer) -> None:
    """Adds them to `routes`. `of` gives the placement at the time of a call."""

    @routes.get("/server-groups")
    async def groups() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().server_groups())

    @routes.get("/server-groups/{group}")
    async def group(group: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().server_group(ServerGroupId(group)))

    @routes.post("/server-groups")
    async def create(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await body(request, ServerGroupRequest)
        return answer(await of().create_server_group(asked), 201)

    @routes.delete("/server-groups/{group}")
    async def delete(group: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().delete_server_group(ServerGroupId(group)))

    @routes.get("/reserve")
    async def reserve() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().reserve())

    @routes.put("/reserve")
    async def set_reserve(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().set_reserve((await body(request, ReserveChange)).hosts))

    @routes.get("/moves")
    async def move_limits() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().move_limits())

    @routes.put("/moves")
    async def limit_moves(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().limit_moves(await body(request, MoveLimitsChange)))

    @routes.get("/hosts/{host}/drain-plan")
    async def plan_drain(host: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().plan_drain(HostId(host)))
