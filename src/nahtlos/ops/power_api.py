"""The operator API of servers' power: paths over `runtime.controllers.cloud.Powers`. How bodies are read and
answers written it is given; errors, callers and logging are `ops.api`'s."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import ServerId
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.cloud import Powers
from nahtlos.runtime.controllers.powers import StopRequest


def power_routes(routes: APIRouter, of: Callable[[], Powers], body: Body, answer: Answer) -> None:
    """Adds them to `routes`. `of` gives the powers at the time of a call."""

    @routes.post("/servers/{server}/stop")
    async def stop(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await body(request, StopRequest)
        return answer(await of().stop(ServerId(server), asked), status=202)

    @routes.post("/servers/{server}/start")
    async def start(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().start(ServerId(server)), status=202)

    @routes.post("/servers/{server}/suspend")
    async def suspend(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().suspend(ServerId(server)), status=202)

    @routes.post("/servers/{server}/resume")
    async def resume(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().resume(ServerId(server)), status=202)

    @routes.post("/servers/{server}/reboot")
    async def reboot(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await body(request, StopRequest)
        return answer(await of().reboot(ServerId(server), asked), status=202)
