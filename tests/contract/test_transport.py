"""What every transport promises, and what the in-memory one adds: faults, in virtual time."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import HostId
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.runtime.identity import CertificateAuthority
from nahtlos.wire import websocket
from nahtlos.wire.memory import Faults, MemoryNetwork
from nahtlos.wire.transport import Channel, ChannelClosed, OnChannel
from nahtlos.wire.websocket import MAX_FRAME, WebSocketTransport

ADDRESS = "127.0.0.1"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three parties of one cloud, and of one of another cloud."""
    folder = tmp_path_factory.mktemp("pki")
    authority = CertificateAuthority.open(folder / "ca")
    authority.issue_host(HostId("host-1"), ADDRESS).write(folder / "host" / "host-1")
    authority.issue_host(HostId("host-2"), ADDRESS).write(folder / "host" / "host-2")
    authority.issue_orchestrator(ADDRESS).write(folder / "orchestrator")
    stranger = CertificateAuthority.open(folder / "other-ca")
    stranger.issue_host(HostId("host-1"), ADDRESS).write(folder / "stranger")
    return folder


@pytest.fixture(params=["websocket", "memory"])
def transport(request: pytest.FixtureRequest, pki: Path) -> Callable[[str], Any]:
    """Makes the transport of a party."""
    if request.param == "memory":
        return MemoryNetwork().transport
    return lambda party: WebSocketTransport(pki / party)


async def echo(channel: Channel) -> None:
    try:
        while True:
            await channel.send(await channel.receive())
    except ChannelClosed:
        pass


async def connected(transport: Callable[[str], Any], serve: OnChannel = echo) -> tuple[Channel, Any]:
    listener = await transport("orchestrator").listen(ADDRESS, 0, serve)
    channel = await transport("host/host-1").dial(ADDRESS, listener.port, expect="orchestrator", timeout=5)
    return channel, listener


async def test_both_ends_know_who_the_other_proved_to_be(transport: Callable[[str], Any]) -> None:
    seen: list[str] = []

    async def serve(channel: Channel) -> None:
        seen.append(channel.peer)
        await echo(channel)

    channel, listener = await connected(transport, serve)
    await channel.send(b"x")
    assert await channel.receive() == b"x"
    assert channel.peer == "orchestrator"
    assert seen == ["host/host-1"]
    await channel.close()
    await listener.close()


async def test_frames_arrive_whole_and_in_order(transport: Callable[[str], Any]) -> None:
    channel, listener = await connected(transport)
    frames = [b"", bytes(1), bytes(range(256)) * 4096, *(str(n).encode() for n in range(200))]
    async with asyncio.TaskGroup() as group:
        group.create_task(_send_all(channel, frames))
        received = [await channel.receive() for _ in frames]
    assert received == frames
    await channel.close()
    await listener.close()


async def _send_all(channel: Channel, frames: list[bytes]) -> None:
    for frame in frames:
        await channel.send(frame)


async def test_dialling_where_nobody_listens_is_unavailable(transport: Callable[[str], Any]) -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await transport("host/host-1").dial(ADDRESS, _free_port(), expect="orchestrator", timeout=2)


async def test_dialling_someone_else_is_unavailable(transport: Callable[[str], Any]) -> None:
    listener = await transport("host/host-2").listen(ADDRESS, 0, echo)
    with pytest.raises(Unavailable, match="proved to be host/host-2, not orchestrator"):
        await transport("host/host-1").dial(ADDRESS, listener.port, expect="orchestrator", timeout=2)
    await listener.close()


async def test_a_place_is_listened_at_once(transport: Callable[[str], Any]) -> None:
    listener = await transport("host/host-1").listen(ADDRESS, 0, echo)
    with pytest.raises(Unavailable, match="cannot listen"):
        await transport("host/host-2").listen(ADDRESS, listener.port, echo)
    await listener.close()


async def test_closing_is_seen_at_both_ends(transport: Callable[[str], Any]) -> None:
    ended = asyncio.Event()

    async def serve(channel: Channel) -> None:
        with pytest.raises(ChannelClosed):
            await channel.receive()
        with pytest.raises(ChannelClosed):
            await channel.send(b"too late")
        ended.set()

    channel, listener = await connected(transport, serve)
    await channel.close()
    await asyncio.wait_for(ended.wait(), 5)
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            await channel.receive()
    with pytest.raises(ChannelClosed):
        await channel.send(b"too late")
    await listener.close()


async def test_the_channel_closes_when_its_server_returns(transport: Callable[[str], Any]) -> None:
    async def serve(channel: Channel) -> None:
        await channel.send(b"last words")

    channel, listener = await connected(transport, serve)
    assert await channel.receive() == b"last words"
    with pytest.raises(ChannelClosed):
        await channel.receive()
    await listener.close()


