"""The ledger refuses what is older, remembers what was decided, and every write is all or nothing."""

import sqlite3

import msgspec
import pytest

from nahtlos.model.config import HostConfig, PortConfig, ServerConfig, VolumeAttachment
from nahtlos.model.errors import Conflict, ErrorRecord, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, NetworkId, OperationId, PortId, ServerId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.networking import PortSpec
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.physical.agent.ledger import Hold, Journal, Ledger, Role
from nahtlos.wire.messages import Decision, MoveOrder

VM = ServerId("vm-1")
MOVE = OperationId("op-1")
REASON = ErrorRecord.of(Unavailable("gone"))


def server(epoch: int = 1) -> ServerConfig:
    port = PortSpec(id=PortId("p1"), network=NetworkId("tenant"), mac="52:54:00:4d:00:0a", ip="10.77.0.10")
    spec = ServerSpec(
        id=VM,
        size=Size(vcpus=1, memory_mib=256),
        volume=VolumeId("v1"),
        ports=(port,),
        machine="pc-q35-10.0",
    )
    volume = VolumeAttachment(volume=VolumeId("v1"), address="10.99.0.11", port=10809, export="v1.e1")
    return ServerConfig(spec=spec, epoch=epoch, volume=volume)


def order(operation: OperationId = MOVE, epoch: int = 1) -> MoveOrder:
    port = PortConfig(
        id=PortId("p1"),
        server=VM,
        mac="52:54:00:4d:00:0a",
        ip="10.77.0.10",
        host=HostId("host-1"),
        vtep="10.99.0.11",
    )
    return MoveOrder(
        id=operation,
        server=server(epoch),
        ports=(port,),
        source=HostId("host-1"),
        destination=HostId("host-2"),
        source_address="10.99.0.11",
        destination_address="10.99.0.12",
        destination_peer_port=7444,
    )


def move(role: Role, operation: OperationId = MOVE, epoch: int = 1) -> Journal:
    return Journal(id=operation, kind=OperationKind.MOVE, role=role, order=order(operation, epoch))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_an_older_orchestrator_is_refused_also_after_a_restart(path):
    Ledger(path).obey(7)
    reopened = Ledger(path)
    reopened.obey(7)
    with pytest.raises(Stale, match="epoch 7"):
        reopened.obey(6)


def test_a_configuration_is_taken_once_and_never_an_older_one(path):
    ledger = Ledger(path)
    two = HostConfig(host=HostId("host-1"), generation=2, release=None)
    assert ledger.accept(two)
    assert not ledger.accept(two)
    with pytest.raises(Stale):
        ledger.accept(msgspec.structs.replace(two, generation=1))
    with pytest.raises(Refused, match="other content"):
        ledger.accept(msgspec.structs.replace(two, removed_servers=(VM,)))
    assert Ledger(path).config() == two


def test_taking_a_server_makes_it_owned_by_the_next_epoch(path):
    ledger = Ledger(path)
    ledger.begin(move(Role.DESTINATION))
    ledger.take(MOVE, at=5.0)
    held = Ledger(path).owner(VM)
    assert held is not None
    assert (held.epoch, held.hold, held.server.epoch) == (2, Hold.OWNED, 2)
    assert ledger.take(MOVE, at=9.0).times["committed"] == 5.0


def test_a_decision_is_final_in_both_directions(path):
    ledger = Ledger(path)
    ledger.begin(move(Role.DESTINATION))
    ledger.abandon(MOVE, REASON)
    with pytest.raises(Conflict, match="abandoned"):
        ledger.take(MOVE, at=1.0)
    assert ledger.owner(VM) is None

    other = OperationId("op-2")
    ledger.note(msgspec.structs.replace(ledger.operation(MOVE), state=OperationState.UNDONE))
    ledger.begin(move(Role.DESTINATION, other))
    ledger.take(other, at=1.0)
    assert ledger.abandon(other, REASON).decision is Decision.COMMITTED


def test_a_server_that_was_handed_over_is_not_started_again_by_an_old_configuration(path):
    ledger = Ledger(path)
    ledger.own(server(1))
    ledger.hand_over(ledger.begin(move(Role.SOURCE)))
    held = ledger.owner(VM)
    assert held is not None
    assert (held.hold, held.epoch) == (Hold.YIELDED, 2)
    with pytest.raises(Stale):
        ledger.own(server(1))


