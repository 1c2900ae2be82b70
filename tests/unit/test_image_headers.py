"""Headers of images as hostile people write them: judged by their bytes alone, and never anything but an
answer or a refusal that names a field and a remedy."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.model.errors import Refused
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.storage.jail import call_filter
from nahtlos.physical.storage.probe import Found, ImageLimits, check_l1, judged_qcow2, judged_raw

LIMITS = ImageLimits(virtual_bytes=1 << 30)
CLUSTER = 65536
FILE_BYTES = 10 * CLUSTER
FIELDS = {
    "version": (4, ">I"),
    "backing": (8, ">Q"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "encryption": (32, ">I"),
    "l1_entries": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "refcounts": (48, ">Q"),
    "refcount_clusters": (56, ">I"),
    "snapshots": (60, ">I"),
    "incompatible": (72, ">Q"),
    "refcount_order": (96, ">I"),
    "length": (100, ">I"),
}


def header(*, extensions: bytes = b"", **fields: int) -> bytes:
    head = bytearray(CLUSTER)
    head[:4] = b"QFI\xfb"
    sound = {
        "version": 3,
        "cluster_bits": 16,
        "size": 64 << 20,
        "l1_entries": 1,
        "l1_offset": 3 * CLUSTER,
        "refcounts": CLUSTER,
        "refcount_clusters": 1,
        "refcount_order": 4,
        "length": 112,
    }
    for name, value in {**sound, **fields}.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, head, offset, value)
    head[112 : 112 + len(extensions)] = extensions
    return bytes(head)


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def test_sound_header_is_read() -> None:
    found, l1 = judged_qcow2(header(), FILE_BYTES, LIMITS)
    assert found == Found(format=VolumeFormat.QCOW2, virtual_bytes=64 << 20)
    assert (l1.offset, l1.entries) == (3 * CLUSTER, 1)
    judged_qcow2(header(incompatible=1 | 16, l1_entries=2), FILE_BYTES, LIMITS)
    judged_qcow2(header(extensions=extension(0x6803F857, bytes(144))), FILE_BYTES, LIMITS)
    judged_qcow2(header(version=2), FILE_BYTES, LIMITS)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"version": 1}, "format"),
        ({"version": 4}, "format"),
        ({"backing": 512}, "image"),
        ({"cluster_bits": 8}, "image"),
        ({"cluster_bits": 63}, "image"),
        ({"size": 0}, "size"),
        ({"size": 1000}, "size"),
        ({"size": (1 << 30) + 512}, "size"),
        ({"size": (1 << 64) - 512}, "size"),
        ({"encryption": 1}, "encryption"),
        ({"encryption": 2}, "encryption"),
        ({"l1_entries": 0}, "image"),
        ({"l1_entries": (1 << 32) - 1}, "image"),
        ({"l1_offset": 0}, "image"),
        ({"l1_offset": 3 * CLUSTER + 8}, "image"),
        ({"l1_offset": 1 << 63}, "image"),
        ({"l1_offset": FILE_BYTES}, "image"),
        ({"refcounts": 1 << 40}, "image"),
        ({"refcount_clusters": (1 << 32) - 1}, "image"),
        ({"snapshots": 1}, "snapshots"),
        ({"incompatible": 2}, "image"),
        ({"incompatible": 4}, "image"),
        ({"incompatible": 8}, "image"),
        ({"incompatible": 32}, "features"),
        ({"incompatible": 1 << 63}, "features"),
        ({"refcount_order": 7}, "image"),
        ({"length": 96}, "image"),
        ({"length": 105}, "image"),
        ({"length": 1 << 31}, "image"),
    ],
)
def test_wrong_field_is_refused_by_name(wrong: dict[str, int], field: str) -> None:
    with pytest.raises(Refused) as refusal:
        judged_qcow2(header(**wrong), FILE_BYTES, LIMITS)
    assert refusal.value.field == field
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("kind", "field"), [(0xE2792ACA, "image"), (0x44415441, "image"), (0x0537BE77, "encryption")]
)
def test_extensions_that_name_files_or_keys_are_refused(kind: int, field: str) -> None:
    hidden = extension(0x6803F857, b"abc") + extension(kind, b"/etc/shadow")
    with pytest.raises(Refused) as refusal:
        judged_qcow2(header(extensions=hidden), FILE_BYTES, LIMITS)
    assert refusal.value.field == field


def test_extension_longer_than_the_header_is_refused() -> None:
    with pytest.raises(Refused, match="extension"):
        judged_qcow2(header(extensions=struct.pack(">II", 77, 1 << 31)), FILE_BYTES, LIMITS)


def test_cut_off_headers_are_refused() -> None:
    for length in (0, 3, 4, 71, 72, 103, 111):
        with pytest.raises(Refused):
            judged_qcow2(header()[:length], FILE_BYTES, LIMITS)


def test_second_tables_lie_inside_and_are_used_once() -> None:
    _, l1 = judged_qcow2(header(l1_entries=4), FILE_BYTES, LIMITS)
    check_l1(struct.pack(">4Q", 0, 4 * CLUSTER | 1 << 63, 5 * CLUSTER, 0), l1, FILE_BYTES)
    for table in ((4 * CLUSTER, 4 * CLUSTER), (FILE_BYTES,), (4 * CLUSTER + 512,), (1 << 50,)):
        with pytest.raises(Refused):
            check_l1(struct.pack(f">{len(table)}Q", *table), l1, FILE_BYTES)


def test_raw_image_is_whole_sectors_and_no_other_format() -> None:
    assert judged_raw(bytes(512), 1 << 20, LIMITS).virtual_bytes == 1 << 20
    for head, size, field in (
        (bytes(512), 0, "size"),
        (bytes(512), 1 << 20 | 1, "size"),
        (bytes(512), 1 << 40, "size"),
        (b"QFI\xfb" + bytes(508), 1 << 20, "format"),
        (b"vhdxfile" + bytes(504), 1 << 20, "format"),
        (b"\x1f\x8b" + bytes(510), 1 << 20, "format"),
    ):
        with pytest.raises(Refused) as refusal:
            judged_raw(head, size, LIMITS)
        assert refusal.value.field == field and refusal.value.remedy


fields = st.fixed_dictionaries(
    {},
    optional={
        name: st.integers(0, (1 << (64 if form == ">Q" else 32)) - 1)
        | st.sampled_from([0, 1, 3, 4, 16, CLUSTER, 64 << 20])
        for name, (_, form) in FIELDS.items()
    },
)


@given(fields, st.binary(max_size=200), st.integers(0, 1 << 50), st.integers(0, CLUSTER))
def test_any_header_is_judged_or_refused(
    wrong: dict[str, int], extensions: bytes, file_bytes: int, kept: int
) -> None:
    head = header(extensions=extensions, **wrong)[:kept]
    try:
        found, l1 = judged_qcow2(head, file_bytes, LIMITS)
    except Refused as refused:
        assert refused.field and refused.remedy
        return
    assert 0 < found.virtual_bytes <= LIMITS.virtual_bytes and found.virtual_bytes % 512 == 0
    assert l1.offset + l1.entries * 8 <= file_bytes


@given(st.binary(max_size=4096), st.integers(0, 1 << 62))
def test_any_bytes_are_judged_or_refused(head: bytes, file_bytes: int) -> None:
    for judge in (judged_qcow2, judged_raw):
        try:
            judge(head, file_bytes, LIMITS)
        except Refused as refused:
            assert refused.field and refused.remedy


def judged_call(number: int, *, architecture: int = 0xC000003E, first: int = 0) -> int:
    """What the filter says to a system call: its program, as the kernel runs it."""
    words = {0: number, 4: architecture, 16: first}
    steps = list(struct.iter_unpack("HBBI", call_filter()))
    at = accumulator = 0
    while True:
        code, then, other, value = steps[at]
        at += 1
        if code == 0x20:
            accumulator = words[value]
        elif code == 0x15:
            at += then if accumulator == value else other
        elif code == 0x45:
            at += then if accumulator & value else other
        else:
            return value


def test_filter_ends_who_makes_sockets_mounts_or_traces() -> None:
    kill, absent, allow = 0x80000000, 0x00050000 | 38, 0x7FFF0000
    for number in (41, 42, 101, 155, 165, 272, 308, 321, 250, 175):
        assert judged_call(number) == kill
    for number in (0, 1, 9, 17, 18, 59, 202, 231):
        assert judged_call(number) == allow
    assert judged_call(435) == absent
    assert judged_call(56, first=0x3D0F00) == allow, "a thread"
    assert judged_call(56, first=0x10000000) == kill, "a namespace"
    assert judged_call(0, architecture=0x40000003) == kill
    assert judged_call(0x40000000) == kill
