"""The probe guest's contract with those who watch it: its disk's layout, its ports, its blocks.

Constants and pure functions; `guest/src` is the other side of each of them.
"""

import struct
import uuid
import zlib
from typing import Final

MIB: Final = 1 << 20
SECTOR: Final = 512

# --- disk ---------------------------------------------------------------------------------------------

IMAGE_MIB: Final = 160
BOOT_PARTITION_OFFSET: Final = 1 * MIB
BOOT_PARTITION_SIZE: Final = 23 * MIB
DATA_PARTITION_OFFSET: Final = 24 * MIB
DATA_PARTITION_SIZE: Final = IMAGE_MIB * MIB - DATA_PARTITION_OFFSET

BLOCK_SIZE: Final = 4096
BLOCK_HEADER: Final = struct.Struct("<8sQQQ")
"""Magic, number of the block (from 1), boot number, crc32 of the filler."""
BLOCK_MAGIC: Final = b"nahtlos1"
BLOCK_CAPACITY: Final = DATA_PARTITION_SIZE // BLOCK_SIZE - 1
MARK: Final = struct.Struct("<8sQQQ")
"""The block after those: magic, 1 if frozen, blocks acknowledged then, boot number."""
MARK_MAGIC: Final = b"nahtmark"
MARK_OFFSET: Final = DATA_PARTITION_OFFSET + BLOCK_CAPACITY * BLOCK_SIZE
_FILLER_WORDS = (BLOCK_SIZE - BLOCK_HEADER.size) // 8
_WORD = (1 << 64) - 1

# --- network ------------------------------------------------------------------------------------------

ECHO_PORT: Final = 7
HEARTBEAT_PORT: Final = 9
LINE_PORT: Final = 7000
HTTP_PORT: Final = 80
HEARTBEAT: Final = struct.Struct("<QQQQQ")
"""Sequence, guest's monotonic ns, boot number, disk blocks acknowledged, memory errors."""
HEARTBEAT_MS: Final = 20
SUBSCRIBE: Final = b"subscribe"
SUBSCRIPTION_SECONDS: Final = 600

# --- serial console -----------------------------------------------------------------------------------

PROBE_OK: Final = "NAHTLOS-PROBE-OK"
READY: Final = "NAHTLOS-READY"
"""Followed by the address and the boot id."""
PROBE_ARGUMENT: Final = "nahtlos.probe=1"
PROBE_IDLE_ARGUMENT: Final = "nahtlos.probe=idle"
KERNEL_ARGUMENTS: Final = (
    "console=ttyS0 quiet loglevel=4 panic=1 oops=panic mitigations=off nokaslr tsc=reliable highres=off "
    "no_timer_check memhp_default_state=online_movable apparmor=0 audit=0 cryptomgr.notests "
    "initcall_blacklist=init_kprobe_trace"
)
"""An oops ends the guest (and shows as another boot id) rather than letting it limp on unnoticed.
The TSC keeps the time, and timers are as coarse as the kernel's tick: under emulation both halve what a guest
under traffic costs (18 against 37 per cent of a processor). guest/src/clock.c gives the TSC up where its
frequency was measured wrongly."""


def boot_number(boot_id: str) -> int:
    """The number by which blocks and heartbeats name a boot: the first 8 bytes of its id."""
    return int.from_bytes(uuid.UUID(boot_id).bytes[:8], "little")


def block_offset(number: int) -> int:
    """Where block `number` (from 1) lies on the volume."""
    return DATA_PARTITION_OFFSET + (number - 1) * BLOCK_SIZE


def filler(number: int) -> bytes:
    """What block `number` must contain behind its header."""
    words = (
        (number * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) & _WORD for index in range(_FILLER_WORDS)
    )
    return struct.pack(f"<{_FILLER_WORDS}Q", *words)


def block_is_right(block: bytes, number: int) -> bool:
    """Whether `block` is what the disk checker wrote as block `number`, in whichever boot."""
    magic, written, _boot, crc = BLOCK_HEADER.unpack_from(block)
    expected = filler(number)
    return (
        magic == BLOCK_MAGIC
        and written == number
        and block[BLOCK_HEADER.size :] == expected
        and crc == zlib.crc32(expected)
    )


def master_boot_record(code: bytes) -> bytes:
    """The first sector: boot code, and the two partitions."""
    return code[:440].ljust(446, b"\0") + b"".join(
        (
            _partition(0x80, 0x0E, BOOT_PARTITION_OFFSET, BOOT_PARTITION_SIZE),
            _partition(0x00, 0xDA, DATA_PARTITION_OFFSET, DATA_PARTITION_SIZE),
            bytes(32),
            b"\x55\xaa",
        )
    )


def _partition(flag: int, kind: int, offset: int, size: int) -> bytes:
    """Addressed by sector numbers; the cylinder fields say that they do not count."""
    nowhere = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", flag, nowhere, kind, nowhere, offset // SECTOR, size // SECTOR)
