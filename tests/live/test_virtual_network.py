"""The virtual network end to end, by the command line, with a real guest: a network of its own, a router that
leads out, a floating address, a strict group, and a connection from outside that outlives a move."""

import asyncio
import contextlib
import http.client
import os
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from test_command_line import CommandLine

from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.topology import within
from nahtlos.model.errors import Unavailable

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(300),
]
FLOATING = "203.0.113.30"
LINES = 7000
"""A port of the guest's that answers, and that no rule names."""
UP_SECONDS = 90.0
SILENCE_SECONDS = 3.0

T = TypeVar("T")


@pytest.fixture
def nahtlos() -> Iterator[CommandLine]:
    line = CommandLine(unique_name("vnet"))
    try:
        yield line
    finally:
        assert line.run("lab", "down").returncode == 0


class Client:
    """Outside of the cloud."""

    def __init__(self, lab: str) -> None:
        self._namespace = f"nl-{lab}-client"
        self.outside = Outside(self._namespace)

    def do(self, act: Callable[[], T]) -> T:
        return within(self._namespace, act)

    def reaches(self, port: int) -> bool:
        """Whether a new connection comes about; one that is dropped is not answered at all."""

        def connect() -> bool:
            try:
                with socket.create_connection((FLOATING, port), timeout=SILENCE_SECONDS):
                    return True
            except TimeoutError:
                return False

        return self.do(connect)

    def connection(self) -> http.client.HTTPConnection:
        def connect() -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(FLOATING, 80, timeout=30.0)
            connection.connect()
            return connection

        return self.do(connect)


def boot_of(connection: http.client.HTTPConnection) -> bytes:
    """What the server says of itself over this very connection, which is not opened anew."""
    assert connection.sock is not None
    before = connection.sock
    connection.request("GET", "/")
    answer = connection.getresponse().read()
    assert connection.sock is before
    return answer


def test_a_server_of_a_network_is_reached_by_its_floating_address_wherever_it_is(
    nahtlos: CommandLine,
) -> None:
    nahtlos.json("lab", "up", "--hosts", "2")
    nahtlos.json("network", "create", "blue", "--cidr", "10.1.0.0/24")
    nahtlos.json("security-group", "create", "web")
    nahtlos.json("security-group", "rule", "add", "web", "--protocol", "tcp", "--port", "80")
    nahtlos.json(
        "server", "create", "web-1", "--network", "blue,group=web", "--memory-mib", "128", "--host", "host-1"
    )
    nahtlos.json("router", "create", "wan", "--subnet", "blue")
    nahtlos.json("router", "gateway", "set", "wan", "--host", "edge-1", "--address", "203.0.113.20")
    nahtlos.json("floating-ip", "create", "front", "--address", FLOATING, "--port", "web-1-eth0")

    client = Client(nahtlos.lab)
    asyncio.run(client.outside.until_up(FLOATING, timeout=UP_SECONDS))
    assert not client.reaches(LINES)
    with contextlib.closing(client.connection()) as held:
        booted = boot_of(held)
        for host in ("host-2", "host-1"):
            assert nahtlos.json("server", "move", "web-1", "--to", host)["host"] == host
            assert boot_of(held) == booted, "the connection is the same, and so is the guest"
            assert client.reaches(80)
            assert not client.reaches(LINES)

    nahtlos.json("security-group", "rule", "add", "web", "--protocol", "tcp", "--port", str(LINES))
    assert client.reaches(LINES)
    nahtlos.json("port", "set", "web-1-eth0", "--security-group", "none")
    nahtlos.json("floating-ip", "unassign", "front")
    with pytest.raises((Unavailable, OSError)):
        asyncio.run(client.outside.get(FLOATING, "/", timeout=SILENCE_SECONDS))
    assert nahtlos.refused("network", "delete", "blue")["field"] == "network"
