"""Where backups are kept: a folder of this host, or an export of any NBD server.

    folder   `<backup>.data`, as sparse as what is in it, and `<backup>.json`: written last, so what has one
             is whole
    NBD      the bytes at their own places, and at the end of the export the manifest, taken away before the
             first byte is written

A backup holds the ranges its map names: all that is not zero, or all that changed since its base. Everything
read back is compared with the digests in the manifest. Blocks the thread that calls it.
"""

import base64
import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import BackupId, VolumeId
from nahtlos.model.storage import BackupSpec
from nahtlos.physical.storage.nbd import NbdClient, parsed
from nahtlos.physical.storage.record import sync_folder
from nahtlos.wire.credentials import write_file
from nahtlos.wire.tls import outsider_context

GRANULE = 65536
ROOM = 8 << 20
"""What an NBD target must have beyond the volume, for the manifest."""
_MAGIC = b"nahtlosB"
_TRAILER = struct.Struct(">8sQ32s")
_BLOCK = 4096
"""Every NBD server takes requests of whole ones."""
_LONGEST_MAP = 1 << 30


class Range(msgspec.Struct, frozen=True, array_like=True):
    offset: int
    length: int


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup is, and what it holds."""

    backup: BackupId
    volume: VolumeId
    base: BackupId | None
    """What it needs below it; None: nothing."""
    base_sha256: str = ""
    """Of the base's manifest, so that no other one of that name is taken for it."""
    created_at: float
    size: int
    """Of the volume then, in bytes."""
    map: str
    """Which granules it holds: a bit each, from the lowest, zlib, base64."""
    sha256: str
    """Of all it holds, in order."""
    stored_bytes: int

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)

    def digest(self) -> str:
        return hashlib.sha256(self.encoded()).hexdigest()

    def ranges(self) -> Iterator[Range]:
        return unpacked(self.map, self.size)


class Target(Protocol):
    """One backup at its place."""

    def begin(self, size: int) -> None:
        """From now on it is not whole. Repeatable; what an interrupted attempt left is taken away."""
        ...

    def write(self, offset: int, data: bytes) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def finish(self, manifest: BackupManifest) -> None:
        """Durable on return."""
        ...

    def manifest(self) -> BackupManifest | None:
        """None if there is none, or none that is whole."""
        ...

    def read(self, offset: int, length: int) -> bytes: ...

    def discard(self, created_at: float) -> None:
        """What is left of it, unless there is a whole one of another time."""
        ...

    def remove(self, volume: VolumeId) -> None:
        """The backup of `volume`, whole or not. Another one stays: Conflict."""
        ...

    def close(self) -> None: ...


def target_of(backup: BackupSpec, pki_dir: Path) -> Target:
    """`pki_dir`: what this host shows of itself to servers that ask, and by whom it knows them."""
    if backup.target.startswith("/"):
        return FolderTarget(Path(backup.target), backup.id)
    if backup.target.startswith(("nbd:", "nbds:")):
        return NbdTarget(backup.target, backup.id, pki_dir)
    raise Refused(
        f"'{backup.target}' is no place for a backup",
        field="target",
        remedy="name a folder of the volume's host by its whole path, or nbds://HOST[:PORT]/EXPORT",
    )


