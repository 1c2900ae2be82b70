"""Keys of encrypted volumes, each sealed by a master key: two files of mode 0600 beside the authority's.

    master.key     the master keys, newest first; what is sealed anew is sealed by the first
    keyring.json   by key: which master key sealed it, the nonce, the sealed secret

A secret is 256 bits of chance and is never shown to anybody but who may hold it (`controllers.keys`
decides that). A destroyed key is gone: what it encrypted cannot be read any more. Rotation makes a new
master key and seals everything by it; killed at any moment in between, both files are right. Files are read
anew for every use, by one process at a time.
"""

import base64
import fcntl
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import KeyId, checked_name
from nahtlos.wire.credentials import write_file

MASTER_FILE = "master.key"
KEYRING_FILE = "keyring.json"
SECRET_BYTES = 32
_NONCE_BYTES = 12
T = TypeVar("T")


class _Master(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    key: str


class _Sealed(msgspec.Struct, frozen=True, kw_only=True):
    master: str
    nonce: str
    sealed: str


class Keyring:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, key: KeyId) -> None:
        """A new secret by that name. Conflict if there is one."""
        checked_name(key, "key")
        with self._alone():
            sealed = self._sealed()
            if key in sealed:
                raise Conflict(f"there is a key '{key}'", field="key", remedy="choose another name")
            masters = self._masters() or self._new_master(())
            self._write({**sealed, key: _seal(masters[0], key, secrets.token_bytes(SECRET_BYTES))})

    def secret(self, key: KeyId) -> bytes:
        """NotFound if there is none, Refused if its file was changed by somebody without the master key."""
        with self._alone():
            sealed = self._sealed().get(key)
            masters = self._masters()
        if sealed is None:
            raise NotFound(f"there is no key '{key}'", field="key", remedy="it was never made, or destroyed")
        return _open(masters, key, sealed)

    def names(self) -> tuple[KeyId, ...]:
        return tuple(KeyId(name) for name in sorted(self._sealed()))

    def destroy(self, key: KeyId) -> None:
        """What it encrypted is lost with it. Repeatable."""
        with self._alone():
            self._write({name: each for name, each in self._sealed().items() if name != key})

    def rotate(self) -> None:
        """Seal everything by a new master key, then forget the older ones."""
        with self._alone():
            masters = self._new_master(self._masters())
            opened = {name: _open(masters, name, each) for name, each in self._sealed().items()}
            self._write({name: _seal(masters[0], name, secret) for name, secret in opened.items()})
            self._write_masters(masters[:1])

    # --- files -------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Generator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / ".keyring.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _masters(self) -> tuple[_Master, ...]:
        return self._read(MASTER_FILE, tuple[_Master, ...], ())

    def _sealed(self) -> dict[str, _Sealed]:
        return self._read(KEYRING_FILE, dict[str, _Sealed], {})

    def _read(self, name: str, kind: type[T], empty: T) -> T:
        path = self._folder / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return empty
        except msgspec.MsgspecError as error:
            raise Refused(f"{path} is damaged: {error}", field="keyring", remedy="restore it") from error

    def _new_master(self, known: tuple[_Master, ...]) -> tuple[_Master, ...]:
        key = base64.b64encode(AESGCM.generate_key(bit_length=256)).decode()
        masters = (_Master(id=secrets.token_hex(8), key=key), *known)
        self._write_masters(masters)
        return masters

    def _write_masters(self, masters: tuple[_Master, ...]) -> None:
        write_file(self._folder / MASTER_FILE, msgspec.json.encode(masters), mode=0o600)

    def _write(self, sealed: dict[str, _Sealed]) -> None:
        write_file(self._folder / KEYRING_FILE, msgspec.json.encode(sealed), mode=0o600)


def _seal(master: _Master, name: str, secret: bytes) -> _Sealed:
    """The name is sealed with it, so that no entry can take the place of another."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(base64.b64decode(master.key)).encrypt(nonce, secret, name.encode())
    return _Sealed(
        master=master.id, nonce=base64.b64encode(nonce).decode(), sealed=base64.b64encode(sealed).decode()
    )


def _open(masters: tuple[_Master, ...], name: str, sealed: _Sealed) -> bytes:
    for master in masters:
        if master.id == sealed.master:
            try:
                return AESGCM(base64.b64decode(master.key)).decrypt(
                    base64.b64decode(sealed.nonce), base64.b64decode(sealed.sealed), name.encode()
                )
            except InvalidTag:
                break
    raise Refused(
        f"the key '{name}' cannot be unsealed",
        field="keyring",
        remedy=f"restore {MASTER_FILE} and {KEYRING_FILE} from the same copy",
    )
