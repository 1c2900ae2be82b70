"""What is decided when volumes go from one host to another: by the driver from what a crash left, by agents
from what they know better than their configuration."""

from pathlib import Path

import msgspec
import pytest

from nahtlos.model.config import HostConfig, ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Stale
from nahtlos.model.ids import HostId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationKind
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.model.storage import CopyPhase, CopyProgress, VolumeFormat, VolumeSpec
from nahtlos.physical.agent.ledger import Journal, Ledger, Role
from nahtlos.physical.agent.volumes import holds
from nahtlos.physical.agent.volumes.copying import Act, Pace, next_act, told
from nahtlos.physical.agent.volumes.peers import reached_by
from nahtlos.physical.storage.arrivals import blank_record
from nahtlos.physical.storage.daemon import Job
from nahtlos.physical.storage.departures import left_behind
from nahtlos.physical.storage.record import Layer, Mode, SnapshotRecord, VolumeRecord
from nahtlos.physical.storage.relocation import Outcome, outcome, progress_of

VOLUME = VolumeId("v")
ONE, OTHER = OperationId("op-1"), OperationId("op-2")
A, B, C = HostId("a"), HostId("b"), HostId("c")


def mirror(status: str, *, synced: bool = False, error: str = "") -> Job:
    return Job(id="relocate-v", type="mirror", status=status, actively_synced=synced, error=error)


READY = mirror("ready", synced=True)


@pytest.mark.parametrize(
    ("chain", "job", "below", "decided"),
    [
        pytest.param(("remote-v",), None, None, Outcome.PASSED_ON, id="passed-on"),
        pytest.param(("remote-v",), READY, "hold-v", Outcome.PASSED_ON, id="its-mirror-still-there"),
        pytest.param(None, None, None, Outcome.PASSED_ON, id="not-opened-yet"),
        pytest.param(("raw-v",), READY, "hold-v", Outcome.FORWARD, id="both-hold-everything"),
        pytest.param(("raw-v",), READY, "link-v", Outcome.BACK, id="its-target-may-be-given-up"),
        pytest.param(("raw-v",), mirror("concluded", error="EIO"), "hold-v", Outcome.BACK, id="broke-off"),
        pytest.param(("raw-v",), mirror("ready"), "hold-v", Outcome.BACK, id="not-in-step"),
        pytest.param(("raw-v",), None, None, Outcome.BACK, id="daemon-started-by-its-old-definition"),
    ],
)
def test_what_a_crash_left_is_carried_on_only_if_both_sides_hold_everything(
    chain: tuple[str, ...] | None, job: Job | None, below: str | None, decided: Outcome
) -> None:
    assert outcome(chain, "remote-v", job, below) is decided


def test_a_copy_is_ready_only_when_every_write_goes_to_both() -> None:
    assert progress_of(None).phase is CopyPhase.NONE
    assert progress_of(mirror("running")).phase is CopyPhase.COPYING
    assert progress_of(mirror("ready")).phase is CopyPhase.COPYING
    assert progress_of(READY).phase is CopyPhase.READY
    assert progress_of(mirror("concluded", error="EIO")) == CopyProgress(phase=CopyPhase.FAILED, error="EIO")


def test_what_is_next_is_told_by_the_phase_alone() -> None:
    assert {phase: next_act(phase) for phase in CopyPhase} == {
        CopyPhase.NONE: Act.BEGIN,
        CopyPhase.FAILED: Act.BEGIN,
        CopyPhase.COPYING: Act.WAIT,
        CopyPhase.READY: Act.COMPLETE,
        CopyPhase.DONE: Act.FORWARD,
    }


def test_rate_and_time_left_are_told() -> None:
    def at(done: int) -> CopyProgress:
        return CopyProgress(phase=CopyPhase.COPYING, done=done << 20, total=1000 << 20)

    pace = Pace().seen(10.0, at(0)).seen(11.0, at(40)).seen(13.0, at(120)).seen(14.0, at(120))
    assert pace.rate == 40 << 20
    assert pace.moved_at == 13.0
    assert told(at(120), pace, "b") == "b to take 1000 MiB, 120 of them there, 40.0 MiB/s, about 22 s left"
    assert pace.seen(15.0, at(0)).rate == 0.0, "begun again"


# --- records -----------------------------------------------------------------------------------------


def record(*, snapshots: int = 0) -> VolumeRecord:
    layers = tuple(
        Layer(number=n, file=f"v.{n}", format=VolumeFormat.RAW, size=8 << 20) for n in range(snapshots + 1)
    )
    named = tuple(SnapshotRecord(id=SnapshotId(f"s{n}"), layer=n) for n in range(snapshots))
    return VolumeRecord(
        volume=VOLUME, layers=layers, active=snapshots, mode=Mode.PROXY, epoch=3, snapshots=named
    )


def spec(epoch: int) -> VolumeSpec:
    return VolumeSpec(id=VOLUME, size_mib=8, image=None, host=B, epoch=epoch)


def test_snapshots_stay_when_their_volume_leaves_and_it_may_come_back_beside_them() -> None:
    assert left_behind(record(), rested_on=False).mode is Mode.DELETING
    assert left_behind(record(), rested_on=True).mode is Mode.LEFT
    left = left_behind(record(snapshots=2), rested_on=False)
    assert (left.mode, left.epoch, left.active) == (Mode.LEFT, 0, 1)
    assert [layer.number for layer in left.layers] == [0, 1]
    back = blank_record(spec(5), msgspec.structs.replace(left, last_number=2))
    assert back.mode is Mode.RECEIVING
    assert back.epoch == 0, "not served before there is a file"
    assert back.active_layer.number == 3, "no number is used twice"
    assert back.active_layer.file not in {layer.file for layer in left.layers}
    assert back.snapshots == left.snapshots