def test_only_one_operation_of_a_server_runs(path):
    ledger = Ledger(path)
    first = ledger.begin(move(Role.SOURCE))
    assert ledger.begin(move(Role.SOURCE)) == first
    with pytest.raises(Conflict, match="op-1"):
        ledger.begin(move(Role.SOURCE, OperationId("op-2")))


def test_acknowledged_operations_leave_the_report_but_can_still_be_asked_for(path):
    ledger = Ledger(path)
    journal = ledger.begin(move(Role.DESTINATION))
    ledger.acknowledge((MOVE,))
    assert ledger.operations() == (journal,), "a running operation cannot be put aside"
    ledger.note(msgspec.structs.replace(journal, state=OperationState.UNDONE))
    ledger.acknowledge((MOVE,))
    assert ledger.operations() == ()
    assert ledger.operation(MOVE) is not None


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["own", "begin", "take", "yield", "abandon", "step"])
def test_killed_at_a_write_the_file_holds_all_of_it_or_nothing(path, moment, name):
    class Killed(BaseException):
        pass

    def crash(at: str) -> None:
        if at == f"{moment} {name}":
            raise Killed

    acts = {
        "own": lambda led: led.own(server()),
        "begin": lambda led: led.begin(move(Role.DESTINATION)),
        "take": lambda led: led.take(MOVE, at=1.0),
        "abandon": lambda led: led.abandon(MOVE, REASON),
        "yield": lambda led: led.hand_over(led.operation(MOVE)),
        "step": lambda led: led.note(msgspec.structs.replace(led.operation(MOVE), step="incoming")),
    }
    if name in ("take", "abandon", "yield", "step"):
        prepared = Ledger(path)
        prepared.begin(move(Role.SOURCE if name == "yield" else Role.DESTINATION))
        prepared.close()
    with pytest.raises(Killed):
        acts[name](Ledger(path, crash))
    reopened = Ledger(path)
    written = moment == "after"
    state = reopened.operation(MOVE)
    seen = {
        "own": reopened.owner(VM) is not None,
        "begin": state is not None,
        "take": state is not None and state.decision is Decision.COMMITTED and reopened.owner(VM) is not None,
        "abandon": state is not None and state.decision is Decision.ABANDONED,
        "yield": reopened.owner(VM) is not None,
        "step": state is not None and state.step == "incoming",
    }
    assert seen[name] is written
    if not written:
        assert reopened.owner(VM) is None


class DiskFull:
    """A database whose next commit fails, as on a full disk."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.armed = True

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        if self.armed and statement == "commit":
            self.armed = False
            raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(statement, *values)


def test_what_could_not_be_committed_is_not_read_back_and_can_be_tried_again(path):
    ledger = Ledger(path)
    ledger.begin(move(Role.DESTINATION))
    ledger._db = DiskFull(ledger._db)
    with pytest.raises(Unavailable, match="cannot be written"):
        ledger.take(MOVE, at=1.0)
    assert ledger.owner(VM) is None
    assert ledger.operation(MOVE).decision is Decision.UNDECIDED
    assert ledger.take(MOVE, at=2.0).decision is Decision.COMMITTED
    assert Ledger(path).owner(VM) is not None


def test_a_late_move_does_not_take_what_has_gone_on_since(path):
    """An order that arrives (again) after the server was here and left by a later epoch."""
    ledger = Ledger(path)
    later = ledger.begin(move(Role.SOURCE, OperationId("op-7"), epoch=4))
    ledger.hand_over(msgspec.structs.replace(later, state=OperationState.DONE))
    ledger.begin(move(Role.DESTINATION, epoch=1))
    with pytest.raises(Stale, match="past epoch 1"):
        ledger.take(MOVE, at=1.0)
    held = ledger.owner(VM)
    assert held is not None
    assert (held.hold, held.epoch) == (Hold.YIELDED, 5)


def test_a_server_with_a_stuck_operation_is_given_no_other(path):
    ledger = Ledger(path)
    first = ledger.begin(move(Role.SOURCE))
    ledger.note(msgspec.structs.replace(first, state=OperationState.STUCK))
    with pytest.raises(Conflict, match="op-1"):
        ledger.begin(move(Role.SOURCE, OperationId("op-2")))
