"""Connections of a process are bounded from outside: here of this one."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nahtlos.physical.hypervisor import connections
from nahtlos.physical.hypervisor.connections import CUT_OFF_MS, KEEPALIVE, Address


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(stack: ExitStack) -> tuple[Address, socket.socket, socket.socket]:
    """Where somebody listens, who dialled, and who was dialled."""
    listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    address = (str(listening.getsockname()[0]), int(listening.getsockname()[1]))
    client = stack.enter_context(socket.create_connection(address, 5))
    server = stack.enter_context(listening.accept()[0])
    return address, client, server


def waits_ms(of: socket.socket) -> int:
    return of.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_a_peer_that_is_cut_off_is_waited_for_no_longer_than_said(stack: ExitStack) -> None:
    address, client, server = connected(stack)
    _, other, _ = connected(stack)
    assert (waits_ms(client), client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == (0, 0)
    assert connections.bound(os.getpid(), [address]) == 1
    assert waits_ms(client) == CUT_OFF_MS
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert {each: client.getsockopt(socket.IPPROTO_TCP, each) for each in KEEPALIVE} == KEEPALIVE
    assert waits_ms(server) == waits_ms(other) == 0, "nobody else's"


def test_a_request_without_an_answer_is_told_and_its_connection_can_be_ended(stack: ExitStack) -> None:
    address, client, server = connected(stack)

    def unanswered() -> list[bool]:
        time.sleep(0.05)  # the kernel counts in ticks
        return [each.unanswered for each in connections.silences(os.getpid(), [address])]

    unanswered()
    client.sendall(b"?")
    assert server.recv(1) == b"?"
    assert unanswered() == [True]
    server.sendall(b"!")
    assert client.recv(1) == b"!"
    assert unanswered() == []
    assert len(connections.ends(os.getpid(), [address])) == 1
    assert connections.end(os.getpid(), address) == 1
    assert server.recv(1) == b""
