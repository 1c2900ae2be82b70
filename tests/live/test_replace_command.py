"""A server's hypervisor replaced by the command line, in a whole data centre, under traffic from outside."""

import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from physical_host import release
from test_command_line import CommandLine
from test_replacement import Echoes

from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.topology import within

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(300),
]
T = TypeVar("T")


@pytest.fixture
def nahtlos() -> Iterator[CommandLine]:
    line = CommandLine(unique_name("repl"))
    try:
        yield line
    finally:
        assert line.run("lab", "down").returncode == 0


class Outside:
    def __init__(self, lab: str) -> None:
        self._namespace = f"nl-{lab}-client"

    def within(self, act: Callable[[], T]) -> T:
        return within(self._namespace, act)


def test_a_server_gets_another_release_where_it_is_and_nobody_notices(nahtlos: CommandLine) -> None:
    old, new = release("10.0"), release("11.1")
    nahtlos.json("lab", "up", "--hosts", "1")
    server = nahtlos.json("server", "create", "web-1", "--memory-mib", "128")
    assert nahtlos.refused("server", "replace-vmm", "web-1", "--release", old)["field"] == "release"
    assert nahtlos.refused("server", "replace-vmm", "web-1", "--release", "qemu-9")["field"] == "release"

    echoes = Echoes(Outside(nahtlos.lab), server["ip"])
    echoes.wait_for_answer()
    echoes.start()
    for to in (new, old):
        time.sleep(0.5)
        view = nahtlos.json("server", "replace-vmm", "web-1", "--release", to)
        assert (view["host"], view["release"], view["replaced_by"]) == ("host-1", to, None)
    time.sleep(0.5)
    echoes.stop()
    assert (echoes.received, echoes.doubled) == (echoes.sent, 0)
    assert nahtlos.json("server", "show", "web-1")["epoch"] == 3
