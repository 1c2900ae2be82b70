"""Bytes that a stream counts as sent and that have not come, as the kernel tells them."""

import socket
from contextlib import ExitStack

import pytest

from nahtlos.physical.hypervisor.in_flight import unconfirmed


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_what_nobody_takes_is_told(address: str, family: int) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip(f"no {address} here")
        listener.listen()
        port = listener.getsockname()[1]
        uri = f"tcp:[{address}]:{port}" if family == socket.AF_INET6 else f"tcp:{address}:{port}"
        sender = stack.enter_context(socket.create_connection((address, port)))
        stack.enter_context(listener.accept()[0])
        assert unconfirmed(uri) == 0
        sender.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += sender.send(bytes(1 << 16))
        assert 0 < unconfirmed(uri) <= sent
        assert unconfirmed(f"tcp:127.0.0.9:{port}") == 0


def test_what_is_no_tcp_has_nothing_on_its_way() -> None:
    assert unconfirmed("") == unconfirmed("unix:/nowhere") == 0
