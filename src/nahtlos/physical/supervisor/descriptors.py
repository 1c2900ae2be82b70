"""The store of descriptors under names: listening sockets it made, taps others gave it.

A stored descriptor is above FLOOR and close-on-exec; units get duplicates at low numbers. After a kill -9
they are taken back out of the units that hold them; sockets nobody holds are bound again.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from nahtlos.model.errors import NotFound, Refused
from nahtlos.physical.supervisor import processes
from nahtlos.physical.supervisor.journal import FdKind, FdRecord, HandedFd, Journal

FLOOR = 256
BACKLOG = 1024
log = logging.getLogger(__name__)

Holder = tuple[int, dict[str, HandedFd]]
"""A pidfd of a running unit and what it was handed."""


class DescriptorStore:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._fds: dict[str, int] = {}
        self._records: dict[str, FdRecord] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._fds))

    def get(self, name: str) -> int | None:
        return self._fds.get(name)

    def required(self, name: str) -> tuple[int, str]:
        """The descriptor and what it is; Refused if there is none."""
        if name not in self._fds:
            raise NotFound(
                f"no descriptor '{name}' is stored", field="fds", remedy="store it before the unit"
            )
        return self._fds[name], self._records[name].identity

    def put(self, name: str, fd: int) -> None:
        """Keep a duplicate of `fd`."""
        self._keep(name, fd, FdRecord(kind=FdKind.STORED, identity=processes.identity(fd)))

    def drop(self, name: str) -> None:
        fd = self._fds.pop(name, None)
        record = self._records.pop(name, None)
        if fd is not None:
            os.close(fd)
        if record is not None:
            self._journal.save_descriptors(self._records)
            if record.kind is FdKind.UNIX:
                Path(record.path).unlink(missing_ok=True)

    def listen_tcp(self, name: str, address: str, port: int) -> int:
        known = self._records.get(name)
        if known and known.kind is FdKind.TCP and known.address == address and port in (0, known.port):
            return known.port
        with _bound_tcp(address, port) as sock:
            bound: int = sock.getsockname()[1]
            self._keep(name, sock.fileno(), _tcp_record(sock, address, bound))
        return bound

    def listen_unix(self, name: str, path: Path, mode: int) -> None:
        known = self._records.get(name)
        if known and known.kind is FdKind.UNIX and known.path == str(path) and path.is_socket():
            return
        with _bound_unix(path, mode) as sock:
            self._keep(name, sock.fileno(), _unix_record(sock, path, mode))

    def recover(self, holders: Iterable[Holder]) -> None:
        """Everything the journal names, from whoever still holds it, else made anew where that is
        possible. What is lost is forgotten and logged."""
        holding = list(holders)
        for name, record in self._journal.load_descriptors().items():
            fd = _from_holders(name, record, holding)
            if fd is not None:
                self._keep(name, fd, record)
                os.close(fd)
            elif record.kind is FdKind.STORED:
                log.warning("descriptor %s is lost: no running unit holds it", name)
            else:
                self._make_again(name, record)
        self._journal.save_descriptors(self._records)

    def _make_again(self, name: str, record: FdRecord) -> None:
        make: Callable[[], object] = (
            (lambda: self.listen_tcp(name, record.address, record.port))
            if record.kind is FdKind.TCP
            else (lambda: self.listen_unix(name, Path(record.path), record.mode))
        )
        try:
            make()
        except Refused as error:
            log.warning("descriptor %s is lost: %s", name, error)

    def _keep(self, name: str, fd: int, record: FdRecord) -> None:
        duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FLOOR)
        old = self._fds.pop(name, None)
        if old is not None:
            os.close(old)
        self._fds[name] = duplicate
        self._records[name] = record
        self._journal.save_descriptors(self._records)


def _from_holders(name: str, record: FdRecord, holders: list[Holder]) -> int | None:
    for pidfd, handed in holders:
        if name not in handed:
            continue
        with suppress(OSError):
            fd = processes.take_descriptor(pidfd, handed[name].number)
            if processes.identity(fd) == record.identity:
                return fd
            os.close(fd)  # the unit has closed it and uses the number for something else
    return None


def _bound_tcp(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Refused(
            f"cannot listen on {address} port {port}: {error.strerror}",
            field="port",
            remedy="free the port or choose another",
        ) from error
    return sock


def _bound_unix(path: Path, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.fchmod(sock.fileno(), mode)  # before bind: the path never exists with wider rights
        sock.bind(str(path))
        path.chmod(mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Refused(f"cannot listen on {path}: {error}", field="path") from error
    return sock


def _tcp_record(sock: socket.socket, address: str, port: int) -> FdRecord:
    return FdRecord(kind=FdKind.TCP, identity=processes.identity(sock.fileno()), address=address, port=port)


def _unix_record(sock: socket.socket, path: Path, mode: int) -> FdRecord:
    return FdRecord(kind=FdKind.UNIX, identity=processes.identity(sock.fileno()), path=str(path), mode=mode)
