"""A client of NBD servers, for copying: the few words of the protocol that backups, restores and comparisons
need. Blocks the thread that calls it; every answer has a deadline. Knows nothing of volumes.

With a TLS context it asks for TLS before it says anything else, and takes no for the end.
"""

import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, cast
from urllib.parse import unquote, urlsplit

from nahtlos.model.errors import Error, NotFound, Refused, Unavailable
from nahtlos.wire.tls import party_of

DEFAULT_PORT = 10809
ANSWER_SECONDS = 30.0
LONGEST_REQUEST = 4 << 20
LONGEST_STATUS = 1 << 30
ALLOCATION = "base:allocation"
HOLE, ZERO = 1, 2
"""Flags of `ALLOCATION`."""
DIRTY = 1
"""Flag of a dirty bitmap."""

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IQ")
_CHUNK = struct.Struct(">HHQI")
_OPTION_MAGIC, _REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_GO, _STARTTLS, _STRUCTURED, _SET_META = 7, 5, 8, 10
_ACK, _INFO, _META = 1, 3, 4
_UNKNOWN_EXPORT = (1 << 31) + 6
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES, _STATUS = 0, 1, 2, 3, 6, 7
_CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 1, 2, 5
_DONE = 1
_CAN_ZERO = 1 << 6
_LONGEST_OPTION_REPLY = 1 << 16


OnChunk = Callable[[int, int], None]
"""Of the kind and size of a chunk whose body is to be taken from the connection."""


class Address(NamedTuple):
    host: str
    port: int
    export: str
    tls: bool = False
    """Only of an address that was given as a URI: this cloud's own are reached by TLS in any case."""


class Extent(NamedTuple):
    offset: int
    length: int
    flags: int


def parsed(uri: str) -> Address:
    """`nbd://host[:port]/export`, or `nbds://…` for TLS"""
    try:
        where = urlsplit(uri)
        port = where.port or DEFAULT_PORT
    except ValueError as error:
        raise Refused(f"'{uri}' is no address: {error}", field="target") from None
    if where.scheme not in ("nbd", "nbds") or not where.hostname or where.username or where.query:
        raise Refused(f"'{uri}' is no NBD address", field="target", remedy="use nbds://HOST[:PORT]/EXPORT")
    export = unquote(where.path.removeprefix("/"))
    return Address(where.hostname, port, export, tls=where.scheme == "nbds")


