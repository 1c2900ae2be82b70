"""TCP through moves behind a strict, stateful group: in, out, idle and bulk, with and without what the
firewall remembers going along.

The server is a namespace with a stack of its own (see `network_pump`); the other side is the client outside,
behind the edge. Its group lets it open connections to anywhere and be reached at two ports only, and a packet
in the middle of a connection that the firewall does not remember is dropped. `in` and `out` echo a line every
20 ms; `idle` says nothing from the first move to the last; `bulk` is a download by the server. A connection
is alive if after the last move it still echoes within a second, the download if it comes to its end.
Segments sent again are the kernel's count at the sender, which guesses: it probes after a few milliseconds of
silence, and takes what comes late for lost. The receiver then tells it that it had a segment already (DSACK);
what it does not say that of was missing, and nothing may be.
"""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import network_load as load
from benchmarks.figures import Figures, Goal
from benchmarks.network_hosts import GATEWAY_IP, World, run, server_port
from benchmarks.network_moves import Gate, Leg
from nahtlos.lab import topology
from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, SecurityGroupSpec, SecurityRule
from nahtlos.physical.network import tap

SERVER = "mover-0"
ECHO, BULK = 5202, 5203
MOVES, LONG_MOVES = 6, 30
BLACKOUT_SECONDS = 0.1
PAUSE_SECONDS, LONG_PAUSE_SECONDS = 0.3, 2.0
"""Between moves; in the long form nothing is heard of the idle connection for more than a minute."""
LINE_SECONDS = 0.02
ALIVE_SECONDS = 1.0
CONNECT_SECONDS = 5.0
GROUP = SecurityGroupSpec(
    id=SecurityGroupId("strict"),
    rules=(
        SecurityRule(direction=Direction.EGRESS),
        SecurityRule(direction=Direction.INGRESS, protocol="tcp", port_min=ECHO, port_max=BULK),
    ),
)
ALL_ALIVE = Goal(at_least=1.0)
NOTHING_MISSING = Goal(at_most=0)
A_MINUTE = Goal(at_least=60)


@dataclass
class Connection:
    """One of those that must live: echoed lines of 8 bytes."""

    name: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    echoed: int = 0
    task: "asyncio.Task[None] | None" = None

    async def echo(self, seconds: float) -> bool:
        line = struct.pack("!Q", self.echoed)
        try:
            async with asyncio.timeout(seconds):
                self.writer.write(line)
                await self.writer.drain()
                if await self.reader.readexactly(len(line)) != line:
                    raise RuntimeError(f"{self.name}: something else came back")
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return False
        self.echoed += 1
        return True

    async def talk(self) -> None:
        """For as long as it lives."""
        while await self.echo(30.0):
            await asyncio.sleep(LINE_SECONDS)

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.writer.transport.abort()


@dataclass
class Outcome:
    moves: int = 0
    alive: dict[str, bool] = field(default_factory=dict[str, bool])
    again: int = 0
    """Segments of the bulk."""
    megabytes: float = 0.0
    silence: float = 0.0
    """Seconds from the last that was heard of the idle connection until it was asked again."""
    counters: Counter[str] = field(default_factory=Counter[str])
    """What the sender's kernel counted meanwhile, by its names."""


def counters(space: str) -> Counter[str]:
    """TCP's of a namespace."""
    text = topology.within(space, lambda: Path("/proc/thread-self/net/netstat").read_text())
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("TcpExt:"))
    return Counter(dict(zip(names, map(int, values), strict=True)))


@contextlib.contextmanager
def _server(world: World) -> Iterator[tuple[str, int]]:
    """A namespace with a tap of its own in place of a server's hardware; its name and the descriptor."""
    port, name = world.port(server_port(1).id), f"nl-{world.lab}-tcp"
    run("ip", "netns", "add", name)
    try:
        fd = topology.within(name, lambda: tap.open_tap("eth0"))
        lines = [
            f"link set eth0 address {port.mac} txqueuelen {tap.QUEUE} up",
            f"addr add {port.ip}/16 dev eth0",
            f"route add default via {GATEWAY_IP}",
        ]
        run("ip", "-n", name, "-batch", "-", text="\n".join(lines))
        yield name, fd
    finally:
        run("ip", "netns", "delete", name)


async def through_moves(moves: int, pause: float, *, transfer: bool) -> Outcome:
    """The four connections through `moves` handovers; none: for as long as that would take."""
    with World(2) as world:
        world.groups = (GROUP,)
        hosts = [host.name for host in world.compute]
        port = world.place(server_port(1, (GROUP.id,)), hosts[0])
        way = Gate(world, transfer=transfer)
        fds = await way.open({SERVER: port}, {SERVER: hosts[0]})
        with _server(world) as (space, inside), load.Load("benchmarks.network_pump") as pump:
            await pump.tell(load.Outside(SERVER), inside)
            await pump.tell(load.Run(SERVER), fds[SERVER])
            client = world.topology.client
            async with _opened(space, port.ip, client.namespace, client.address) as connections:
                before = counters(client.namespace)
                with _bulk(space, port.ip, client.namespace) as bulk:
                    outcome, silent_since = Outcome(), time.monotonic()
                    await asyncio.sleep(pause)
                    for number in range(moves):
                        source, destination = hosts[number % 2], hosts[1 - number % 2]
                        await way.move(Leg(SERVER, source, destination, BLACKOUT_SECONDS), pump)
                        await way.settle()
                        await asyncio.sleep(pause)
                        outcome.moves += 1
                    if not moves:
                        await asyncio.sleep(MOVES * (pause + BLACKOUT_SECONDS))
                    outcome.silence = time.monotonic() - silent_since
                    for connection in reversed(connections):  # the idle one is asked first
                        outcome.alive[connection.name] = await _still(connection)
                    outcome.alive["bulk"], outcome.again, outcome.megabytes = bulk.finish()
                    outcome.counters = counters(client.namespace)
                    outcome.counters.subtract(before)
    return outcome