async def test_closing_the_listener_closes_what_it_accepted(transport: Callable[[str], Any]) -> None:
    channel, listener = await connected(transport)
    await listener.close()
    with pytest.raises(ChannelClosed):
        await channel.receive()
    with pytest.raises(Unavailable):
        await transport("host/host-1").dial(ADDRESS, listener.port, expect="orchestrator", timeout=2)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((ADDRESS, 0))
        return int(taken.getsockname()[1])


# --- WebSocket over mutual TLS -----------------------------------------------------------------------


async def test_a_party_of_another_cloud_gets_no_channel(pki: Path) -> None:
    accepted: list[str] = []

    async def serve(channel: Channel) -> None:
        accepted.append(channel.peer)

    ours = WebSocketTransport(pki / "orchestrator")
    theirs = WebSocketTransport(pki / "stranger")
    listener = await ours.listen(ADDRESS, 0, serve)
    with pytest.raises(Unavailable):
        await theirs.dial(ADDRESS, listener.port, expect="orchestrator", timeout=5)
    await listener.close()
    listener = await theirs.listen(ADDRESS, 0, serve)
    with pytest.raises(Unavailable):
        await ours.dial(ADDRESS, listener.port, expect="host/host-1", timeout=5)
    await listener.close()
    assert accepted == []


async def test_a_listener_that_says_nothing_is_given_up_after_the_timeout(pki: Path) -> None:
    with socket.socket() as silent:
        silent.bind((ADDRESS, 0))
        silent.listen()
        port = int(silent.getsockname()[1])
        with pytest.raises(Unavailable, match=r"within 0\.3 s"):
            await WebSocketTransport(pki / "orchestrator").dial(
                ADDRESS, port, expect="host/host-1", timeout=0.3
            )


async def test_it_listens_on_an_inherited_socket(pki: Path) -> None:
    held = socket.create_server((ADDRESS, 0))
    port = int(held.getsockname()[1])
    inherited = held.dup()
    listener = await WebSocketTransport(pki / "orchestrator").listen("", 0, echo, sock=inherited)
    assert listener.port == port
    channel = await WebSocketTransport(pki / "host/host-1").dial(
        ADDRESS, port, expect="orchestrator", timeout=5
    )
    await channel.close()
    await listener.close()
    held.close()


async def test_frames_have_a_limit(pki: Path) -> None:
    channel, listener = await connected(lambda party: WebSocketTransport(pki / party))
    with pytest.raises(Exception, match="frame of"):
        await channel.send(bytes(MAX_FRAME + 1))
    await channel.send(b"still open")
    assert await channel.receive() == b"still open"
    await channel.close()
    await listener.close()


async def stalled(pki: Path) -> tuple[Channel, Any]:
    """A channel whose other end has stopped reading, as a frozen process does."""

    async def freeze(channel: Channel) -> None:
        channel._connection.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(30)

    return await connected(lambda party: WebSocketTransport(pki / party), freeze)


