"""The agent's memory: what it has promised, in one SQLite file that survives kill -9 and power loss.

Owns: the newest configuration, which servers this host owns and by which epoch, the journal of operations,
the highest orchestrator epoch obeyed. Every public method that writes is one transaction, synced before it
returns. Calls are synchronous on purpose: a decision and its record are one step that nothing can
come between.

    ownership of a server        (no row) --own/take--> OWNED(e) --yield--> YIELDED(e + 1) --take--> OWNED(…)
    decision of a destination    UNDECIDED --take--> COMMITTED      UNDECIDED --abandon--> ABANDONED
"""

import hashlib
import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, ServerConfig
from nahtlos.model.errors import Conflict, ErrorRecord, Refused, Stale, Unavailable
from nahtlos.model.ids import OperationId, ReleaseId, RouterId, ServerId, VolumeId
from nahtlos.model.inventory import Accelerator, OperationKind, OperationState
from nahtlos.model.values import Value
from nahtlos.wire.gateways import GatewayOrder
from nahtlos.wire.messages import Decision, MoveOrder, ReplaceOrder
from nahtlos.wire.volumes import VolumeTask

KEPT_OPERATIONS = 2000
"""Acknowledged operations are kept that long, because a peer may still ask how they ended."""

SCHEMA = """
create table if not exists meta (key text primary key, value blob not null);
create table if not exists config (id integer primary key check (id = 1), generation integer not null,
                                   digest text not null, body blob not null);
create table if not exists ownership (server text primary key, epoch integer not null,
                                      state text not null, body blob not null);
create table if not exists facts (key text primary key, value blob not null);
create table if not exists operations (number integer primary key autoincrement, id text not null unique,
                                       acknowledged integer not null default 0, body blob not null);
"""


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"
    HOST = "host"
    COORDINATOR = "coordinator"
    """Of a volume's operation."""


class Hold(StrEnum):
    OWNED = "owned"
    YIELDED = "yielded"
    """Another host owns it, by at least this epoch."""


class Ownership(Value, frozen=True, kw_only=True):
    epoch: int
    hold: Hold
    server: ServerConfig


class Journal(Value, frozen=True, kw_only=True):
    """One operation as this host knows it."""

    id: OperationId
    kind: OperationKind
    role: Role
    state: OperationState = OperationState.RUNNING
    step: str = "begin"
    order: MoveOrder | None = None
    replace: ReplaceOrder | None = None
    release: ReleaseId | None = None
    gateway: GatewayOrder | None = None
    task: VolumeTask | None = None
    power: ServerConfig | None = None
    """The server as it is to be left: stopped, booted anew, suspended, going on."""
    notes: dict[str, str] = {}
    """What a volume's operation has to remember from one step to the next."""
    decision: Decision = Decision.UNDECIDED
    error: ErrorRecord | None = None
    times: dict[str, float] = {}

    @property
    def server(self) -> ServerId | None:
        order = self.order or self.replace
        server = order.server if order else self.power
        return server.spec.id if server else None

    @property
    def router(self) -> RouterId | None:
        return self.gateway.id_of_router if self.gateway else None

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return self.task.volumes if self.task else ()

    @property
    def running(self) -> bool:
        return self.state is OperationState.RUNNING

    @property
    def unended(self) -> bool:
        """Runs, or is stuck: nothing but the operation itself may decide about its server."""
        return self.state in (OperationState.RUNNING, OperationState.STUCK)

    def move(self) -> MoveOrder:
        assert self.order is not None, f"operation {self.id} is no move"
        return self.order


