"""The operator API of servers' power as a typed client: the same methods as `Powers` of
`runtime.controllers`. Sending is `ops.client`'s."""

from nahtlos.model.ids import ServerId
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.powers import StopRequest


class PowerClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def stop(self, server: ServerId, request: StopRequest) -> ServerView:
        return await self._ask("POST", ("servers", server, "stop"), request, ServerView)

    async def start(self, server: ServerId) -> ServerView:
        return await self._ask("POST", ("servers", server, "start"), None, ServerView)

    async def suspend(self, server: ServerId) -> ServerView:
        return await self._ask("POST", ("servers", server, "suspend"), None, ServerView)

    async def resume(self, server: ServerId) -> ServerView:
        return await self._ask("POST", ("servers", server, "resume"), None, ServerView)

    async def reboot(self, server: ServerId, request: StopRequest) -> ServerView:
        return await self._ask("POST", ("servers", server, "reboot"), request, ServerView)