class NbdClient:
    """An open connection to one export. `contexts`: what `extents` can be asked for beside `ALLOCATION`;
    those the server does not have are left out of `self.contexts`. `expect`: the party its certificate must
    prove."""

    def __init__(
        self,
        at: Address,
        *,
        tls: ssl.SSLContext | None = None,
        expect: str | None = None,
        contexts: tuple[str, ...] = (ALLOCATION,),
    ) -> None:
        self._at = at
        self._cookie = 0
        self.contexts: dict[str, int] = {}
        self.size = 0
        self._flags = 0
        try:
            self._socket = socket.create_connection((at.host, at.port), ANSWER_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise self._unreachable(error) from error
        try:
            self._open(tls, expect, contexts)
        except ssl.SSLCertVerificationError as error:
            self._socket.close()
            raise Refused(
                f"{at.host} is not shown to be that by its certificate: {error.verify_message}",
                field="target",
                remedy="see 'Encrypted on the way' in docs/storage.md",
            ) from error
        except OSError as error:
            self._socket.close()
            raise self._unreachable(error) from error
        except Error:
            self._socket.close()
            raise

    def close(self) -> None:
        with suppress(OSError):
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what can be asked -------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Of any length up to `LONGEST_REQUEST`."""
        data = bytearray(length)
        view = memoryview(data)

        def fill(kind: int, size: int) -> None:
            (at,) = struct.unpack(">Q", self._exactly(8))
            begin = at - offset
            if kind == _CHUNK_DATA:
                if not 0 <= begin <= length - (size - 8):
                    raise self._nonsense("data that was not asked for")
                self._into(view[begin : begin + size - 8])
            else:
                self._exactly(4)  # a hole: zeros already

        self._ask(_READ, offset, length, on_chunk=fill, plain=view)
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(_WRITE, offset, len(data), payload=data)

    def zero(self, offset: int, length: int) -> None:
        if self._flags & _CAN_ZERO:
            self._ask(_WRITE_ZEROES, offset, length)
        else:
            for begin in range(offset, offset + length, LONGEST_REQUEST):
                self.write(begin, bytes(min(LONGEST_REQUEST, offset + length - begin)))

    def flush(self) -> None:
        self._ask(_FLUSH, 0, 0)

    def extents(self, context: str, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """The whole range, in order and without gaps. Refused if the server has no such context."""
        if context not in self.contexts:
            raise Refused(f"{self._at.export} has no {context}", field="export")
        end = self.size if length is None else offset + length
        while offset < end:
            found = self._status(self.contexts[context], offset, min(LONGEST_STATUS, end - offset))
            for size, flags in found:
                size = min(size, end - offset)
                yield Extent(offset, size, flags)
                offset += size

    def _status(self, context: int, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def take(kind: int, size: int) -> None:
            body = self._exactly(size)
            if kind == _CHUNK_STATUS and struct.unpack_from(">I", body)[0] == context:
                found.extend(struct.iter_unpack(">II", body[4:]))

        self._ask(_STATUS, offset, length, on_chunk=take)
        if not found or any(size == 0 for size, _ in found):
            raise self._nonsense("a status without extents")
        return found

    # --- requests ----------------------------------------------------------------------------------

    def _ask(
        self,
        kind: int,
        offset: int,
        length: int,
        *,
        payload: bytes = b"",
        on_chunk: OnChunk | None = None,
        plain: memoryview | None = None,
    ) -> None:
        self._cookie += 1
        request = _REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._cookie, offset, length)
        try:
            self._socket.sendall(request)
            if payload:
                self._socket.sendall(payload)
            while not self._answered(on_chunk, plain):
                pass
        except OSError as error:
            raise self._unreachable(error) from error

    def _answered(self, on_chunk: OnChunk | None, plain: memoryview | None) -> bool:
        """Take one reply or chunk of it; True after the last one."""
        (magic,) = struct.unpack(">I", self._exactly(4))
        if magic == _SIMPLE_MAGIC:
            error, cookie = _SIMPLE.unpack(self._exactly(_SIMPLE.size))
            self._check(cookie, error, "")
            if plain is not None:
                self._into(plain)
            return True
        if magic != _CHUNK_MAGIC:
            raise self._nonsense("no reply")
        flags, kind, cookie, size = _CHUNK.unpack(self._exactly(_CHUNK.size))
        self._check(cookie, 0, "")
        if size > LONGEST_REQUEST + (1 << 20):
            raise self._nonsense(f"a chunk of {size} bytes")
        if kind & 0x8000:
            body = self._exactly(size)
            self._check(cookie, struct.unpack_from(">I", body)[0], body[6:].decode(errors="replace"))
        elif size and on_chunk is not None:
            on_chunk(kind, size)
        elif size:
            self._exactly(size)
        return bool(flags & _DONE)

    def _check(self, cookie: int, error: int, words: str) -> None:
        if cookie != self._cookie:
            raise self._nonsense("an answer to another question")
        if error:
            raise Unavailable(
                f"{self._at.export} at {self._at.host} answers error {error} {words}".strip(), field="target"
            )

    # --- opening -----------------------------------------------------------------------------------

    def _open(self, tls: ssl.SSLContext | None, expect: str | None, contexts: tuple[str, ...]) -> None:
        password, magic, flags = _GREETING.unpack(self._exactly(_GREETING.size))
        if password != b"NBDMAGIC" or magic != _OPTION_MAGIC or not flags & 1:
            raise self._nonsense("no greeting of an NBD server")
        self._socket.sendall(struct.pack(">I", flags & 3))
        if tls is not None:
            self._option(_STARTTLS, b"")
            name = self._at.host if tls.check_hostname else None
            self._socket = tls.wrap_socket(self._socket, server_hostname=name)
            self._check_party(self._socket, expect)
        structured = self._option(_STRUCTURED, b"", needed=False) is not None
        name = self._at.export.encode()
        named = struct.pack(">I", len(name)) + name
        if structured and contexts:
            queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
            found = self._option(_SET_META, named + struct.pack(">I", len(contexts)) + queries, needed=False)
            for kind, body in found or ():
                if kind == _META:
                    self.contexts[body[4:].decode(errors="replace")] = struct.unpack_from(">I", body)[0]
        for kind, body in self._option(_GO, named + b"\0\0") or ():
            if kind == _INFO and body[:2] == b"\0\0":
                self.size, self._flags = struct.unpack_from(">QH", body, 2)

    def _check_party(self, secured: ssl.SSLSocket, expect: str | None) -> None:
        party = party_of(cast("dict[str, object]", secured.getpeercert()))
        if expect is not None and party != expect:
            raise Refused(
                f"{self._at.host} proved to be {party or 'nobody known'}, not {expect}", field="target"
            )

    def _option(self, option: int, data: bytes, *, needed: bool = True) -> list[tuple[int, bytes]] | None:
        """What is answered up to its end; None if it is refused and not `needed`."""
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        found: list[tuple[int, bytes]] = []
        while True:
            magic, _, kind, size = _OPTION_REPLY.unpack(self._exactly(_OPTION_REPLY.size))
            if magic != _REPLY_MAGIC or size > _LONGEST_OPTION_REPLY:
                raise self._nonsense("no answer to an option")
            body = self._exactly(size)
            if kind == _ACK:
                return found
            if kind & (1 << 31):
                if not needed:
                    return None
                words = body.decode(errors="replace") or hex(kind)
                raise (NotFound if kind == _UNKNOWN_EXPORT else Refused)(
                    f"{self._at.host} does not serve '{self._at.export}': {words}",
                    field="target",
                )
            found.append((kind, body))

    # --- bytes -------------------------------------------------------------------------------------

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        self._into(memoryview(data))
        return bytes(data)

    def _into(self, view: memoryview) -> None:
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                raise ConnectionError("it closed the connection")
            view = view[got:]

    def _unreachable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"the NBD server at {self._at.host}:{self._at.port} cannot be used: {error}",
            field="target",
            remedy="see that it runs and may be reached from this host",
        )

    def _nonsense(self, what: str) -> Refused:
        return Refused(f"{self._at.host}:{self._at.port} sends {what}", field="target")
