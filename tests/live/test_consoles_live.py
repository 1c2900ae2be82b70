"""A real guest's console and display, followed while it moves, its VMM is replaced, and the agent and the
orchestrator are killed: what is typed and what is said arrives once, in order; the viewer's connection
stays."""

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from rfb_viewer import RfbViewer

from nahtlos.lab.datacentre import Datacentre, LabShape, opened, unique_name
from nahtlos.model.errors import Conflict, Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_line import ConsoleLine
from nahtlos.ops.vnc import Gateway, listening
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.runtime.controllers.cloud import ServerRequest

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(280),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
WEB = ServerId("web")
PASSWORD = "s3cret00"
PASTED = 80
"""Characters of one line: many times a UART's queue, so that some are under way whenever the VMM changes."""


async def until(what: str, held: Callable[[], Awaitable[bool]], within: float = 90.0) -> None:
    try:
        async with asyncio.timeout(within):
            while True:
                try:
                    if await held():
                        return
                except Unavailable:
                    pass
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"waited in vain for {what}") from None


class Screen:
    def __init__(self, client: OperatorClient) -> None:
        self.seen = ""
        self.asked: list[str] = []
        """Words, in the order in which they were typed."""
        self.notes: list[str] = []
        self.line = ConsoleLine(client, WEB, write=True, show=self._show, note=self.notes.append)

    def _show(self, data: bytes) -> None:
        self.seen += data.decode(errors="replace")

    async def answers(self) -> None:
        """The guest says what it does not know, once it has heard all of it."""
        word = f"n{len(self.asked)}" + "b" * PASTED
        self.asked.append(word)
        self.line.type(word.encode() + b"\r")
        await self.until(f"unknown command '{word}'")

    async def until(self, text: str) -> None:
        async def said() -> bool:
            return text in self.seen

        try:
            await until(text, said, 60.0)
        except AssertionError:
            raise AssertionError(f"{text!r} was not said: {self.seen[-400:]!r}, {self.notes}") from None


async def kill(datacentre: Datacentre, node: str, unit: str) -> None:
    supervisor = SupervisorClient(datacentre.paths.node(node).supervisor)
    try:
        status = (await supervisor.units())[unit]
    finally:
        supervisor.close()
    assert status.pid is not None
    os.kill(status.pid, signal.SIGKILL)


async def test_a_console_and_a_display_over_everything_that_happens_to_them() -> None:
    async with opened(unique_name("con"), LabShape(hosts=2)) as datacentre, datacentre.client as client:
        old, new = (release.id for release in datacentre.build.movable_releases())
        for release in (old, new):
            await client.register_release(release)
        await client.create_server(
            ServerRequest(name=WEB, memory_mib=128, display=True, host=HostId("host-1"))
        )
        screen = Screen(client)
        gateway = Gateway(client, WEB, PASSWORD, print)
        async with (
            asyncio.TaskGroup() as tasks,
            listening(gateway, path=None, port=0, password=PASSWORD) as place,
        ):
            line = tasks.create_task(screen.line.run())
            await screen.until("NAHTLOS-READY")
            await screen.answers()
            viewer = await RfbViewer.over_tcp(place.port, PASSWORD)

            async def painted() -> None:
                """The whole picture is asked for, and comes, on the connection there is."""
                await viewer.ask()
                rows: set[int] = set()
                async with asyncio.timeout(60):
                    while len(rows) < viewer.size[1]:
                        rows |= {row for _, row in await viewer.update()}

            await painted()
            for happens in (_moved("host-2"), _replaced(new)):
                happening = tasks.create_task(happens(datacentre, client))
                while not happening.done():
                    await screen.answers()
                await painted()
            for happens in (_killed("host-2", "agent"), _killed("ctl", "orchestrator")):
                await happens(datacentre, client)
                await screen.answers()
                await painted()
            line.cancel()
            viewer.close()
            await gateway.over
        assert re.findall(r"unknown command '(\w+)'", screen.seen) == screen.asked
        assert not [note for note in screen.notes if "waiting" not in note]
        log = await client.console_log(WEB)
        assert log.data.decode(errors="replace") == screen.seen
        assert (await client.server(WEB)).state is RunState.RUNNING


Happening = Callable[[Datacentre, OperatorClient], Awaitable[None]]


def _moved(to: str) -> Happening:
    async def happens(_lab: Datacentre, client: OperatorClient) -> None:
        async def asked() -> bool:
            """Taken as soon as the host was verified with its release."""
            with suppress(Conflict):
                await client.move_server(WEB, HostId(to))
                return True
            return False

        await until("a host that takes it", asked)

        async def there() -> bool:
            view = await client.server(WEB)
            return view.host == to and view.moving_to is None

        await until("the move", there)

    return happens


def _replaced(by: str) -> Happening:
    async def happens(_lab: Datacentre, client: OperatorClient) -> None:
        release = next(r.id for r in await client.releases() if r.id == by)
        await client.replace_vmm(WEB, release)

        async def done() -> bool:
            view = await client.server(WEB)
            return view.release == release and view.replaced_by is None

        await until("the replacement", done)

    return happens


def _killed(node: str, unit: str) -> Happening:
    async def happens(datacentre: Datacentre, client: OperatorClient) -> None:
        await kill(datacentre, node, unit)

        async def back() -> bool:
            return all(host.connected for host in await client.hosts())

        await asyncio.sleep(0.5)
        await until(f"{unit} to be back", back)

    return happens
