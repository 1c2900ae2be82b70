"""`Powers` over the store: reads the state, checks the request, writes intent."""

from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import Inventory
from nahtlos.model.power import Power
from nahtlos.runtime.controllers import power_requests
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.store import volumes as rows

Said = Callable[[str, str, str], None]
Shown = Callable[[ServerId], Awaitable[ServerView]]
Decide = Callable[[State, Inventory], Power | None]


class PowerService:
    """`said`: what has been asked for, as an event; `shown`: a server as it is seen then."""

    def __init__(self, looks: Looks, *, said: Said, shown: Shown) -> None:
        self._looks = looks
        self._said = said
        self._shown = shown

    async def stop(self, server: ServerId, request: StopRequest) -> ServerView:
        how = "at once, its guest is not asked" if request.hard else f"its guest has {request.seconds:g} s"
        return await self._ask(
            server,
            f"{server} is to stop: {how}",
            lambda state, seen: power_requests.stopped(state, seen, server, request),
        )

    async def start(self, server: ServerId) -> ServerView:
        return await self._ask(
            server,
            f"{server} is to run again",
            lambda state, seen: power_requests.started(state, seen, server),
        )

    async def reboot(self, server: ServerId, request: StopRequest) -> ServerView:
        return await self._ask(
            server,
            f"{server} is to boot anew",
            lambda state, seen: power_requests.rebooted(state, seen, server, request),
        )

    async def suspend(self, server: ServerId) -> ServerView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            seen = state.inventory(self._looks.connected)
            spec = power_requests.suspended(state, seen, server)
            if spec is not None:
                await rows.add(tx, power_requests.memory_volume(state, seen, spec))
                await rows.put_server(tx, spec)
        if spec is not None:
            self._said("server.power", server, f"{server} is to be suspended")
        return await self._shown(server)

    async def resume(self, server: ServerId) -> ServerView:
        return await self._ask(
            server,
            f"{server} is to go on from what was saved",
            lambda state, seen: power_requests.resumed(state, seen, server),
        )

    async def _ask(self, server: ServerId, text: str, decide: Decide) -> ServerView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            power = decide(state, state.inventory(self._looks.connected))
            if power is not None:
                spec = state.servers[server].spec
                await rows.put_server(tx, msgspec.structs.replace(spec, power=power))
        if power is not None:
            self._said("server.power", server, text)
        return await self._shown(server)
