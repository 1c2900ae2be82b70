"""What is learned of an operation that ended: its parts, told apart by the marks its hosts set."""

import msgspec
import pytest

from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.ids import HostId, OperationId, ServerId, VolumeId
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.model.prediction import Means
from nahtlos.runtime.controllers.outcomes import DONE, MEANS, sample_of

SPEC = ServerSpec(
    id=ServerId("vm-1"),
    size=Size(vcpus=1, memory_mib=512),
    volume=VolumeId("vm-1-disk"),
    ports=(),
    machine="pc-q35-10.0",
    blackout_budget_ms=300,
)
TIMES = {
    "begin": 10.0,
    "prepare": 10.1,
    "precopy": 10.6,
    "switch": 14.6,
    "stopped": 14.61,
    "running": 14.63,
    "done": 15.2,
}


def ended(
    kind: str = "move", *, times: dict[str, float] = TIMES, result: dict[str, str] | None = None
) -> OperationRecord:
    return OperationRecord(
        id=OperationId("op-1"),
        kind=kind,
        subject="vm-1",
        state=DONE,
        source=HostId("host-1"),
        destination=HostId("host-2"),
        times=times,
        result=result or {},
    )


def test_the_copying_is_told_apart() -> None:
    one = sample_of(ended(), SPEC)
    assert one is not None
    assert one.means is Means.PRE_COPY
    assert (one.brownout_seconds, one.seconds) == (pytest.approx(4.0), pytest.approx(5.2))
    assert one.pause_ms == pytest.approx(20.0)
    assert one.blackout_budget_ms == 300


def test_in_place_nothing_is_copied_and_what_followed_is_not_told_apart() -> None:
    in_place = sample_of(ended("replace"), SPEC)
    assert in_place is not None and in_place.brownout_seconds == 0.0
    followed = sample_of(ended(result={MEANS: Means.POST_COPY.value}), SPEC)
    assert followed is not None and followed.brownout_seconds is None


def test_nothing_is_learned_of_what_was_not_seen_whole() -> None:
    unseen = {name: at for name, at in TIMES.items() if name != "precopy"}
    one = sample_of(ended(times=unseen), SPEC)
    assert one is not None and one.brownout_seconds is None
    assert sample_of(ended(times={**TIMES, "running": 14.6}), SPEC) is None
    assert sample_of(msgspec.structs.replace(ended(), state="undone"), SPEC) is None
