"""Carries out requests on the images of one pool. Run as a script by the system's Python, which has Ceph's
bindings; imports nothing of nahtlos and decides nothing.

    worker.py CONFIGURATION USER POOL

Requests are JSON objects, one per line: {"id": 7, "verb": "create", "arguments": {…}}; answers {"id": 7,
"value": …} or {"id": 7, "error": {"kind", "message"}}; before it, what takes long says {"id": 7, "done":
bytes, "total": bytes}. Requests run beside each other. When its input ends it ends, in the middle of whatever
it does: every verb can be repeated.
"""

import base64
import errno
import hashlib
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import rados  # pyright: ignore[reportMissingModuleSource]
import rbd  # pyright: ignore[reportMissingModuleSource]

THREADS = 12
CONNECT_SECONDS = 5
WITHIN = {"rados_mon_op_timeout": "8", "rados_osd_op_timeout": "20", "client_mount_timeout": "5"}
"""Of single operations, in seconds: what a cluster does not answer is an error, not a thread for ever."""
CHUNK = 4 << 20
GRANULE = 65536
ANSWER_MS = 2000
LOOK_ANEW = struct.pack("<BBII", 1, 1, 4, 3).decode()
"""librbd's own notice that an image's header has changed: its version, the oldest that knows it, the length
of what follows, the kind."""
METADATA = "nahtlos."
TRASHED = 2
"""Namespace of snapshots that were removed and that clones still rest on."""
FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
)

Json = dict[str, object]
Progress = Callable[[int, int], int]
"""Answers 0: go on."""


