"""Which of a storage daemon's clients are sent back when it answers nobody."""

import os
import socket

from nahtlos.physical.storage.newcomers import (
    DOUBTFUL_AFTER_SECONDS,
    NEW_FOR_SECONDS,
    Newcomers,
    Thread,
    spins,
    threads,
)
from nahtlos.physical.storage.sockets import cut_accepted, socket_inodes


def look(main: str, *others: str) -> tuple[Thread, ...]:
    return (Thread(main=True, state=main), *(Thread(main=False, state=state) for state in others))


def test_daemon_that_waits_for_its_disk_or_for_anything_else_does_not_spin() -> None:
    assert spins([look("R", "S", "S"), look("R", "S", "S")])
    assert not spins([look("R", "S"), look("R", "D")]), "one of its threads is at the disk"
    assert not spins([look("R", "R"), look("R", "S")]), "or on its way there"
    assert not spins([look("R", "S"), look("S", "S")])
    assert not spins([])
    assert not spins([()]), "it has ended"
    here = threads(os.getpid())
    assert [each.main for each in here].count(True) == 1
    assert threads(0) == ()


def test_those_that_came_lately_are_new() -> None:
    clients = Newcomers()
    clients.seen({1, 2}, 100.0)
    clients.seen({1, 2, 3}, 103.0)
    clients.seen({2, 3, 4}, 103.0 + NEW_FOR_SECONDS)
    now = 103.5 + NEW_FOR_SECONDS
    assert clients.among({2, 3, 4, 5}, now, silent=0.5) == {4, 5}, "of 2 it is not known, 3 is there for long"


def test_those_of_whom_it_is_not_known_count_when_it_takes_long() -> None:
    clients = Newcomers()
    clients.seen({1}, 100.0)
    assert clients.among({1}, 100.5, silent=0.5) == frozenset()
    assert clients.among({1}, 104.0, silent=DOUBTFUL_AFTER_SECONDS) == {1}
    clients.seen({1, 2}, 110.0)
    assert clients.among({1, 2}, 116.0, silent=6.0) == {1}, "of the other it is known"


def test_only_connections_that_were_accepted_are_cut() -> None:
    """The daemon is a client as well, of the daemons of other hosts."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as outward,
        listening.accept()[0] as accepted,
    ):
        every = socket_inodes(os.getpid())
        named = [os.fstat(each.fileno()).st_ino for each in (listening, outward, accepted)]
        assert every >= set(named)
        assert cut_accepted(os.getpid(), named[:2]) == 0
        assert cut_accepted(os.getpid(), named) == 1
        outward.settimeout(5)
        assert outward.recv(1) == b""
    assert socket_inodes(0) == frozenset()
