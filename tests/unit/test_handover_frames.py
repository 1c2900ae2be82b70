"""Frames that change hands in a move: what is read back from a page, and to whom a returned frame goes."""

import os
import struct
from pathlib import Path

import pytest

from nahtlos.physical.network import packet
from nahtlos.physical.network.parking import PATTERN, READING, START, Parking, length_of

TARGET = bytes.fromhex("52540000000a")
OTHER = bytes.fromhex("525400000001")


def ipv4(payload: bytes) -> bytes:
    header = struct.pack("!BBH", 0x45, 0, 20 + len(payload)) + bytes(16)
    return TARGET + OTHER + b"\x08\x00" + header + payload


def ipv6(payload: bytes) -> bytes:
    header = struct.pack("!IH", 0x60000000, len(payload)) + bytes(34)
    return TARGET + OTHER + b"\x86\xdd" + header + payload


@pytest.mark.parametrize("header", [10, 12])
@pytest.mark.parametrize(
    "frame",
    [
        ipv4(b"words"),
        ipv4(bytes(30)),
        ipv4(PATTERN * 30),
        ipv6(bytes(8)),
        ipv6(PATTERN * 100),
        TARGET + OTHER + b"\x08\x06" + bytes(28),
    ],
)
def test_the_length_of_a_frame_that_was_not_noted(frame: bytes, header: int) -> None:
    page = bytes(header) + frame + PATTERN * 5000
    assert length_of(page, header) == header + len(frame)


def test_an_untouched_page_holds_nothing() -> None:
    assert length_of(PATTERN * 5000, 10) == 0


def test_a_frame_is_found_by_the_next_process_until_it_is_passed_on(tmp_path: Path) -> None:
    """A pipe stands for the ring: what is read from it is gone from it."""
    ring, guest = os.pipe()
    os.set_blocking(ring, False)
    path = tmp_path / "tap.frame"
    frame = bytes(10) + ipv4(b"one")
    os.write(guest, frame)
    first = Parking(path)
    held = first.frames(ring)
    assert bytes(next(held)) == frame
    # Here the process is killed; its successor opens the same page.
    with Parking(path) as second:
        assert [bytes(f) for f in second.left_behind(10)] == [frame]
        assert list(second.frames(ring)) == []
    assert not path.exists()
    with Parking(path) as third:
        assert list(third.left_behind(10)) == []
    os.close(ring)
    os.close(guest)


def test_a_frame_whose_length_was_not_noted_is_found(tmp_path: Path) -> None:
    path, frame = tmp_path / "tap.frame", bytes(10) + ipv4(b"one")
    path.write_bytes(struct.pack("I", READING).ljust(START, b"\0") + frame + PATTERN * 131072)
    with Parking(path) as parking:
        assert [bytes(f) for f in parking.left_behind(10)] == [frame]


@pytest.mark.parametrize(
    ("to", "returned_to"), [(TARGET, TARGET), (b"\xff" * 6, TARGET), (bytes.fromhex("3333000000fb"), TARGET)]
)
def test_a_flooded_frame_is_returned_to_one_port_alone(to: bytes, returned_to: bytes) -> None:
    frame = to + ipv4(b"words")[6:]
    parts = packet.addressed(memoryview(bytes(10)), memoryview(frame), TARGET)
    assert b"".join(parts) == bytes(10) + returned_to + frame[6:]
