"""What a file says it is, before anything else reads it: headers of disk images, judged by their bytes. Pure.

An image comes from people nobody trusts, and says of itself where other files are, how large it is and how
it is to be read. The format is what the person named, never what the content suggests. What a qcow2 may not
do here: name another file (backing file, data file), be encrypted, need a feature this reader does not know,
carry snapshots of its own, or point outside itself. What it claims and cannot be seen in the headers
(clusters beyond its end, tables used twice) is found by `qemu-img check` in `images`, confined.
"""

import struct
from collections.abc import Iterator

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.storage import VolumeFormat

SECTOR = 512
HEAD_BYTES = 2 << 20
"""How much of a file's beginning is read: a header lies in the first cluster, which is at most this large."""
MAX_L1_BYTES = 32 << 20
"""As QEMU has it."""

_MAGIC = b"QFI\xfb"
_HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQII")
_V2_LENGTH, _V3_LENGTH = _HEADER_V2.size, _HEADER_V2.size + _HEADER_V3.size
_EXTENSION = struct.Struct(">II")
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_READABLE = _DIRTY | _COMPRESSION | _EXTENDED_L2
_EXT_END, _EXT_BACKING, _EXT_DATA_FILE, _EXT_ENCRYPTION = 0, 0xE2792ACA, 0x44415441, 0x0537BE77
_L2_OFFSET = 0x00FF_FFFF_FFFF_FE00
_CONTAINERS = (
    (b"QFI\xfb", "a qcow2 image"),
    (b"KDMV", "a VMDK image"),
    (b"COWD", "a VMDK image"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"<<< ", "a VDI image"),
    (b"LUKS\xba\xbe", "encrypted by LUKS"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"\xfd7zXZ\x00", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"BZh", "compressed by bzip2"),
    (b"PK\x03\x04", "a zip archive"),
)


class ImageLimits(msgspec.Struct, frozen=True, kw_only=True):
    virtual_bytes: int = 2 << 40
    """What a server may see of it."""
    stored_bytes: int = 256 << 30
    """What it may take on disk once it is converted."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the headers say of an image that is fit to be read further."""

    format: VolumeFormat
    virtual_bytes: int


class L1(msgspec.Struct, frozen=True, kw_only=True):
    """Where an image's first table is, and what may stand in it."""

    offset: int
    entries: int
    cluster_bytes: int


def judged_raw(head: bytes, file_bytes: int, limits: ImageLimits) -> Found:
    """Any bytes are a raw image; what is one of another format was most likely named wrongly."""
    for magic, words in _CONTAINERS:
        if head.startswith(magic):
            raise _not_fit(f"the file is {words}, no raw image", "format", "name its format, or unpack it")
    return Found(format=VolumeFormat.RAW, virtual_bytes=_checked_size(file_bytes, limits))


