"""What a tap refuses, and what a VMM may do with its queues: on a real tap, without a host around it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import bpf, links, namespaces, tap
from nahtlos.physical.network.netlink import Netlink

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
OWN, OTHERS = bytes.fromhex("f254004d0010"), (bytes.fromhex("f254004d0011"), bytes.fromhex("52540000d010"))
KIND, BROADCAST = b"\x88\xb6", b"\xff" * 6
LEAVE_AND_JOIN = """
import fcntl, struct, sys
for flag in (0x0400, 0x0200):
    fcntl.ioctl(int(sys.argv[1]), 0x400454D9, struct.pack("16xH22x", flag))
"""
"""As a VMM does when its guest takes further queues into use: with nothing of the agent's memory."""


@pytest.fixture
def space() -> Iterator[int]:
    fd = namespaces.create()
    yield fd
    os.close(fd)


def opened(space: int, queues: int) -> list[int]:
    """Of one tap that refuses what comes from OWN."""

    def act() -> list[int]:
        fds = [tap.open_tap("tp0", many_queues=True) for _ in range(queues)]
        tap.refuse_own(fds[0], OWN, queues=queues)
        with Netlink() as netlink:
            netlink.change([links.configure("tp0", up=True)])
        return fds

    return namespaces.within(space, act)


def senders(space: int, fds: list[int]) -> list[bytes]:
    """Of broadcasts from everybody: those that arrive."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sending:
            sending.bind(("tp0", 0))
            for mac in (OWN, *OTHERS):
                sending.send(BROADCAST + mac + KIND + bytes(50))

    namespaces.within(space, send)
    deadline, found = time.monotonic() + 1.0, list[bytes]()
    while len(found) < len(OTHERS) and time.monotonic() < deadline:
        frames = [bytes(frame[10:24]) for fd in fds for frame in tap.frames(fd)]
        found += [f[6:12] for f in frames if f[:6] == BROADCAST and f[12:] == KIND]
    return sorted(found)


@pytest.mark.parametrize("queues", [1, 2])
def test_what_a_server_sent_itself_is_refused_and_nothing_else(space: int, queues: int) -> None:
    fds = opened(space, queues)
    assert senders(space, fds) == sorted(OTHERS)


def test_a_vmm_may_take_a_queue_out_of_use_and_into_use_again(space: int) -> None:
    fds = opened(space, 2)
    command = [sys.executable, "-S", "-c", LEAVE_AND_JOIN, str(fds[1])]
    subprocess.run(command, pass_fds=[fds[1]], check=True, timeout=20)
    assert tap.in_use(fds[1])
    assert senders(space, fds) == sorted(OTHERS)


def test_a_kernel_that_loads_no_program_serves_taps_of_one_queue(
    space: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise Unavailable("no bpf() here", field="queues")

    monkeypatch.setattr(bpf, "load", refuse)
    assert senders(space, opened(space, 1)) == sorted(OTHERS)
    with pytest.raises(Unavailable, match="no bpf"):
        opened(space, 2)