async def test_a_peer_that_falls_silent_is_noticed(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(websocket, "PING_TIMEOUT", 0.3)
    channel, listener = await stalled(pki)
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(channel.receive(), 5)
    await listener.close()


async def test_a_peer_that_takes_nothing_holds_up_no_sender(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "SEND_TIMEOUT", 0.3)
    channel, listener = await stalled(pki)
    with pytest.raises(ChannelClosed):
        async with asyncio.timeout(5):
            while True:
                await channel.send(bytes(MAX_FRAME))
    with pytest.raises(ChannelClosed):
        await channel.send(b"nor anything after it")
    await listener.close()


# --- memory, with faults -----------------------------------------------------------------------------


def virtually(main: Callable[[], Coroutine[Any, Any, Any]], seed: int = 1) -> Any:
    return run_virtual(main(), seed=seed, limit_seconds=1000)


async def receive_until_closed(channel: Channel, into: list[bytes]) -> None:
    try:
        while True:
            into.append(await channel.receive())
    except ChannelClosed:
        pass


def run_with(faults: Faults, frames: int = 200) -> tuple[list[bytes], float]:
    """What of `frames` frames arrives under `faults`, and how long that takes."""

    async def main() -> tuple[list[bytes], float]:
        arrived: list[bytes] = []
        network = MemoryNetwork(faults)
        listener = await network.transport("b").listen(ADDRESS, 1, lambda c: receive_until_closed(c, arrived))
        channel = await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        try:
            for n in range(frames):
                await channel.send(n.to_bytes(2, "big"))
                await asyncio.sleep(0.001)
        except ChannelClosed:
            pass
        await asyncio.sleep(10)
        await listener.close()
        return arrived, asyncio.get_running_loop().time()

    return virtually(main)


def test_without_faults_everything_arrives() -> None:
    arrived, _ = run_with(Faults(1))
    assert arrived == [n.to_bytes(2, "big") for n in range(200)]


def test_faults_are_the_same_for_the_same_seed() -> None:
    def some(seed: int) -> Faults:
        return Faults(seed, drop=0.1, duplicate=0.1, late=0.1, breaks=0.001, delay=(0.001, 0.01))

    assert run_with(some(7)) == run_with(some(7))
    assert run_with(some(7)) != run_with(some(8))


def test_frames_are_lost_and_doubled_but_never_overtake() -> None:
    arrived, _ = run_with(Faults(3, drop=0.2, duplicate=0.2, late=0.3, late_by=(0.01, 0.5)))
    assert arrived == sorted(arrived)
    assert len(set(arrived)) < 200
    assert len(arrived) > len(set(arrived))


def test_a_break_is_seen_by_both_ends_and_nothing_follows() -> None:
    arrived, _ = run_with(Faults(3, breaks=0.05))
    assert len(arrived) < 200
    assert arrived == [n.to_bytes(2, "big") for n in range(len(arrived))]


def test_chance_can_be_confined_and_ended() -> None:
    faults = Faults(3, drop=1.0)
    faults.only_between(lambda sender, _receiver: sender == "b")
    assert len(run_with(faults)[0]) == 200
    faults = Faults(3, drop=1.0)
    faults.calm()
    assert len(run_with(faults)[0]) == 200


def test_a_short_partition_holds_frames_back_and_a_long_one_breaks() -> None:
    async def main() -> None:
        arrived: list[bytes] = []
        network = MemoryNetwork(patience=15)
        await network.transport("b").listen(ADDRESS, 1, lambda c: receive_until_closed(c, arrived))
        channel = await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        network.partition("a", "b")
        await channel.send(b"waits")
        await asyncio.sleep(10)
        assert arrived == []
        network.heal("a", "b")
        await asyncio.sleep(0.1)
        assert arrived == [b"waits"]
        network.partition("b", "a")
        await asyncio.sleep(10)
        await channel.send(b"in vain")
        with pytest.raises(Unavailable, match="did not answer"):
            await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        await asyncio.sleep(10)
        with pytest.raises(ChannelClosed):
            await channel.send(b"closed")
        assert arrived == [b"waits"]
        assert not network.links

    virtually(main)


def test_what_closes_behind_a_partition_is_not_known_at_the_other_end() -> None:
    async def main() -> None:
        arrived: list[bytes] = []
        network = MemoryNetwork(patience=15)
        accepted: list[Channel] = []

        async def serve(channel: Channel) -> None:
            accepted.append(channel)
            await receive_until_closed(channel, arrived)

        await network.transport("b").listen(ADDRESS, 1, serve)
        channel = await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        await asyncio.sleep(0.1)
        network.partition("a", "b")
        await channel.close()
        await asyncio.sleep(5)
        await accepted[0].send(b"to nobody")
        network.heal("a", "b")
        await asyncio.sleep(0.1)
        with pytest.raises(ChannelClosed):
            await accepted[0].send(b"now it is known")

    virtually(main)


def test_a_vanished_party_neither_listens_nor_speaks_nor_goes_on() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        going_on: list[str] = []

        async def serve(channel: Channel) -> None:
            await channel.receive()
            await asyncio.sleep(1)
            going_on.append("went on")

        await network.transport("b").listen(ADDRESS, 1, serve)
        channel = await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        await channel.send(b"do it")
        network.vanish("b")
        with pytest.raises(ChannelClosed):
            await channel.receive()
        with pytest.raises(Unavailable):
            await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        await asyncio.sleep(5)
        assert going_on == []
        await network.transport("b").listen(ADDRESS, 1, echo)

    virtually(main)


def test_an_error_while_serving_is_told() -> None:
    async def main() -> None:
        network = MemoryNetwork()

        async def serve(_channel: Channel) -> None:
            raise RuntimeError("broken")

        await network.transport("b").listen(ADDRESS, 1, serve)
        channel = await network.transport("a").dial(ADDRESS, 1, expect="b", timeout=1)
        with pytest.raises(ChannelClosed):
            await channel.receive()
        await asyncio.sleep(0)
        assert [(party, str(error)) for party, error in network.failures] == [("b", "broken")]

    virtually(main)