class FolderTarget:
    def __init__(self, folder: Path, backup: BackupId) -> None:
        if "/" in backup or backup.startswith("."):
            raise Refused(f"'{backup}' is no name of a file", field="backup")
        self._data = folder / f"{backup}.data"
        self._manifest = folder / f"{backup}.json"
        self._descriptor: int | None = None

    def begin(self, size: int) -> None:
        if self.manifest() is not None:
            raise Conflict(f"{self._manifest} is there already", field="backup", remedy="name it otherwise")
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise Refused(f"{self._data.parent}: {error.strerror}", field="target") from error
        self._data.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._data, flags, 0o600)
        os.ftruncate(self._descriptor, size)

    def write(self, offset: int, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._open(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise _no_room(error, str(self._data.parent)) from error

    def zero(self, offset: int, length: int) -> None:
        """A hole in a file that was empty."""

    def finish(self, manifest: BackupManifest) -> None:
        os.fsync(self._open())
        sync_folder(self._data.parent)
        write_file(self._manifest, manifest.encoded(), mode=0o600)
        sync_folder(self._data.parent)

    def manifest(self) -> BackupManifest | None:
        try:
            return _decoded(self._manifest.read_bytes(), str(self._manifest))
        except FileNotFoundError:
            return None

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._open(), length, offset)
        if len(data) != length:
            raise _damaged(str(self._data), "it is shorter than it was")
        return data

    def discard(self, created_at: float) -> None:
        held = self.manifest()
        if held is None or held.created_at == created_at:
            self._unlink()

    def remove(self, volume: VolumeId) -> None:
        if not self._data.parent.is_dir():
            raise Unavailable(
                f"there is no folder {self._data.parent}",
                field="target",
                remedy="mount it, or forget the backup without it: --keep-files",
            )
        try:
            held = self.manifest()
        except Refused:
            held = None  # damaged: nothing can be read of it
        if held is not None and held.volume != volume:
            raise _anothers(str(self._manifest), held)
        self._unlink()

    def _unlink(self) -> None:
        """The manifest first: what has one is whole."""
        try:
            self._manifest.unlink(missing_ok=True)
            self._data.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"{self._data.parent}: {error.strerror}", field="target") from error
        sync_folder(self._data.parent)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self._data, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError as error:
                raise _damaged(str(self._data), error.strerror or "") from error
        return self._descriptor


class NbdTarget:
    def __init__(self, uri: str, backup: BackupId, pki_dir: Path) -> None:
        self._uri = uri
        self._pki_dir = pki_dir
        self._backup = backup
        self._client: NbdClient | None = None
        self._at = parsed(uri)

    def begin(self, size: int) -> None:
        held = self.manifest()
        if held is not None:
            raise Conflict(
                f"{self._uri} holds backup '{held.backup}'",
                field="target",
                remedy="name another export for it",
            )
        room = self._connected().size - size
        if room < ROOM:
            raise Refused(
                f"{self._uri} has {self._connected().size} bytes, {size + ROOM} are needed",
                field="target",
                remedy="enlarge that export",
            )
        self._connected().write(self._place, bytes(_BLOCK))
        self._connected().flush()

    def write(self, offset: int, data: bytes) -> None:
        self._connected().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._connected().zero(offset, length)

    def finish(self, manifest: BackupManifest) -> None:
        body = manifest.encoded()
        if len(body) > ROOM - 2 * _BLOCK:
            raise Refused(
                f"the manifest needs {len(body)} bytes", field="target", remedy="back up to a folder"
            )
        self._connected().flush()
        digest = hashlib.sha256(body).digest()
        padded = body + bytes(-len(body) % _BLOCK)
        for begin in range(0, len(padded), 1 << 20):
            self._connected().write(self._place + _BLOCK + begin, padded[begin : begin + (1 << 20)])
        self._connected().flush()
        head = _TRAILER.pack(_MAGIC, len(body), digest)
        self._connected().write(self._place, head + bytes(_BLOCK - len(head)))
        self._connected().flush()

    def manifest(self) -> BackupManifest | None:
        if self._connected().size < ROOM:
            return None
        magic, length, digest = _TRAILER.unpack_from(self._connected().read(self._place, _BLOCK))
        if magic != _MAGIC or length > ROOM - 2 * _BLOCK:
            return None
        begin, end = self._place + _BLOCK, self._place + _BLOCK + length
        steps = range(begin, end + -length % _BLOCK, 1 << 20)
        body = b"".join(self._connected().read(at, min(1 << 20, end + -length % _BLOCK - at)) for at in steps)
        body = body[:length]
        if hashlib.sha256(body).digest() != digest:
            return None
        return _decoded(body, self._uri)

    def read(self, offset: int, length: int) -> bytes:
        return self._connected().read(offset, length)

    def discard(self, created_at: float) -> None:
        """Its bytes are the server's; without a manifest they count for nothing."""
        held = self.manifest()
        if held is not None and held.created_at == created_at:
            self._connected().write(self._place, bytes(_BLOCK))
            self._connected().flush()

    def remove(self, volume: VolumeId) -> None:
        """Its bytes are the server's; without a manifest they count for nothing."""
        held = self.manifest()
        if held is None:
            return
        if (held.volume, held.backup) != (volume, self._backup):
            raise _anothers(self._uri, held)
        self._connected().write(self._place, bytes(_BLOCK))
        self._connected().flush()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def _place(self) -> int:
        return (self._connected().size - ROOM) & ~(_BLOCK - 1)

    def _connected(self) -> NbdClient:
        if self._client is None:
            tls = outsider_context(self._pki_dir) if self._at.tls else None
            self._client = NbdClient(self._at, tls=tls, contexts=())
        return self._client


