"""Copies of sparse files. Blocks for as long as a copy takes: call it in a thread."""

import errno
import fcntl
import os

_FICLONE = 0x40049409
_CHUNK = 64 << 20
_READ = 1 << 20
_NOT_BY_THE_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Such as from one kind of file system to another."""


def copy_sparse(source: int, target: int) -> None:
    """By sharing extents where the file system can, else data only, holes left out."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        _copy_data(source, target)


def _copy_data(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            begin = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        position = os.lseek(source, begin, os.SEEK_HOLE)
        _copy_range(source, target, begin, position)


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    while begin < end:
        copied = _copy_some(source, target, begin, end - begin)
        if copied == 0:
            raise OSError(errno.EIO, "an image became shorter while it was copied")
        begin += copied


def _copy_some(source: int, target: int, begin: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, min(_CHUNK, length), begin, begin)
    except OSError as error:
        if error.errno not in _NOT_BY_THE_KERNEL:
            raise
    data = os.pread(source, min(_READ, length), begin)
    return len(data) if data == bytes(len(data)) else os.pwrite(target, data, begin)
