"""A server with two processors and two pairs of queues, by the command line and with a real guest: moved
there and back under traffic that reaches both queues, every datagram counted."""

import asyncio
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from test_command_line import CommandLine

from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.topology import within

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(180),
]
ECHO_PORT = 7
FLOWS = 16
"""Each has a port of its own, by which the kernel chooses the queue."""
EVERY_SECONDS = 0.004
UP_SECONDS = 60.0
DRAIN_SECONDS = 2.0
DATAGRAM = struct.Struct("!II40x")


@pytest.fixture
def nahtlos() -> Iterator[CommandLine]:
    line = CommandLine(unique_name("mq"))
    try:
        yield line
    finally:
        assert line.run("lab", "down").returncode == 0


class Flows:
    """Numbered datagrams to the echo port, by turns from several ports, and how often each came back."""

    def __init__(self, stack: ExitStack, client: str, address: str) -> None:
        def opened() -> list[socket.socket]:
            return [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(FLOWS)]

        self._sockets = within(client, opened)
        self._selector = stack.enter_context(selectors.DefaultSelector())
        for number, sock in enumerate(self._sockets):
            stack.enter_context(sock)
            sock.setblocking(False)
            sock.connect((address, ECHO_PORT))
            self._selector.register(sock, selectors.EVENT_READ, number)
        self.back: list[list[int]] = [[] for _ in range(FLOWS)]
        self.halted = False

    async def run(self) -> None:
        due = time.monotonic()
        turn = 0
        while not self.halted:
            while due <= time.monotonic():
                flow = turn % FLOWS
                self._sockets[flow].send(DATAGRAM.pack(flow, len(self.back[flow])))
                self.back[flow].append(0)
                turn, due = turn + 1, due + EVERY_SECONDS
            self._take()
            await asyncio.sleep(0.001)
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.count(0) and time.monotonic() < deadline:
            self._take()
            await asyncio.sleep(0.005)

    def _take(self) -> None:
        for key, _ in self._selector.select(0):
            sock = self._sockets[key.data]
            try:
                while True:
                    flow, number = DATAGRAM.unpack(sock.recv(2048))
                    self.back[flow][number] += 1
            except BlockingIOError:
                continue

    def count(self, times: int) -> int:
        return sum(flow.count(times) for flow in self.back)


async def test_two_processors_and_two_queues_move_and_nothing_is_lost(nahtlos: CommandLine) -> None:
    await asyncio.to_thread(nahtlos.json, "lab", "up", "--hosts", "2")
    create = ("server", "create", "twin", "--vcpus", "2", "--memory-mib", "128", "--host", "host-1")
    created = await asyncio.to_thread(nahtlos.json, *create, "--network", "tenant,queues=2")
    address = created["ip"]
    client = f"nl-{nahtlos.lab}-client"
    await Outside(client).until_up(address, timeout=UP_SECONDS)
    with ExitStack() as stack:
        flows = Flows(stack, client, address)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(flows.run())
            for host in ("host-2", "host-1"):
                moved = await asyncio.to_thread(nahtlos.json, "server", "move", "twin", "--to", host)
                assert moved["host"] == host
                assert not running.done()
            flows.halted = True
    sent = sum(map(len, flows.back))
    assert sent > 500
    assert (flows.count(0), sent - flows.count(1)) == (0, 0), "lost, and lost or doubled"
