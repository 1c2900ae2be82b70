"""vCPUs of a guest that was just resumed go before others, and after a moment they do not."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nahtlos.physical.hypervisor import head_start, migration
from nahtlos.physical.hypervisor.qmp import Answer, Arguments


@pytest.fixture
def vcpu() -> Iterator[int]:
    """A thread of this process that is named as QEMU names one of a vCPU."""
    began, end = threading.Event(), threading.Event()
    ids: list[int] = []

    def work() -> None:
        ids.append(threading.get_native_id())
        Path(f"/proc/self/task/{ids[0]}/comm").write_text("CPU 0/TCG")
        began.set()
        end.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    began.wait(30)
    yield ids[0]
    end.set()
    thread.join()


def nice(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may put a thread forward")
def test_the_threads_of_vcpus_alone_are_put_forward_and_back(vcpu: int) -> None:
    own, usual = os.getpid(), nice(os.getpid())
    for _ in range(2):
        head_start.give(own)
        assert (nice(vcpu), nice(own)) == (head_start.AHEAD, usual)
    for _ in range(2):
        head_start.take_back(own)
        assert (nice(vcpu), nice(own)) == (usual, usual)


def test_an_agent_that_may_not_does_without(vcpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(which: int, who: int, priority: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", denied)
    usual = nice(vcpu)
    head_start.give(os.getpid())
    head_start.take_back(os.getpid())
    assert nice(vcpu) == usual


def test_a_process_that_has_ended_is_let_be(tmp_path: Path) -> None:
    gone = 2**22 + 1  # beyond any number the kernel gives
    head_start.give(gone, tmp_path)
    head_start.take_back(gone, tmp_path)


class Destination:
    def __init__(self) -> None:
        self.said: list[tuple[str, Arguments | None]] = []

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = 5.0
    ) -> Answer:
        self.said.append((command, arguments))
        known = ("events", "return-path", "x-ignore-shared")
        return {"value": [{"capability": name, "state": False} for name in known]}


async def test_a_guest_that_stays_where_it_is_announces_nothing() -> None:
    destination = Destination()
    await migration.expect_whole(destination)
    assert destination.said[-1] == ("migrate-set-parameters", {"announce-rounds": 0})
