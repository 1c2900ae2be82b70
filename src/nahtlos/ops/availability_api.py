"""The operator API of hosts that fail: paths over `runtime.controllers.availability.AvailabilityApi`."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import HostId
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.availability import AvailabilityApi, AvailabilityChange, PowerChange


def availability_routes(
    routes: APIRouter, of: Callable[[], AvailabilityApi], body: Body, answer: Answer
) -> None:
    """Adds them to `routes`. `of` gives what they ask at the time of a call."""

    @routes.get("/availability")
    async def view() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().view())

    @routes.patch("/availability")
    async def change(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().change(await body(request, AvailabilityChange)))

    @routes.put("/hosts/{host}/power")
    async def set_power(host: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().set_power(HostId(host), await body(request, PowerChange)))

    @routes.post("/hosts/{host}/fence")
    async def fence(host: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().fence(HostId(host)), status=202)