def judged_qcow2(head: bytes, file_bytes: int, limits: ImageLimits) -> tuple[Found, L1]:
    """`head`: the first `HEAD_BYTES` of the file, or all of it. Refused with field and remedy."""
    if len(head) < _V2_LENGTH or head[:4] != _MAGIC:
        raise _not_fit("the file is no qcow2 image", "format", "name the format it has")
    (
        _,
        version,
        backing,
        _backing_length,
        cluster_bits,
        size,
        encryption,
        l1_entries,
        l1_offset,
        refcounts,
        refcount_clusters,
        snapshots,
        _snapshots_offset,
    ) = _HEADER_V2.unpack_from(head)
    if version not in (2, 3):
        raise _not_fit(f"qcow2 of version {version} is not known", "format", "convert it to version 3")
    if backing != 0:
        raise _names_file("a backing file")
    if encryption != 0:
        raise _not_fit("the image is encrypted", "encryption", "decrypt it first; volumes can be encrypted")
    if not 9 <= cluster_bits <= 21:
        raise _damaged(f"clusters of 2^{cluster_bits} bytes")
    if snapshots != 0:
        raise _not_fit(
            f"the image has {snapshots} snapshots inside", "snapshots", "convert it: a copy has none"
        )
    cluster = 1 << cluster_bits
    if version == 3:
        _check_version_3(head, cluster)
    virtual = _checked_size(size, limits)
    _check_table("its reference counts", refcounts, refcount_clusters * cluster, cluster, file_bytes)
    extended = version == 3 and bool(_HEADER_V3.unpack_from(head, _V2_LENGTH)[0] & _EXTENDED_L2)
    covered = cluster * (cluster // (16 if extended else 8))
    needed = -(-virtual // covered)
    if l1_entries < needed or l1_entries * 8 > MAX_L1_BYTES:
        raise _damaged(f"a table of {l1_entries} entries for {virtual} bytes")
    _check_table("its first table", l1_offset, l1_entries * 8, cluster, file_bytes)
    found = Found(format=VolumeFormat.QCOW2, virtual_bytes=virtual)
    return found, L1(offset=l1_offset, entries=l1_entries, cluster_bytes=cluster)


def check_l1(table: bytes, l1: L1, file_bytes: int) -> None:
    """Every second table lies whole inside the file, at a cluster's beginning, and no two are the same."""
    seen: set[int] = set()
    for (entry,) in struct.iter_unpack(">Q", table):
        offset = entry & _L2_OFFSET
        if offset == 0:
            continue
        _check_table("a second table", offset, l1.cluster_bytes, l1.cluster_bytes, file_bytes)
        if offset in seen:
            raise _damaged("a second table that is used twice")
        seen.add(offset)


def _check_version_3(head: bytes, cluster: int) -> None:
    if len(head) < _V3_LENGTH:
        raise _not_fit("the file is no qcow2 image: its header is cut off", "format", "send the whole file")
    incompatible, _, _, refcount_order, length = _HEADER_V3.unpack_from(head, _V2_LENGTH)
    if incompatible & _DATA_FILE:
        raise _names_file("a data file")
    if incompatible & _CORRUPT:
        raise _damaged("a mark that it is corrupt", "repair it with qemu-img check -r all")
    if unknown := incompatible & ~_READABLE:
        raise _not_fit(
            f"the image needs features that are not known here: {unknown:#x}",
            "features",
            "convert it with qemu-img convert -O qcow2 -o compat=1.1",
        )
    if refcount_order > 6:
        raise _damaged(f"reference counts of 2^{refcount_order} bits")
    if length < _V3_LENGTH or length % 8 or length > min(cluster, len(head)):
        raise _damaged(f"a header of {length} bytes")
    compression = head[_V3_LENGTH] if length > _V3_LENGTH else 0
    if compression > 1 or bool(compression) != bool(incompatible & _COMPRESSION):
        raise _damaged(f"compression of kind {compression}")
    for kind, _ in _extensions(head, length, cluster):
        if kind == _EXT_BACKING:
            raise _names_file("a backing file's format")
        if kind == _EXT_DATA_FILE:
            raise _names_file("a data file")
        if kind == _EXT_ENCRYPTION:
            raise _not_fit(
                "the image is encrypted", "encryption", "decrypt it first; volumes can be encrypted"
            )


def _extensions(head: bytes, begin: int, cluster: int) -> Iterator[tuple[int, bytes]]:
    end = min(cluster, len(head))
    position = begin
    while position + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(head, position)
        position += _EXTENSION.size
        if kind == _EXT_END:
            return
        if position + length > end:
            raise _damaged(f"a header extension of {length} bytes")
        yield kind, head[position : position + length]
        position += -(-length // 8) * 8


def _checked_size(size: int, limits: ImageLimits) -> int:
    if size == 0:
        raise _not_fit("the image is empty", "size", "send an image with content")
    if size % SECTOR:
        raise _not_fit(
            f"{size} bytes are no multiple of {SECTOR}", "size", "fill it up with zeros to whole sectors"
        )
    if size > limits.virtual_bytes:
        raise _not_fit(
            f"the image says it has {size} bytes; {limits.virtual_bytes} are allowed",
            "size",
            "make it smaller, or ask for a higher limit",
        )
    return size


def _check_table(what: str, offset: int, length: int, cluster: int, file_bytes: int) -> None:
    if offset % cluster or offset < cluster:
        raise _damaged(f"{what} at {offset:#x}")
    if offset + length > file_bytes:
        raise _damaged(f"{what} beyond its end", "send the whole file")


def _not_fit(message: str, field: str, remedy: str) -> Refused:
    return Refused(message, field=field, remedy=remedy)


def _damaged(what: str, remedy: str = "make the image anew") -> Refused:
    return Refused(f"the image is damaged: it has {what}", field="image", remedy=remedy)


def _names_file(what: str) -> Refused:
    return Refused(
        f"the image names {what}: what is not in it would be read from this host",
        field="image",
        remedy="send it in one piece: qemu-img convert -O qcow2 makes a copy of it all",
    )