# --- what agents know better than their configuration ------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def config(*volumes: VolumeSpec, removed: tuple[VolumeId, ...] = ()) -> HostConfig:
    return HostConfig(host=B, generation=1, release=None, volumes=volumes, removed_volumes=removed)


def wanted(ledger: Ledger, *volumes: VolumeSpec) -> tuple[VolumeSpec, ...]:
    return holds.wanted(volumes, holds.held(ledger))


def test_what_was_received_stays_until_a_configuration_names_it(ledger: Ledger) -> None:
    holds.receive(ledger, ONE, spec(2))
    assert wanted(ledger, spec(1)) == (), "an older configuration must not serve it otherwise"
    holds.settle(ledger, config())
    assert VOLUME in holds.held(ledger)
    assert wanted(ledger, spec(2)) == (spec(2),)
    holds.settle(ledger, config(spec(2)))
    assert holds.held(ledger) == {}


def test_what_has_left_is_not_made_again(ledger: Ledger) -> None:
    journal = ledger.begin(Journal(id=ONE, kind=OperationKind.RELOCATE, role=Role.COORDINATOR))
    holds.leave(ledger, spec(1), journal, "pivot")
    assert wanted(ledger, spec(1)) == ()
    holds.settle(ledger, config(spec(1)))
    assert wanted(ledger, spec(1)) == ()
    with pytest.raises(Stale):
        holds.receive(ledger, OTHER, spec(1))
    holds.receive(ledger, OTHER, spec(3))
    assert wanted(ledger, spec(3)) == (spec(3),)


def test_what_was_dropped_does_not_come_back_by_a_late_message(ledger: Ledger) -> None:
    holds.receive(ledger, ONE, spec(2))
    assert not holds.forget(ledger, OTHER, VOLUME), "it is another operation's"
    assert holds.forget(ledger, ONE, VOLUME)
    with pytest.raises(Stale):
        holds.receive(ledger, ONE, spec(2))
    holds.receive(ledger, OTHER, spec(3))


def test_what_counts_is_not_received_over(ledger: Ledger) -> None:
    holds.receive(ledger, ONE, spec(2))
    holds.keep(ledger, ONE, spec(2))
    holds.receive(ledger, ONE, spec(2))
    assert not holds.forget(ledger, ONE, VOLUME)
    with pytest.raises(Conflict):
        holds.receive(ledger, OTHER, spec(3))
    assert wanted(ledger, spec(1)) == ()
    holds.settle(ledger, config(spec(2)))
    holds.receive(ledger, OTHER, spec(3))


def test_what_is_to_be_deleted_is_not_received(ledger: Ledger) -> None:
    ledger.accept(config(removed=(VOLUME,)))
    with pytest.raises(Conflict):
        holds.receive(ledger, ONE, spec(2))


# --- how a server reaches its volumes ----------------------------------------------------------------


def endpoint(host: HostId, epoch: int) -> VolumeEndpoint:
    return VolumeEndpoint(host=host, address=f"10.0.0.{ord(host)}", port=10809, export=f"v.e{epoch}")


def attached(*copies: VolumeEndpoint) -> VolumeAttachment:
    first = copies[0]
    return VolumeAttachment(
        volume=VOLUME, address=first.address, port=first.port, export=first.export, copies=copies
    )


def server(attachment: VolumeAttachment) -> ServerConfig:
    kept = msgspec.structs.replace(
        attachment, size_mib=8, copies=attachment.copies if len(attachment.copies) > 1 else ()
    )
    spec = ServerSpec(
        id=ServerId("s"), size=Size(vcpus=1, memory_mib=64), volume=VOLUME, ports=(), machine="pc-q35-10.0"
    )
    return ServerConfig(spec=spec, epoch=1, volume=kept)


def test_the_only_copy_is_reached_at_its_new_place_and_never_at_an_older_one() -> None:
    before = server(attached(endpoint(A, 1)))
    after = reached_by(before, attached(endpoint(B, 2)), endpoint(A, 1))
    assert (after.volume.address, after.volume.export) == (endpoint(B, 2).address, "v.e2")
    assert after.volume.copies == ()
    assert after.volume.size_mib == 8
    assert reached_by(after, attached(endpoint(B, 2)), endpoint(A, 1)) == after
    with pytest.raises(Stale):
        reached_by(after, attached(endpoint(A, 1)), endpoint(B, 2))


@pytest.mark.parametrize("source", [A, B])
def test_one_copy_goes_and_the_others_stay(source: HostId) -> None:
    """A server that let them go would not write to them, and reach them again later."""
    before = server(attached(endpoint(A, 1), endpoint(B, 1)))
    after = reached_by(before, attached(endpoint(C, 2)), endpoint(source, 1))
    kept = endpoint(B if source == A else A, 1)
    assert set(after.volume.copies) == {endpoint(C, 2), kept}
    assert after.volume.address == after.volume.copies[0].address
    assert reached_by(after, attached(endpoint(C, 2)), endpoint(source, 1)) == after


def test_a_copy_that_was_let_go_meanwhile_is_not_reached_at_its_new_place_either() -> None:
    before = server(attached(endpoint(A, 1), endpoint(B, 1)))
    assert reached_by(before, attached(endpoint(C, 2)), endpoint(C, 1)) == before
