"""The serial console of one VMM: what it has said is a file that QEMU appends to, what is typed goes by a
socket.

The file's offsets never change, though only its end is kept: what is older is a hole (`bound`). QEMU takes
from the socket only what the guest's serial port has room for (16 bytes), and forgets what it has not taken
when the socket is closed. So it is kept open until all of it was taken.
"""

import asyncio
import ctypes
import errno
import fcntl
import functools
import logging
import os
import socket
import struct
import termios
from collections.abc import Callable
from pathlib import Path

from nahtlos.model.errors import Unavailable

PIECE = 16
"""Bytes of a UART's queue: as many at a time, so that it is known how many were taken."""
BLOCK = 4096
FIRST_LOOK = 0.0005
LAST_LOOK = 0.02
"""Seconds between looks whether a piece was taken."""
PUNCH_HOLE = 0x02 | 0x01
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE"""

_log = logging.getLogger("nahtlos.hypervisor.console")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def size_of(log: Path) -> int:
    try:
        return log.stat().st_size
    except FileNotFoundError:
        return 0


def bound(log: Path, keep: int) -> None:
    """Give back the room of all but the last `keep` bytes. A file system that cannot make holes keeps all."""
    unwanted = (size_of(log) - keep) // BLOCK * BLOCK
    if unwanted <= 0 or log.stat().st_blocks * 512 <= keep + 2 * BLOCK:
        return
    with log.open("r+b") as file:
        if _libc.fallocate(file.fileno(), PUNCH_HOLE, 0, unwanted) != 0:
            _tell_once(log.parent, os.strerror(ctypes.get_errno()))


@functools.cache
def _tell_once(folder: Path, why: str) -> None:
    _log.warning("what consoles say is not bounded in %s, which cannot make holes: %s", folder, why)


async def type_into(path: Path, data: bytes, *, within: float, may: Callable[[], bool]) -> int:
    """How many bytes the guest's serial port took: all, or fewer when it took none for `within` seconds or
    `may` says that nothing is to be typed any more. Unavailable if nobody answers."""
    loop = asyncio.get_running_loop()
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    taken = 0
    try:
        async with asyncio.timeout(within):
            await loop.sock_connect(line, str(path))
        while taken < len(data) and may():
            piece = data[taken : taken + PIECE]
            line.send(piece)
            if not await _taken(line, within):
                break
            taken += len(piece)
    except (OSError, TimeoutError) as error:
        if taken == 0:
            raise Unavailable(f"the console does not answer: {error or 'in time'}", field="server") from error
    finally:
        line.close()
    return taken


async def _taken(line: socket.socket, within: float) -> bool:
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + within, FIRST_LOOK
    while _unread(line):
        if loop.time() > until:
            return False
        _drain(line)
        await asyncio.sleep(pause)
        pause = min(LAST_LOOK, pause * 2)
    return True


def _unread(line: socket.socket) -> int:
    """0 once the other end has read everything; else more than what it has not read."""
    return struct.unpack("i", fcntl.ioctl(line, termios.TIOCOUTQ, b"\0" * 4))[0]


def _drain(line: socket.socket) -> None:
    """What the guest says comes here, too, and is in the file; left unread it would hold the guest up."""
    try:
        while line.recv(65536):
            pass
    except BlockingIOError:
        return
    except OSError as error:
        if error.errno != errno.ECONNRESET:
            raise
