"""Whether this kernel lets a program serve page faults of shared memory itself (userfaultfd), without which
no guest can run before all of its memory is there. Asks the kernel as QEMU does; changes nothing.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

DEVICE = Path("/dev/userfaultfd")
SYSCALL = 323 if os.uname().machine == "x86_64" else 282
NEW = 0xAA00
"""_IO(0xAA, 0): a descriptor, from the device."""
HANDSHAKE = 0xC018AA3F
"""_IOWR(0xAA, 0x3F, struct uffdio_api): version, features, ioctls."""
VERSION = 0xAA
MISSING_SHMEM = 1 << 5
"""The feature: pages that are missing in shared memory are told, too."""
REMEDY = "a kernel with CONFIG_USERFAULTFD, whose /dev/userfaultfd this agent may open"


def why_no_userfault(ask: Callable[[], int] | None = None) -> str:
    """Empty if it can; else why not, with what to do. `ask` returns the kernel's features, or raises
    OSError."""
    try:
        features = (ask or kernel_features)()
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, str(error))
        return f"no post-copy here: the kernel gives no userfaultfd ({reason}); needed: {REMEDY}"
    if not features & MISSING_SHMEM:
        return f"no post-copy here: the kernel's userfaultfd knows no shared memory; needed: {REMEDY}"
    return ""


def kernel_features() -> int:
    descriptor = _open()
    try:
        handshake = bytearray(struct.pack("QQQ", VERSION, 0, 0))
        fcntl.ioctl(descriptor, HANDSHAKE, handshake)
    finally:
        os.close(descriptor)
    return struct.unpack("QQQ", handshake)[1]


def _open() -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _call()
    try:
        return fcntl.ioctl(device, NEW, os.O_CLOEXEC)
    finally:
        os.close(device)


def _call() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(SYSCALL, os.O_CLOEXEC))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor
