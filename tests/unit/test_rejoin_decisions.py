"""Which steps are kept, what a rejoin has come to, and which of several copies is read after a VMM ended."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Stale
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import CopyPhase, VolumeFormat, VolumeSpec
from nahtlos.physical.agent.volumes.rejoin import candidates
from nahtlos.physical.agent.volumes.steps import can_step, new_step
from nahtlos.physical.storage.daemon import Job
from nahtlos.physical.storage.record import Layer, Mode, VolumeRecord
from nahtlos.physical.storage.replication import (
    coarse,
    copies_in,
    fill_name,
    may_rejoin,
    mirror_name,
    outlived,
    rejoin_progress,
)

VOLUME = VolumeId("v")
RANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=60)


def endpoint(number: int, *, joining: bool = False) -> VolumeEndpoint:
    return VolumeEndpoint(
        host=HostId(f"host-{number}"), address=f"10.0.0.{number}", port=1, export="v.e1", joining=joining
    )


def reached(*copies: VolumeEndpoint) -> VolumeAttachment:
    return VolumeAttachment(volume=VOLUME, address="10.0.0.1", port=1, export="v.e1", copies=copies)


def job(name: str, status: str, *, synced: bool = False, error: str = "") -> Job:
    return Job(id=name, type="", status=status, done=3, total=5, actively_synced=synced, error=error)


def test_a_step_tells_how_many_copies_it_was_of_and_none_is_ever_named_again() -> None:
    one, two = new_step(3), new_step(3)
    assert one != two
    assert copies_in(one) == 3
    assert copies_in("nonsense") == 0


def test_steps_of_a_copy_that_is_away_outlive_those_of_the_others() -> None:
    assert outlived(["2-a", "2-b", "2-c", "3-x"], reached="2-c", before="2-b") == ("2-a",)
    assert outlived(["2-c", "3-x", "3-y"], reached="3-y", before="3-x") == ("2-c",)


@given(RANGES, st.integers(1, 10))
def test_coarse_ranges_cover_all_and_are_few(ranges: list[tuple[int, int]], most: int) -> None:
    apart = [(offset * 100, length) for offset, length in {each[0]: each[1] for each in ranges}.items()]
    found = coarse(apart, most)
    assert len(found) <= most or len(found) == len(apart) <= most
    for offset, length in apart:
        assert any(b <= offset and offset + length <= b + n for b, n in found)


@pytest.mark.parametrize(
    ("mirror", "fill", "phase"),
    [
        (("ready", True, ""), ("running", ""), CopyPhase.COPYING),
        (("ready", True, ""), ("concluded", ""), CopyPhase.READY),
        (("ready", False, ""), ("concluded", ""), CopyPhase.COPYING),
        (("ready", True, ""), None, CopyPhase.FAILED),
        (None, ("concluded", ""), CopyPhase.FAILED),
        (("ready", True, ""), ("concluded", "gone"), CopyPhase.FAILED),
        (("concluded", True, ""), ("concluded", ""), CopyPhase.FAILED),
    ],
)
def test_only_a_mirror_beside_a_whole_filling_is_in_step(
    mirror: tuple[str, bool, str] | None, fill: tuple[str, str] | None, phase: CopyPhase
) -> None:
    jobs: dict[str, Job] = {}
    if mirror is not None:
        name = mirror_name(VOLUME)
        jobs[name] = job(name, mirror[0], synced=mirror[1], error=mirror[2])
    if fill is not None:
        jobs[fill_name(VOLUME)] = job(fill_name(VOLUME), fill[0], error=fill[1])
    progress = rejoin_progress(jobs, VOLUME)
    assert progress is not None
    assert progress.phase is phase


def test_without_any_job_nothing_rejoins() -> None:
    assert rejoin_progress({}, VOLUME) is None


def test_what_a_copy_must_be_to_come_back() -> None:
    layer = Layer(number=0, file="v.raw", format=VolumeFormat.RAW, size=64 << 20)
    record = VolumeRecord(volume=VOLUME, layers=(layer,), active=0, epoch=1, in_step="2-a")
    spec = VolumeSpec(id=VOLUME, size_mib=64, image=None, host=HostId("host-2"), epoch=2)
    assert may_rejoin(record, spec)
    receiving = msgspec.structs.replace(record, mode=Mode.RECEIVING, epoch=2)
    assert may_rejoin(receiving, spec)
    assert not may_rejoin(msgspec.structs.replace(record, in_step=""), spec)
    assert not may_rejoin(msgspec.structs.replace(record, epoch=2), spec)
    assert not may_rejoin(msgspec.structs.replace(record, mode=Mode.PROXY), spec)
    assert not may_rejoin(record, msgspec.structs.replace(spec, size_mib=65))
    assert not may_rejoin(record, msgspec.structs.replace(spec, format=VolumeFormat.QCOW2))
    with pytest.raises(Stale):
        may_rejoin(msgspec.structs.replace(record, epoch=3), spec)


def test_after_a_vmm_ended_its_own_host_is_read_and_never_a_copy_that_was_joining() -> None:
    here = HostId("host-2")
    both = reached(endpoint(1), endpoint(2))
    assert [each.host for each in candidates(both, here)] == ["host-2", "host-1"]
    joining = reached(endpoint(1), endpoint(2, joining=True))
    assert [each.host for each in candidates(joining, here)] == ["host-1"]
    assert candidates(reached(), here) == ()
    assert can_step(both)
    assert not can_step(joining)
    assert not can_step(reached())
