"""Snapshots that can be read from outside, by who has a credential and until it expires.

Each has a storage daemon of its own (`export.<id>`) beside the one of the volumes, which hears nothing of it:
it opens the snapshot's layers for reading and nothing else. The address for any NBD client is

    nbds://<id>@<host>:<port>/<snapshot>        TLS with a pre-shared key; its identity is <id>

The end is the daemon's own: it is started by way of a clock that ends it, and one that is started again after
that serves nothing. So it ends although no agent is there. Where a snapshot is, its export is: the volume and
its server may go elsewhere meanwhile.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from nahtlos.model.errors import Error
from nahtlos.model.ids import SnapshotId
from nahtlos.model.storage import SnapshotExport
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.ports import Supervisor, Unit
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.decisions import snapshot_layer, volume_of
from nahtlos.physical.storage.graph import Options, Places
from nahtlos.physical.storage.record import RecordMap, chain
from nahtlos.wire.credentials import write_file

UNIT_PREFIX = "export."
MAX_CLIENTS = 16
NICENESS = 5
"""Readers from outside come after the servers of this host."""
_KEYS = "keys.psk"
_RUNS_BY = "runs-by"
_UNTIL = (
    'left=$(($1 - $(date +%s))); shift; [ "$left" -gt 0 ] || exec sleep infinity; '
    'exec timeout --foreground -s KILL "$left" setpriv --pdeathsig KILL "$@"'
)
"""Runs what follows until the second of the first argument; afterwards nothing, quietly."""


NodeOf = Callable[[SnapshotId, str], Awaitable[Options]]
"""A read-only block node of a snapshot, by the name it is to have."""


class _Source(NamedTuple):
    nodes: tuple[Options, ...]
    """What is served is the last of them."""
    secrets: tuple[Options, ...] = ()


def uri(export: SnapshotExport, address: str) -> str:
    return f"nbds://{export.id}@{address}:{export.port}/{export.snapshot}"


class SnapshotExports:
    """`folder`: on a tmpfs, for root only; credentials are kept there."""

    def __init__(self, supervisor: Supervisor, folder: Path, places: Places, address: str, log: Path) -> None:
        self._supervisor = supervisor
        self._folder = folder
        self._places = places
        self._address = address
        self._log = log
        self.elsewhere: NodeOf | None = None
        """Of snapshots that are in no files of this host."""

    async def any(self) -> bool:
        return any(name.startswith(UNIT_PREFIX) for name in await self._supervisor.units())

    async def reconcile(
        self, bundle: Bundle, wanted: Iterable[SnapshotExport], records: RecordMap, now: float
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Serve these and no others; what was changed, and what could not be served and why."""
        running = {name for name in await self._supervisor.units() if name.startswith(UNIT_PREFIX)}
        valid = {unit_name(each): each for each in wanted if each.expires_at > now}
        done: list[str] = []
        problems: list[str] = []
        for name in sorted(running - valid.keys()):
            await self._withdraw(name)
            done.append(f"export {name.removeprefix(UNIT_PREFIX)} withdrawn")
        for name, export in sorted(valid.items()):
            try:
                if await self._serve(bundle, export, records, runs=name in running):
                    done.append(f"snapshot {export.snapshot} exported as {export.id}")
            except Error as error:
                problems.append(f"export {export.id}: {error}")
                if name in running:
                    await self._withdraw(name)
        return tuple(done), tuple(problems)

    async def _serve(self, bundle: Bundle, export: SnapshotExport, records: RecordMap, *, runs: bool) -> bool:
        unit = self._unit(bundle, export, await self._source(export, records))
        folder = self._credentials(export)
        runs_by = hashlib.sha256(msgspec.json.encode((unit.argv, export.key_hex))).hexdigest()
        known = folder / _RUNS_BY
        if runs and known.is_file() and known.read_text() == runs_by:
            return False
        await self._supervisor.stop(unit.name, grace=0)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(folder / _KEYS, f"{export.id}:{export.key_hex}\n".encode(), mode=0o600)
        await self._supervisor.start(unit)
        write_file(known, runs_by.encode(), mode=0o600)
        return True

    async def _withdraw(self, name: str) -> None:
        await self._supervisor.stop(name, grace=0)
        folder = self._folder / name.removeprefix(UNIT_PREFIX)
        for path in (folder / _KEYS, folder / _RUNS_BY):
            path.unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()

    def _credentials(self, export: SnapshotExport) -> Path:
        return self._folder / export.id

    async def _source(self, export: SnapshotExport, records: RecordMap) -> _Source:
        if volume_of(records, export.snapshot) is None and self.elsewhere is not None:
            return _Source((await self.elsewhere(export.snapshot, "snapshot"),))
        ref = snapshot_layer(records, export.snapshot)
        return _Source(graph.snapshot_nodes(records, ref, self._places), self._secrets(records, export))

    def _unit(self, bundle: Bundle, export: SnapshotExport, source: _Source) -> Unit:
        served: Options = {
            "type": "nbd",
            "id": "snapshot",
            "name": export.snapshot,
            "node-name": source.nodes[-1]["node-name"],
            "writable": False,
        }
        credentials = f"tls-creds-psk,id=tls,endpoint=server,dir={self._credentials(export)}"
        door = f"addr.type=inet,addr.host={self._address},addr.port={export.port}"
        return Unit(
            name=unit_name(export),
            argv=(
                *("/bin/sh", "-c", _UNTIL, "until", str(int(export.expires_at))),
                *bundle.storage_daemon(),
                *("--object", credentials),
                *_said("--object", source.secrets),
                *_said("--blockdev", source.nodes),
                *("--nbd-server", f"{door},tls-creds=tls,max-connections={MAX_CLIENTS}"),
                *_said("--export", (served,)),
            ),
            environment=bundle.environment,
            log=self._log.with_name(f"{unit_name(export)}.log"),
            restart=True,
            nice=NICENESS,
        )

    def _secrets(self, records: RecordMap, export: SnapshotExport) -> tuple[Options, ...]:
        layers = graph.layers_of(records, chain(records, snapshot_layer(records, export.snapshot)))
        keys = sorted({layer.encryption_key for layer in layers if layer.encryption_key is not None})
        return tuple(graph.secret(key, self._places) for key in keys)


def unit_name(export: SnapshotExport) -> str:
    return f"{UNIT_PREFIX}{export.id}"


def _said(option: str, values: Iterable[Options]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, msgspec.json.encode(value).decode()))