# --- chains ------------------------------------------------------------------------------------------


def checked_chain(manifests: Iterable[BackupManifest]) -> tuple[BackupManifest, ...]:
    """The last one and what it rests on, oldest first. Refused where something is missing or another one."""
    given = tuple(manifests)
    if not given:
        raise NotFound("no backup was named", field="chain")
    known = {manifest.backup: manifest for manifest in given}
    at = given[-1]
    found = [at]
    while at.base is not None:
        below = known.get(at.base)
        if below is None:
            raise NotFound(
                f"backup '{at.backup}' needs '{at.base}'", field="chain", remedy="name it, too, before it"
            )
        if below.digest() != at.base_sha256 or below in found:
            raise Refused(
                f"'{below.backup}' is not what '{at.backup}' was made on",
                field="chain",
                remedy="name the backups of one chain, as they were made",
            )
        found.append(below)
        at = below
    return tuple(reversed(found))


# --- maps --------------------------------------------------------------------------------------------


def packed(ranges: Iterable[Range], size: int) -> str:
    """A bit for every granule that any of the ranges touches."""
    bits = bytearray(_map_bytes(size))
    for each in ranges:
        for granule in range(each.offset // GRANULE, -(-(each.offset + each.length) // GRANULE)):
            bits[granule >> 3] |= 1 << (granule & 7)
    return base64.b64encode(zlib.compress(bytes(bits))).decode()


def unpacked(text: str, size: int) -> Iterator[Range]:
    try:
        unpacking = zlib.decompressobj()
        bits = unpacking.decompress(base64.b64decode(text), _LONGEST_MAP)
    except (ValueError, zlib.error) as error:
        raise _damaged("the manifest", str(error)) from error
    if not unpacking.eof or len(bits) != _map_bytes(size):
        raise _damaged("the manifest", "its map is not of this volume")
    return ranges_of(bits, size)


def _map_bytes(size: int) -> int:
    return -(-size // (GRANULE * 8))


def ranges_of(bits: bytes, size: int) -> Iterator[Range]:
    """In order, neighbours as one, the last one cut off at the end of the volume."""
    begin: int | None = None
    granules = -(-size // GRANULE)
    for granule in range(min(granules, len(bits) * 8)):
        held = bits[granule >> 3] & (1 << (granule & 7))
        if held and begin is None:
            begin = granule
        elif not held and begin is not None:
            yield Range(begin * GRANULE, (granule - begin) * GRANULE)
            begin = None
    if begin is not None:
        yield Range(begin * GRANULE, size - begin * GRANULE)


def _decoded(body: bytes, where: str) -> BackupManifest:
    try:
        return msgspec.json.decode(body, type=BackupManifest)
    except msgspec.MsgspecError as error:
        raise _damaged(where, str(error)) from error


def _anothers(where: str, held: BackupManifest) -> Conflict:
    return Conflict(
        f"{where} holds backup '{held.backup}' of '{held.volume}'",
        field="backup",
        remedy="forget this one without it: --keep-files",
    )


def _damaged(where: str, what: str) -> Refused:
    return Refused(f"{where} is damaged: {what}", field="backup", remedy="restore from another backup")


def _no_room(error: OSError, where: str) -> Unavailable | Refused:
    if error.errno == errno.ENOSPC:
        return Unavailable(f"{where} is full", field="target", remedy="make room there")
    return Refused(f"{where}: {error.strerror}", field="target")
