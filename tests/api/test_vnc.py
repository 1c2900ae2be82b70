"""A VNC viewer on this machine keeps its connection while the display behind it is another one: over the real
API, with simulated displays."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import reachable_cloud
from rfb_viewer import RfbViewer, WrongPassword

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.vnc import Gateway, Listening, listening, new_password
from nahtlos.physical.sim.display import SimDisplay

SERVER = ServerId("web-1")


def vmm(epoch: int) -> Any:
    return SimpleNamespace(ended=False, guest=SimpleNamespace(boot=1), id=SimpleNamespace(epoch=epoch))


class Displays:
    """Stands in for the cloud's: the display of the VMM that runs the server now."""

    def __init__(self, cloud: Any) -> None:
        self.vmm = vmm(1)
        self.opened = 0
        self.error: Exception | None = None
        cloud.display = self.open

    async def open(self, _server: ServerId) -> Any:
        if self.error is not None:
            raise self.error
        self.opened += 1
        display = SimDisplay(cast("Any", self.vmm))
        return SimpleNamespace(read=lambda: display.read(700), write=display.write, close=display.close)

    def move(self) -> None:
        self.vmm.ended, self.vmm = True, vmm(self.vmm.id.epoch + 1)


@asynccontextmanager
async def gateway(client: OperatorClient) -> AsyncGenerator[tuple[Gateway, Listening, list[str]]]:
    notes: list[str] = []
    password = new_password()
    opened = Gateway(client, SERVER, password, notes.append)
    async with listening(opened, path=None, port=0, password=password) as place:
        yield opened, place, notes


async def shown(viewer: RfbViewer) -> tuple[int, int]:
    """The VMM's epoch and the last key, as the picture says."""
    rows = await viewer.update()
    assert {len(row) for row in rows.values()} == {32 * 4}
    _, epoch, key, _ = rows[0, 0][:4]
    return epoch, key


async def until_shown(viewer: RfbViewer, wanted: tuple[int, int]) -> None:
    async with asyncio.timeout(60):
        while await shown(viewer) != wanted:
            await viewer.ask(incremental=True)


async def test_the_viewer_stays_while_the_server_moves_and_the_orchestrator_is_replaced(
    cloud: Any, tmp_path: Path, pki: Path
) -> None:
    displays = Displays(cloud)
    async with (
        OperatorClient.unix(tmp_path / "operator.sock") as client,
        gateway(client) as (opened, place, _),
    ):
        async with reachable_cloud(cloud, tmp_path, pki):
            viewer = await RfbViewer.over_tcp(place.port, place.password)
            assert (viewer.size, viewer.name) == ((32, 16), b"simulated")
            await viewer.ask()
            await until_shown(viewer, (1, 0))
            for epoch in (2, 3):
                displays.move()
                await viewer.ask(incremental=True)
                await until_shown(viewer, (epoch, 0))
                await viewer.ask(incremental=True)
            await viewer.key(0x41)
            await until_shown(viewer, (3, 0x41))
        displays.move()
        await viewer.key(0x42)
        await viewer.ask(incremental=True)
        async with reachable_cloud(cloud, tmp_path, pki):
            await until_shown(viewer, (4, 0x42))
            viewer.close()
            async with asyncio.timeout(60):
                await opened.over
    assert displays.opened >= 4


async def test_one_viewer_that_knows_the_password(reachable: Any) -> None:
    Displays(reachable.cloud)
    async with reachable.unix() as client, gateway(client) as (_, place, notes):
        with pytest.raises(WrongPassword):
            await RfbViewer.over_tcp(place.port, "wrong")
        async with asyncio.timeout(60):
            while True:  # until the other one was sent away
                try:
                    viewer = await RfbViewer.over_tcp(place.port, place.password)
                    break
                except (OSError, asyncio.IncompleteReadError):
                    await asyncio.sleep(0.1)
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await RfbViewer.over_tcp(place.port, place.password)
        await viewer.ask()
        await until_shown(viewer, (1, 0))
        viewer.close()
    assert any("wrong password" in note for note in notes)


async def test_what_is_refused_ends_it_and_what_is_away_is_waited_for(reachable: Any) -> None:
    displays = Displays(reachable.cloud)
    displays.error = Unavailable("its host does not answer")
    async with reachable.unix() as client, gateway(client) as (opened, place, notes):
        waiting = asyncio.ensure_future(RfbViewer.over_tcp(place.port, place.password))
        async with asyncio.timeout(60):
            while not any("does not answer" in note for note in notes):
                await asyncio.sleep(0.05)
        displays.error = None
        viewer = await waiting
        displays.error = NotFound("there is no such server", field="server")
        displays.move()
        async with asyncio.timeout(60):
            with pytest.raises(NotFound):
                await opened.over
        viewer.close()


async def test_a_place_that_is_taken_is_told(reachable: Any) -> None:
    async with reachable.unix() as client, gateway(client) as (opened, place, _):
        with pytest.raises(Unavailable) as refused:
            async with listening(opened, path=None, port=place.port, password=None):
                pass
        assert refused.value.field == "port"


async def test_a_socket_is_for_its_owner_alone_and_goes_with_the_command(
    reachable: Any, tmp_path: Path
) -> None:
    path = tmp_path / "web.vnc"
    async with reachable.unix() as client:
        async with listening(Gateway(client, SERVER, None, print), path=path, port=0, password=None) as place:
            assert path.stat().st_mode & 0o777 == 0o600
            assert (place.path, place.password) == (str(path), "")
        assert not path.exists()


async def test_over_the_api_a_display_needs_an_operator(reachable: Any) -> None:
    Displays(reachable.cloud)
    async with reachable.tls() as client:
        with pytest.raises(Refused):
            await client.display_stream(SERVER)
    async with reachable.tls(token_file=reachable.token_file) as client:
        socket = await client.display_stream(SERVER)
        assert await socket.recv() == b"RFB 003.008\n"
        await socket.close()
