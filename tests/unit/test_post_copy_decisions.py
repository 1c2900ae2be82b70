"""Memory that follows a server: when it is over, when the server is lost, and which kernels can at all."""

import errno

import msgspec
import pytest

from nahtlos.model.blackout import POST_COPY_FIRST_BYTES, POST_COPY_PAUSE_MS, slowest_for_post_copy, wake_ms
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Size
from nahtlos.physical.agent.following import (
    ENDING_SECONDS,
    PATIENCE_SECONDS,
    Following,
    check_missed,
    ended_by_source,
    looked,
)
from nahtlos.physical.hypervisor.userfault import MISSING_SHMEM, why_no_userfault
from nahtlos.physical.ports import Missing, VmmId, VmmStatus
from nahtlos.wire.messages import MoveReady


def seen(missing: Missing, arrived: int = 0, state: RunState = RunState.RUNNING) -> VmmStatus:
    return VmmStatus(
        id=VmmId(ServerId("web"), 2), state=state, release=None, size=Size(), missing=missing, arrived=arrived
    )


@pytest.mark.parametrize("vmm", [None, seen(Missing.NOTHING), seen(Missing.CUT, state=RunState.CRASHED)])
def test_it_is_over_once_nothing_is_missing_or_nobody_is_left_to_miss_it(vmm: VmmStatus | None) -> None:
    _, fate = looked(Following(since=0.0), vmm, 1000.0)
    assert fate.over and not fate.lost


@pytest.mark.parametrize("missing", [Missing.COMING, Missing.CUT])
def test_it_is_lost_only_if_nothing_has_come_for_long(missing: Missing) -> None:
    following, arrived = Following(since=0.0), 0
    for step in range(1, 10):
        arrived += 4096
        following, fate = looked(following, seen(missing, arrived), step * PATIENCE_SECONDS * 0.9)
        assert not fate.lost
    last = following.since
    _, fate = looked(following, seen(missing, arrived), last + PATIENCE_SECONDS)
    assert not fate.lost
    _, fate = looked(following, seen(missing, arrived), last + PATIENCE_SECONDS + 1)
    assert "nothing of its memory has come" in fate.lost


def test_a_source_that_has_ended_is_given_a_moment_for_its_last_bytes() -> None:
    following = ended_by_source(ended_by_source(Following(since=0.0), 10.0), 12.0)
    assert not looked(following, seen(Missing.COMING), 10.0 + ENDING_SECONDS)[1].lost
    assert "its source is gone" in looked(following, seen(Missing.COMING), 10.1 + ENDING_SECONDS)[1].lost


@pytest.mark.parametrize("vmm", [None, seen(Missing.NOTHING), seen(Missing.CUT, state=RunState.CRASHED)])
def test_nobody_waits_anew_for_what_nobody_misses(vmm: VmmStatus | None) -> None:
    with pytest.raises(Refused):
        check_missed(vmm)
    check_missed(seen(Missing.CUT))


def test_a_kernel_without_it_is_named_with_what_to_do() -> None:
    def denied() -> int:
        raise OSError(errno.ENOSYS, "no such call")

    assert "ENOSYS" in why_no_userfault(denied)
    assert "shared memory" in why_no_userfault(lambda: ~MISSING_SHMEM & 0xFF)
    assert "/dev/userfaultfd" in why_no_userfault(denied)
    assert why_no_userfault(lambda: MISSING_SHMEM) == ""


def test_an_agent_of_an_older_release_says_nothing_of_it_which_means_no() -> None:
    told = msgspec.json.decode(b'{"type":"MoveReady","uri":"tcp:1"}', type=MoveReady)
    assert (told.post_copy, told.why_no_post_copy) == (False, "")


def test_the_link_that_a_budget_needs() -> None:
    assert slowest_for_post_copy(0, "tcg") == 0.0
    assert slowest_for_post_copy(int(POST_COPY_PAUSE_MS), "tcg") == float("inf")
    budget = POST_COPY_PAUSE_MS + wake_ms("tcg") + 100
    assert slowest_for_post_copy(int(budget), "tcg") == pytest.approx(POST_COPY_FIRST_BYTES / 0.1, rel=0.01)