class Pool:
    """The verbs. Names are of images; sizes and offsets are in bytes."""

    def __init__(self, configuration: str, user: str, pool: str) -> None:
        self._how = (configuration, user, pool)
        self._connecting = threading.Lock()
        self._connected: tuple[rados.Rados, rados.Ioctx] | None = None
        self._rbd = rbd.RBD()

    @property
    def _cluster(self) -> rados.Rados:
        return self._connection()[0]

    @property
    def _io(self) -> rados.Ioctx:
        return self._connection()[1]

    def _connection(self) -> tuple[rados.Rados, rados.Ioctx]:
        with self._connecting:
            if self._connected is None:
                configuration, user, pool = self._how
                # Snapshots that clones rest on can then be removed: they stay, out of sight, until the last
                # clone is gone.
                conf = {**WITHIN, "rbd_default_clone_format": "2"}
                cluster = rados.Rados(conffile=configuration, rados_id=user, conf=conf)
                cluster.connect(timeout=CONNECT_SECONDS)
                self._connected = (cluster, cluster.open_ioctx(pool))
            return self._connected

    # --- what is there ---

    def names(self) -> list[str]:
        return self._rbd.list(self._io)

    def facts(self, name: str) -> Json | None:
        try:
            with rbd.Image(self._io, name, read_only=True) as image:
                metadata = dict(image.metadata_list())
                return {
                    "name": name,
                    "size": image.size(),
                    "metadata": {
                        key.removeprefix(METADATA): value
                        for key, value in metadata.items()
                        if key.startswith(METADATA)
                    },
                    "allocated": _allocated(image),
                    "clients": sorted({watcher["addr"] for watcher in image.watchers_list()}),
                    "snapshots": [self._snapshot(name, snap) for snap in image.list_snaps()],
                }
        except rbd.ImageNotFound:
            return None

    def _snapshot(self, name: str, snap: "rbd.Snap") -> Json:
        trashed = snap["namespace"] == TRASHED
        children: list[str] = []
        if not trashed:
            with rbd.Image(self._io, name, snapshot=snap["name"], read_only=True) as image:
                children = sorted(child["image"] for child in image.list_children2() if not child["trash"])
        return {"name": snap["name"], "size": snap["size"], "trashed": trashed, "children": children}

    # --- images ---

    def create(self, name: str, size: int) -> None:
        self._rbd.create(self._io, name, size, features=FEATURES)

    def clone(self, parent: str, snapshot: str, name: str) -> None:
        self._rbd.clone(self._io, parent, snapshot, self._io, name, features=FEATURES)

    def fill(self, name: str, path: str, progress: Progress) -> None:
        """With what is in a raw file; what is zero there is left out."""
        with rbd.Image(self._io, name) as image, open(path, "rb") as source:  # noqa: PTH123
            total, position = os.fstat(source.fileno()).st_size, 0
            while (position := _next_data(source.fileno(), position)) < total:
                data = os.pread(source.fileno(), CHUNK - position % CHUNK, position)
                if not data:
                    raise EOFError(f"{path} became shorter while it was read")
                if data.count(0) != len(data):
                    image.write(data, position)
                position += len(data)
                progress(position, total)
            image.flush()

    def bury(self, name: str, zero: bool, progress: Progress) -> None:
        """What rests on it is made to stand alone, then it is removed, overwritten first if `zero`. It must
        not have snapshots but hidden ones."""
        try:
            with rbd.Image(self._io, name, read_only=True) as image:
                children = [child["image"] for child in image.list_children2()]
        except rbd.ImageNotFound:
            return
        for child in children:
            self._flatten(child, progress)
        if zero:
            self._zero(name, progress)
        self._rbd.remove(self._io, name, progress)

    def _flatten(self, name: str, progress: Progress) -> None:
        with rbd.Image(self._io, name) as image:
            image.flatten(progress)

    def _zero(self, name: str, progress: Progress) -> None:
        """Overwrites whatever takes space."""
        with rbd.Image(self._io, name) as image:
            extents: list[tuple[int, int]] = []
            total = image.size()

            def note(offset: int, length: int, exists: bool) -> None:
                if exists:
                    extents.append((offset, length))

            image.diff_iterate(0, total, None, note, False, True)
            for offset, length in extents:
                image.write(bytes(length), offset)
                progress(offset + length, total)
            image.flush()

    def resize(self, name: str, size: int) -> None:
        with rbd.Image(self._io, name) as image:
            if image.size() < size:
                image.resize(size)

    def rename(self, name: str, to: str) -> None:
        self._rbd.rename(self._io, name, to)

    def note(self, name: str, metadata: dict[str, str | None]) -> None:
        """None removes a key. No value may be empty: the binding would lose count when it lists them."""
        with rbd.Image(self._io, name) as image:
            known = dict(image.metadata_list())
            for key, value in metadata.items():
                if value is not None:
                    image.metadata_set(METADATA + key, value)
                elif METADATA + key in known:
                    image.metadata_remove(METADATA + key)

    def digest(self, name: str, offset: int, length: int) -> str:
        digest = hashlib.sha256()
        with rbd.Image(self._io, name, read_only=True) as image:
            end = min(offset + length, image.size())
            while offset < end:
                data = image.read(offset, min(CHUNK, end - offset))
                digest.update(data)
                offset += len(data)
        return digest.hexdigest()

    # --- snapshots ---

    def snapshot(self, name: str, snapshot: str) -> None:
        with rbd.Image(self._io, name) as image:
            image.create_snap(snapshot)

    def snapshot_remove(self, name: str, snapshot: str) -> None:
        try:
            with rbd.Image(self._io, name) as image:
                image.remove_snap(snapshot)
        except rbd.ImageNotFound:
            return

    def changes(self, name: str, snapshot: str, since: str | None) -> str:
        """Which granules of `snapshot` hold anything, or are not as they were at `since`: a bit each, from
        the lowest, zlib, base64."""
        with rbd.Image(self._io, name, snapshot=snapshot, read_only=True) as image:
            size = image.size()
            bits = bytearray(-(-size // (GRANULE * 8)))

            def note(offset: int, length: int, exists: bool) -> None:
                if exists or since is not None:
                    for granule in range(offset // GRANULE, -(-(offset + length) // GRANULE)):
                        bits[granule >> 3] |= 1 << (granule & 7)

            image.diff_iterate(0, size, since, note)
            return base64.b64encode(zlib.compress(bytes(bits))).decode()

    def rollback(self, name: str, snapshot: str) -> None:
        with rbd.Image(self._io, name) as image:
            image.rollback_to_snap(snapshot)

    # --- clients ---

    def fence(self, name: str, seconds: int) -> list[str]:
        """Whoever has the image open, or its lock, never writes again. Returns their addresses."""
        own = self._cluster.get_addrs()
        with rbd.Image(self._io, name) as image:
            owners = {str(owner["owner"]) for owner in _owners(image)}
            clients = {watcher["addr"] for watcher in image.watchers_list()}
        found = sorted(each for each in owners | clients if each not in own)
        for address in found:
            self._command(
                {"prefix": "osd blocklist", "blocklistop": "add", "addr": address, "expire": float(seconds)}
            )
        if found:
            self._cluster.wait_for_latest_osdmap()
            with rbd.Image(self._io, name) as image:
                for owner in _owners(image):
                    if str(owner["owner"]) in found:
                        image.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, owner["owner"])
        return found

    def silent(self, name: str) -> bool:
        """Whether somebody who has the image open does not answer, as one that died: the cluster would wait
        half a minute for it. Who lives looks at the image anew, which harms nobody."""
        with rbd.Image(self._io, name, read_only=True) as image:
            header = f"rbd_header.{image.id()}"
        try:
            self._io.notify(header, LOOK_ANEW, ANSWER_MS)
        except rados.TimedOut:
            return True
        return False

    def _command(self, command: Json) -> None:
        code, _, said = self._cluster.mon_command(json.dumps(command), b"", timeout=CONNECT_SECONDS)
        if code:
            raise OSError(-code, f"{command['prefix']}: {said}")


def _owners(image: rbd.Image) -> "list[rbd.LockOwner]":
    try:
        return list(image.lock_get_owners())
    except rbd.ImageNotFound:  # nobody holds it
        return []


def _allocated(image: rbd.Image) -> int:
    """Of its own, not of what it was cloned from; whole objects, as the object map has them."""
    total = 0

    def note(_offset: int, length: int, exists: bool) -> None:
        nonlocal total
        total += length if exists else 0

    image.diff_iterate(0, image.size(), None, note, False, True)
    return total


def _next_data(descriptor: int, position: int) -> int:
    """The file's end if only a hole is left."""
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return os.fstat(descriptor).st_size
        raise


# --- requests ----------------------------------------------------------------------------------------

_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (rbd.ImageNotFound, "not-found"),
    (rbd.ImageExists, "exists"),
    (rbd.ImageHasSnapshots, "has-snapshots"),
    (rbd.ImageBusy, "busy"),
)
TIMES_PROGRESS = 100
"""At most so often per request."""


class Requests:
    def __init__(self, pool: Pool) -> None:
        verbs = (
            *(pool.names, pool.facts, pool.create, pool.clone, pool.fill, pool.resize),
            *(pool.rename, pool.bury, pool.note, pool.digest, pool.snapshot),
            *(pool.snapshot_remove, pool.changes, pool.rollback, pool.fence),
            pool.silent,
        )
        self._verbs: dict[str, Callable[..., object]] = {verb.__name__: verb for verb in verbs}
        self._saying = threading.Lock()

    def answer(self, line: str) -> None:
        request = cast("Json", json.loads(line))
        number, verb = request["id"], self._verbs[str(request["verb"])]
        arguments = cast("Json", request.get("arguments", {}))
        if "progress" in verb.__code__.co_varnames[: verb.__code__.co_argcount]:
            arguments["progress"] = self._progress(number)
        try:
            self._say({"id": number, "value": verb(**arguments)})
        except Exception as error:  # whoever asked hears of it
            self._say({"id": number, "error": {"kind": _kind(error), "message": f"{verb.__name__}: {error}"}})
            if getattr(error, "errno", None) == errno.ESHUTDOWN:
                os._exit(
                    1
                )  # another host has shut this process out, too: the next one is known by another name

    def _progress(self, number: object) -> Progress:
        said = -1

        def progress(done: int, total: int) -> int:
            nonlocal said
            part = done * TIMES_PROGRESS // max(total, 1)
            if part != said:
                said = part
                self._say({"id": number, "done": done, "total": total})
            return 0

        return progress

    def _say(self, answer: Json) -> None:
        with self._saying:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def _kind(error: Exception) -> str:
    named = next((kind for of, kind in _KINDS if isinstance(error, of)), None)
    return named or ("unavailable" if isinstance(error, (rados.Error, rbd.Error, OSError)) else "bug")


def main() -> None:
    requests = Requests(Pool(*sys.argv[1:4]))
    with ThreadPoolExecutor(THREADS) as threads:
        for line in sys.stdin:
            threads.submit(requests.answer, line)
        os._exit(0)


if __name__ == "__main__":
    main()