async def _still(connection: Connection) -> bool:
    if connection.task is None:
        return await connection.echo(ALIVE_SECONDS)
    before = connection.echoed
    await asyncio.sleep(ALIVE_SECONDS)
    return connection.echoed > before


@contextlib.asynccontextmanager
async def _opened(space: str, server: str, outside: str, client: str) -> AsyncGenerator[list[Connection]]:
    connections: list[Connection] = []
    servers = [await _echoing(space, server), await _echoing(outside, client)]
    try:
        for name, where, to in (("in", outside, server), ("out", space, client), ("idle", outside, server)):
            sock = topology.within(where, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            sock.setblocking(False)
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, (to, ECHO))
            connections.append(Connection(name, *await asyncio.open_connection(sock=sock)))
            if not await connections[-1].echo(CONNECT_SECONDS):
                raise RuntimeError(f"{name}: connected, and nothing comes back")
        for connection in connections[:2]:
            connection.task = asyncio.create_task(connection.talk())
        yield connections
    finally:
        for connection in connections:
            await connection.close()
        for serving in servers:
            serving.close()


async def _echoing(space: str, address: str) -> asyncio.Server:
    def listen() -> socket.socket:
        return socket.create_server((address, ECHO))

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 12):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    return await asyncio.start_server(echo, sock=topology.within(space, listen))


class _Bulk:
    """A download by the server: one process inside it, one outside."""

    def __init__(self, receiver: "subprocess.Popen[str]", sender: "subprocess.Popen[str]") -> None:
        self._receiver, self._sender = receiver, sender

    def finish(self) -> tuple[bool, int, float]:
        """Whether data came until the end, what was sent again, and how many megabytes came."""
        assert self._sender.stdin is not None
        self._sender.stdin.close()
        try:
            self._receiver.wait(ALIVE_SECONDS * 5)
            self._sender.wait(ALIVE_SECONDS * 5)
        except subprocess.TimeoutExpired:
            return False, 0, 0.0
        assert self._receiver.stdout is not None and self._sender.stdout is not None
        count = int(self._receiver.stdout.read().split()[0])
        return True, int(self._sender.stdout.read()), count / 1e6


@contextlib.contextmanager
def _bulk(space: str, server: str, outside: str) -> Iterator[_Bulk]:
    with contextlib.ExitStack() as stack:

        def start(where: str, *arguments: str) -> "subprocess.Popen[str]":
            command = [
                "nsenter",
                f"--net=/run/netns/{where}",
                sys.executable,
                "-m",
                "benchmarks.network_stream",
            ]
            process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        receiver = start(space, "receive", server, str(BULK))
        assert receiver.stdout is not None
        if receiver.stdout.readline().strip() != "ready":
            raise RuntimeError("the server does not listen")
        yield _Bulk(receiver, start(outside, "flow", server, str(BULK)))


async def measure(figures: Figures, *, long: bool) -> None:
    moves, pause = (LONG_MOVES, LONG_PAUSE_SECONDS) if long else (MOVES, PAUSE_SECONDS)
    carried = await through_moves(moves, pause, transfer=True)
    still = await through_moves(0, pause, transfer=True)
    dropped = await through_moves(2, pause, transfer=False)
    for name, alive in carried.alive.items():
        figures.add(
            f"TCP '{name}' alive after moves behind a strict group",
            float(alive),
            "yes = 1",
            goal=ALL_ALIVE,
            samples=carried.moves,
        )
    figures.add(
        "silence of the idle connection, over all these moves",
        carried.silence,
        "s",
        goal=A_MINUTE if long else None,
        samples=carried.moves,
    )
    for name, alive in dropped.alive.items():
        figures.add(
            f"the same '{name}', without what the firewall remembers",
            float(alive),
            "yes = 1",
            samples=dropped.moves,
        )
    for words, seen in (("through moves", carried), ("without a move", still)):
        download = f"in a download of {seen.megabytes:.0f} MB {words}"
        goal = NOTHING_MISSING if seen is carried else None
        missing = seen.again - seen.counters["TCPDSACKRecvSegs"]
        figures.add(f"segments sent again {download}", seen.again, "segments", samples=seen.moves)
        figures.add(
            f"of those, missing {download}", max(0, missing), "segments", goal=goal, samples=seen.moves
        )
        figures.add(
            f"timeouts {download}", seen.counters["TCPTimeouts"], "times", goal=goal, samples=seen.moves
        )
