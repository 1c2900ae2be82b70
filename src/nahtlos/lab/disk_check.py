"""Looks in a volume itself for every block its guest acknowledged: after the server has stopped, or in a
copy. It only reads, and trusts nothing a guest says now.

    python -m nahtlos.lab.disk_check VOLUME --acknowledged N [--server NAME]

Partition 2 of the volume holds 4096-byte blocks; block i carries number i + 1:
'<8sQQQ' magic b"nahtlos1", number, boot, crc32 of the filler that follows.

    lost    no block with the magic there (it was never written, or something older came back)
    wrong   a block of ours, but of another number or with a filler that does not match its checksum
"""

import argparse
import struct
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from nahtlos.model.errors import Error, Refused
from nahtlos.runtime.evidence.records import DiskCheck

SECTOR = 512
BLOCK = 4096
HEADER = struct.Struct("<8sQQQ")
MAGIC = b"nahtlos1"
PARTITION = struct.Struct("<B3sB3sII")
PARTITION_TABLE = 446
CHECKED_PARTITION = 1
"""The second one."""
READ_BLOCKS = 256


def partition_of(mbr: bytes, index: int) -> tuple[int, int]:
    """(offset, size) in bytes of a primary partition."""
    if len(mbr) < SECTOR or mbr[510:512] != b"\x55\xaa":
        raise Refused("has no partition table", field="volume", remedy="name the raw volume, not a qcow2")
    fields = PARTITION.unpack_from(mbr, PARTITION_TABLE + index * PARTITION.size)
    start, sectors = fields[4] * SECTOR, fields[5] * SECTOR
    if not start or not sectors:
        raise Refused(f"has no partition {index + 1}", field="volume")
    return start, sectors


def judge(block: bytes, number: int) -> str:
    """`found`, `lost` or `wrong` for the block that should carry `number`."""
    if len(block) < BLOCK or block[:8] != MAGIC:
        return "lost"
    _, carried, _, checksum = HEADER.unpack_from(block)
    filler = memoryview(block)[HEADER.size :]
    return "found" if carried == number and zlib.crc32(filler) == checksum else "wrong"


def check_volume(volume: Path, acknowledged: int, server: str = "") -> DiskCheck:
    """Every block from 1 to `acknowledged`. Refused if the volume is not one of ours."""
    if acknowledged < 0:
        raise Refused(f"{acknowledged} blocks", field="acknowledged", remedy="0 or more")
    try:
        with volume.open("rb") as file:
            return _check(file, acknowledged, server or volume.stem)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}", field="volume") from error


def _check(file: BinaryIO, acknowledged: int, server: str) -> DiskCheck:
    offset, size = partition_of(file.read(SECTOR), CHECKED_PARTITION)
    counts = {"found": 0, "lost": 0, "wrong": 0}
    first_bad: int | None = None
    file.seek(offset)
    there = min(acknowledged, size // BLOCK)
    number = 0
    while number < there:
        chunk = file.read(min(READ_BLOCKS, there - number) * BLOCK)
        if not chunk:
            break
        for at in range(0, len(chunk), BLOCK):
            number += 1
            verdict = judge(chunk[at : at + BLOCK], number)
            counts[verdict] += 1
            if verdict != "found" and first_bad is None:
                first_bad = number
    missing = acknowledged - number
    if missing and first_bad is None:
        first_bad = number + 1
    return DiskCheck(
        server=server,
        acknowledged=acknowledged,
        found=counts["found"],
        lost=counts["lost"] + missing,
        wrong=counts["wrong"],
        first_bad=first_bad,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nahtlos.lab.disk_check", description="Check a volume's blocks.")
    parser.add_argument("volume", type=Path)
    parser.add_argument("--acknowledged", type=int, required=True, help="blocks the guest acknowledged")
    parser.add_argument("--server", default="")
    options = parser.parse_args(arguments)
    try:
        result = check_volume(options.volume, options.acknowledged, options.server)
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    print(msgspec.json.encode(result).decode())
    return 0 if not result.lost and not result.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
