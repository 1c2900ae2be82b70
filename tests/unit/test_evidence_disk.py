"""The disk checker over made-up volumes: whole, torn, stale and foreign ones."""

import struct
import zlib
from pathlib import Path

import pytest

from nahtlos.lab.disk_check import BLOCK, HEADER, MAGIC, check_volume, main
from nahtlos.model.errors import Refused

START = 2048 * 512


def block(number: int) -> bytes:
    filler = bytes((number * 31 + i) & 255 for i in range(256)) * 16
    filler = filler[: BLOCK - HEADER.size]
    return HEADER.pack(MAGIC, number, 7, zlib.crc32(filler)) + filler


def volume(path: Path, blocks: list[bytes], room: int = 40) -> Path:
    sectors = room * BLOCK // 512
    entry = struct.pack("<B3sB3sII", 0, b"", 0xDA, b"", START // 512, sectors)
    first = struct.pack("<B3sB3sII", 0x80, b"", 0x0C, b"", 1, START // 512 - 1)
    mbr = bytes(446) + first + entry + bytes(32) + b"\x55\xaa"
    content = mbr.ljust(START, b"\0") + b"".join(blocks)
    path.write_bytes(content.ljust(START + room * BLOCK, b"\0"))
    return path


def test_every_acknowledged_block_is_found(tmp_path: Path) -> None:
    path = volume(tmp_path / "web-1.raw", [block(i) for i in range(1, 31)])
    result = check_volume(path, 25)
    assert (result.server, result.found, result.lost, result.wrong) == ("web-1", 25, 0, 0)
    assert result.first_bad is None


@pytest.mark.parametrize(
    ("bad", "lost", "wrong"),
    [
        (bytes(BLOCK), 1, 0),
        (block(9), 0, 1),
        (block(10)[:-1] + b"\xff", 0, 1),
        (b"another1" + block(10)[8:], 1, 0),
    ],
    ids=["never written", "of another number", "torn", "of somebody else"],
)
def test_one_bad_block_is_told(tmp_path: Path, bad: bytes, lost: int, wrong: int) -> None:
    blocks = [block(i) for i in range(1, 31)]
    blocks[9] = bad
    result = check_volume(volume(tmp_path / "v", blocks), 30)
    assert (result.found, result.lost, result.wrong, result.first_bad) == (29, lost, wrong, 10)


def test_a_volume_cut_short_has_lost_the_rest(tmp_path: Path) -> None:
    path = volume(tmp_path / "v", [block(i) for i in range(1, 31)])
    path.write_bytes(path.read_bytes()[: START + 20 * BLOCK])
    assert check_volume(path, 30).lost == 10
    assert check_volume(volume(tmp_path / "w", [block(1)], room=1), 3).lost == 2


def test_what_is_no_volume_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v").write_bytes(bytes(4096))
    with pytest.raises(Refused, match="no partition table"):
        check_volume(tmp_path / "v", 1)
    with pytest.raises(Refused, match="cannot be read"):
        check_volume(tmp_path / "missing", 1)
    assert main([str(tmp_path / "v"), "--acknowledged", "1"]) == 2
    assert "volume" in capsys.readouterr().err


def test_the_command_says_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = volume(tmp_path / "v", [block(1), block(2)])
    assert main([str(path), "--acknowledged", "2", "--server", "db-1"]) == 0
    assert '"found":2' in capsys.readouterr().out
    assert main([str(path), "--acknowledged", "3"]) == 1
