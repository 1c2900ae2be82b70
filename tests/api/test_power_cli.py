"""`nahtlos server stop|start|reboot|suspend|resume` against the API at a real socket."""

import json

import msgspec
import pytest
from conftest import FakeCloud, Run

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.power import Power
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.powers import StopRequest


class PoweredCloud(FakeCloud):
    """What is asked for has come about at the next look."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, StopRequest | None]] = []
        self.states: dict[ServerId, RunState] = {}
        self.looks = 0

    @property
    def power(self) -> "PoweredCloud":
        return self

    async def server(self, server: ServerId) -> ServerView:
        view = await super().server(server)
        self.looks += 1
        state, serial = self.states.get(server, RunState.RUNNING), len(self.asked)
        return msgspec.structs.replace(view, state=state, power=Power(serial=serial), power_pending=False)

    async def _ask(self, server: ServerId, verb: str, state: RunState, how: StopRequest | None) -> ServerView:
        before = await self.server(server)
        if verb == "start" and before.state is RunState.SUSPENDED:
            raise Conflict("web-1 is suspended", field="server", remedy="nahtlos server resume web-1")
        self.asked.append((verb, how))
        self.states[server] = state
        return msgspec.structs.replace(before, power_pending=True)

    async def stop(self, server: ServerId, request: StopRequest) -> ServerView:
        return await self._ask(server, "stop", RunState.STOPPED, request)

    async def start(self, server: ServerId) -> ServerView:
        return await self._ask(server, "start", RunState.RUNNING, None)

    async def reboot(self, server: ServerId, request: StopRequest) -> ServerView:
        return await self._ask(server, "reboot", RunState.RUNNING, request)

    async def suspend(self, server: ServerId) -> ServerView:
        return await self._ask(server, "suspend", RunState.SUSPENDED, None)

    async def resume(self, server: ServerId) -> ServerView:
        return await self._ask(server, "resume", RunState.RUNNING, None)


@pytest.fixture
def cloud() -> PoweredCloud:
    return PoweredCloud()


@pytest.mark.parametrize(
    ("line", "asked", "state"),
    [
        ("server stop web-1", ("stop", StopRequest()), "stopped"),
        ("server stop web-1 --hard", ("stop", StopRequest(hard=True)), "stopped"),
        ("server stop web-1 --within 5", ("stop", StopRequest(seconds=5)), "stopped"),
        ("server start web-1", ("start", None), "running"),
        ("server reboot web-1 --hard", ("reboot", StopRequest(hard=True)), "running"),
        ("server suspend web-1", ("suspend", None), "suspended"),
        ("server resume web-1", ("resume", None), "running"),
    ],
)
async def test_each_is_asked_for_waited_for_and_shown(
    ask: Run, cloud: PoweredCloud, line: str, asked: tuple[str, StopRequest | None], state: str
) -> None:
    result = await ask(f"{line} --json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["state"], shown["power_pending"]) == (state, False)
    assert cloud.asked == [asked]


async def test_not_waited_for_it_is_told_that_it_is_pending(ask: Run, cloud: PoweredCloud) -> None:
    result = await ask("server stop web-1 --no-wait --json")
    assert json.loads(result.stdout)["power_pending"] is True
    assert cloud.looks == 1


async def test_a_refusal_names_the_remedy(ask: Run, cloud: PoweredCloud) -> None:
    cloud.states[ServerId("web-1")] = RunState.SUSPENDED
    result = await ask("server start web-1")
    assert result.exit_code != 0
    assert "nahtlos server resume web-1" in result.output + str(result.stderr)