class Ledger:
    """`on_write` is called with a name before and after every transaction: where tests crash an agent."""

    def __init__(self, path: Path | str, on_write: Callable[[str], None] | None = None) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")
        self._db.executescript(SCHEMA)
        self._on_write: Callable[[str], None] = on_write or _ignore
        self._config: HostConfig | None = None
        self._encode = msgspec.msgpack.encode

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _write(self, name: str) -> Generator[sqlite3.Connection]:
        self._on_write(f"before {name}")
        try:
            self._db.execute("begin immediate")
            yield self._db
            self._db.execute("commit")
        except BaseException as error:
            # Also after a commit that failed: what is not on disk must not be read back as if it were.
            if self._db.in_transaction:
                self._db.execute("rollback")
            if isinstance(error, sqlite3.Error):
                raise Unavailable(f"the ledger cannot be written: {error}", field="state_dir") from error
            raise
        self._on_write(f"after {name}")

    # --- orchestrator and configuration ---

    def orchestrator_epoch(self) -> int:
        return int(self._meta("orchestrator_epoch") or b"0")

    def obey(self, epoch: int) -> None:
        """Remember the newest orchestrator. Raises Stale for an older one."""
        known = self.orchestrator_epoch()
        if epoch < known:
            raise Stale(
                f"an orchestrator of epoch {known} commands this host; yours is {epoch}", field="epoch"
            )
        if epoch > known:
            with self._write("epoch") as db:
                self._set_meta(db, "orchestrator_epoch", str(epoch).encode())

    def config(self) -> HostConfig | None:
        """Kept decoded: it is asked for while a path is switched."""
        if self._config is None:
            row = self._db.execute("select body from config").fetchone()
            self._config = msgspec.msgpack.decode(row[0], type=HostConfig) if row else None
        return self._config

    def accept(self, config: HostConfig) -> bool:
        """Take up a configuration, and with it that this host was passed over; False if it is the one held
        already. Raises Stale for an older
        generation and Refused for the same generation with other content."""
        body = self._encode(config)
        digest = hashlib.sha256(body).hexdigest()
        row = self._db.execute("select generation, digest from config").fetchone()
        if row and config.generation < row[0]:
            raise Stale(
                f"generation {row[0]} is held already; {config.generation} is older", field="generation"
            )
        if row and config.generation == row[0]:
            if digest != row[1]:
                raise Refused(f"generation {row[0]} is held with other content", field="generation")
            return False
        with self._write("config") as db:
            db.execute("replace into config values (1, ?, ?, ?)", (config.generation, digest, body))
            for passed in config.passed_over:
                known = self.owner(passed.server)
                if known is not None and known.epoch < passed.epoch:
                    over = Ownership(epoch=passed.epoch, hold=Hold.YIELDED, server=known.server)
                    self._put_ownership(db, over)
        self._config = config
        return True

    def verified(self) -> Accelerator | None:
        raw = self._meta("verified")
        return msgspec.msgpack.decode(raw, type=Accelerator) if raw else None

    # --- ownership ---

    def ownership(self) -> dict[ServerId, Ownership]:
        rows = self._db.execute("select server, body from ownership order by server").fetchall()
        return {ServerId(s): msgspec.msgpack.decode(b, type=Ownership) for s, b in rows}

    def owner(self, server: ServerId) -> Ownership | None:
        row = self._db.execute("select body from ownership where server = ?", (server,)).fetchone()
        return msgspec.msgpack.decode(row[0], type=Ownership) if row else None

    def own(self, server: ServerConfig) -> None:
        """A server begins here that runs nowhere: a new one, or one that was off. Stale if the ledger knows
        a newer epoch, or another owner by this one."""
        known = self.owner(server.spec.id)
        if known and (known.epoch > server.epoch or _is_anothers(known, server.epoch)):
            raise Stale(f"{server.spec.id} is past epoch {server.epoch}", field="epoch")
        with self._write("own") as db:
            self._put_ownership(db, Ownership(epoch=server.epoch, hold=Hold.OWNED, server=server))

    def adopt(self, server: ServerConfig) -> None:
        """What is said anew of a server this host owns: its disks, how they are reached. Conflict if it does
        not own it by this epoch."""
        known = self.owner(server.spec.id)
        if known is None or known.hold is not Hold.OWNED or known.epoch != server.epoch:
            raise Conflict(f"{server.spec.id} is not owned here by epoch {server.epoch}", field="server")
        if known.server != server:
            with self._write("adopt") as db:
                self._put_ownership(db, Ownership(epoch=known.epoch, hold=Hold.OWNED, server=server))

    def disown(self, server: ServerId) -> None:
        """The server was deleted by its owner, or is off and another host's."""
        with self._write("disown") as db:
            db.execute("delete from ownership where server = ?", (server,))

    # --- operations ---

    def operation(self, operation: OperationId) -> Journal | None:
        row = self._db.execute("select body from operations where id = ?", (operation,)).fetchone()
        return msgspec.msgpack.decode(row[0], type=Journal) if row else None

    def operations(self) -> tuple[Journal, ...]:
        """Not acknowledged yet, oldest first."""
        rows = self._db.execute("select body from operations where acknowledged = 0 order by number")
        return tuple(msgspec.msgpack.decode(b, type=Journal) for (b,) in rows.fetchall())

    def last_undone(self, server: ServerId, kind: OperationKind) -> float | None:
        """When the newest one of this kind ended so that was not acknowledged long ago."""
        rows = self._db.execute("select body from operations order by number desc limit 50")
        journals = (msgspec.msgpack.decode(body, type=Journal) for (body,) in rows.fetchall())
        return next(
            (
                j.times.get("done", 0.0)
                for j in journals
                if j.server == server and j.kind is kind and j.state is OperationState.UNDONE
            ),
            None,
        )

    def running(self, server: ServerId) -> Journal | None:
        return next((j for j in self.operations() if j.unended and j.server == server), None)

    def running_for_volume(self, volume: VolumeId) -> Journal | None:
        return next((j for j in self.operations() if j.unended and volume in j.volumes), None)

    def running_for_router(self, router: RouterId) -> Journal | None:
        return next((j for j in self.operations() if j.unended and j.router == router), None)

    def begin(self, journal: Journal) -> Journal:
        """Write an operation down before anything is done for it. The one held already if it is known.
        Conflict if another operation of the same server runs."""
        known = self.operation(journal.id)
        if known:
            return known
        other = self.running(journal.server) if journal.server else None
        if other:
            raise Conflict(f"operation {other.id} of {journal.server} runs here", field="server")
        if journal.router and (other := self.running_for_router(journal.router)):
            raise Conflict(f"operation {other.id} of {journal.router} runs here", field="router")
        for volume in journal.volumes:
            if other := self.running_for_volume(volume):
                raise Conflict(f"operation {other.id} of {volume} runs here", field="volume")
        with self._write("begin") as db:
            db.execute("insert into operations (id, body) values (?, ?)", (journal.id, self._encode(journal)))
            db.execute(
                "delete from operations where acknowledged = 1 and number <= "
                "(select max(number) from operations) - ?",
                (KEPT_OPERATIONS,),
            )
        return journal

    def note(self, journal: Journal, name: str = "step") -> Journal:
        """Write down how far an operation has come."""
        with self._write(name) as db:
            self._put_operation(db, journal)
        return journal

    def facts(self, prefix: str) -> dict[str, bytes]:
        """What operations have to leave behind for others, by key."""
        rows = self._db.execute(
            "select key, value from facts where substr(key, 1, ?) = ? order by key",
            (
                len(prefix),
                prefix,
            ),
        )
        return dict(rows.fetchall())

    def fact(self, key: str) -> bytes | None:
        row = self._db.execute("select value from facts where key = ?", (key,)).fetchone()
        return row[0] if row else None

    def remember(self, name: str, facts: Mapping[str, bytes | None], journal: Journal | None = None) -> None:
        """Write facts down, with the step of an operation they belong to; None forgets one."""
        with self._write(name) as db:
            for key, value in facts.items():
                if value is None:
                    db.execute("delete from facts where key = ?", (key,))
                else:
                    db.execute("replace into facts values (?, ?)", (key, value))
            if journal is not None:
                self._put_operation(db, journal)

    def take(self, operation: OperationId, at: float) -> Journal:
        """Destination: own the server from now on. The point of no return of a move.
        Conflict if the operation was abandoned, Stale if this host knows a later owner of the server;
        repeating it changes nothing."""
        journal = self._known(operation)
        if journal.decision is Decision.COMMITTED:
            return journal
        if journal.decision is Decision.ABANDONED:
            raise Conflict(f"operation {operation} was abandoned", field="operation")
        order = journal.move()
        known = self.owner(order.server.spec.id)
        if known is not None and known.epoch >= order.epoch:
            raise Stale(f"{order.server.spec.id} is past epoch {order.server.epoch}", field="epoch")
        server = _with_epoch(order.server, order.epoch)
        journal = _replace(
            journal, decision=Decision.COMMITTED, step="committed", times={**journal.times, "committed": at}
        )
        with self._write("take") as db:
            self._put_ownership(db, Ownership(epoch=order.epoch, hold=Hold.OWNED, server=server))
            self._put_operation(db, journal)
        return journal

    def take_over(self, journal: Journal, at: float) -> Journal:
        """This host owns the server by one more epoch: the point of no return of a replacement. Conflict if
        it was abandoned, Stale if another epoch is known; repeating it changes nothing."""
        order = journal.replace
        assert order is not None, f"operation {journal.id} replaces no VMM"
        if self._known(journal.id).decision is Decision.ABANDONED:
            raise Conflict(f"operation {journal.id} was abandoned", field="operation")
        known = self.owner(order.server.spec.id)
        if known is None or known.hold is not Hold.OWNED or known.epoch not in (order.epoch - 1, order.epoch):
            raise Stale(f"{order.server.spec.id} is past epoch {order.server.epoch}", field="epoch")
        server = _with_epoch(order.server, order.epoch)
        journal = _replace(
            journal,
            decision=Decision.COMMITTED,
            step="committed",
            times={**journal.times, "committed": at},
        )
        with self._write("take over") as db:
            self._put_ownership(db, Ownership(epoch=order.epoch, hold=Hold.OWNED, server=server))
            self._put_operation(db, journal)
        return journal

    def take_gateway(self, operation: OperationId, at: float) -> Journal:
        """Destination: be the way out from now on. Conflict if the operation was abandoned; repeating it
        changes nothing. Nothing is left for it to do: it has ended well."""
        journal = self._known(operation)
        if journal.decision is Decision.ABANDONED:
            raise Conflict(f"operation {operation} was abandoned", field="operation")
        if journal.decision is Decision.COMMITTED:
            return journal
        taken = _replace(
            journal,
            decision=Decision.COMMITTED,
            state=OperationState.DONE,
            step="done",
            times={**journal.times, "taken": at, "done": at},
        )
        return self.note(taken, "take")

    def abandon(self, operation: OperationId, error: ErrorRecord) -> Journal:
        """Destination: never own the server by this operation. Leaves a committed one as it is."""
        journal = self._known(operation)
        if journal.decision is not Decision.UNDECIDED:
            return journal
        return self.note(_replace(journal, decision=Decision.ABANDONED, error=error), "abandon")

    def hand_over(self, journal: Journal) -> None:
        """Source: the destination owns the server. `journal` is recorded with it."""
        order = journal.move()
        yielded = Ownership(epoch=order.epoch, hold=Hold.YIELDED, server=order.server)
        with self._write("yield") as db:
            known = self.owner(order.server.spec.id)
            if known is None or known.epoch < order.epoch:
                self._put_ownership(db, yielded)
            self._put_operation(db, journal)

    def verify_done(self, journal: Journal, accelerator: Accelerator) -> Journal:
        with self._write("verified") as db:
            self._set_meta(db, "verified", self._encode(accelerator))
            self._put_operation(db, journal)
        return journal

    def acknowledge(self, ids: tuple[OperationId, ...]) -> None:
        """The runtime has recorded these; only ended ones are put aside."""
        ended = [(j.id,) for j in self.operations() if j.id in ids and not j.unended]
        if ended:
            with self._write("acknowledge") as db:
                db.executemany("update operations set acknowledged = 1 where id = ?", ended)

    # --- rows ---

    def _known(self, operation: OperationId) -> Journal:
        journal = self.operation(operation)
        if journal is None:
            raise Refused(f"operation {operation} is not known here", field="operation")
        return journal

    def _put_operation(self, db: sqlite3.Connection, journal: Journal) -> None:
        db.execute("update operations set body = ? where id = ?", (self._encode(journal), journal.id))

    def _put_ownership(self, db: sqlite3.Connection, ownership: Ownership) -> None:
        db.execute(
            "replace into ownership values (?, ?, ?, ?)",
            (ownership.server.spec.id, ownership.epoch, ownership.hold, self._encode(ownership)),
        )

    def _meta(self, key: str) -> bytes | None:
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _set_meta(self, db: sqlite3.Connection, key: str, value: bytes) -> None:
        db.execute("replace into meta values (?, ?)", (key, value))


def _ignore(name: str) -> None:
    """No test watches the writes."""


def _is_anothers(known: Ownership, epoch: int) -> bool:
    return known.hold is Hold.YIELDED and known.epoch >= epoch


def _with_epoch(server: ServerConfig, epoch: int) -> ServerConfig:
    return msgspec.structs.replace(server, epoch=epoch)


def _replace(journal: Journal, **changes: object) -> Journal:
    return msgspec.structs.replace(journal, **changes)
