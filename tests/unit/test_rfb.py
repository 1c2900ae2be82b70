"""RFB cut into messages, its two handshakes, and a viewer that keeps its connection over several displays."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.model.errors import Refused
from nahtlos.ops import rfb
from nahtlos.ops.rfb import Rectangle, ServerMessages, client_message
from nahtlos.ops.rfb_handshakes import WithServer, WithViewer, proof_of
from nahtlos.ops.rfb_splice import WAITING_BYTES, Splice

FORMAT_32 = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
FORMAT_16 = struct.pack(">BBBBHHHBBB3x", 16, 16, 0, 1, 31, 63, 31, 11, 5, 0)
CHALLENGE = bytes(range(16))
KEY_DOWN = struct.pack(">BBxxI", rfb.KEY, 1, 0xFFE3)
KEY_UP = struct.pack(">BBxxI", rfb.KEY, 0, 0xFFE3)
ENCODINGS = rfb.set_encodings((7, 16, rfb.HEXTILE, rfb.RAW, rfb.DESKTOP_SIZE, -260))
KEPT_ENCODINGS = rfb.set_encodings((rfb.HEXTILE, rfb.RAW, rfb.DESKTOP_SIZE))


def rectangle(width: int, height: int, encoding: int, payload: bytes) -> bytes:
    return struct.pack(">HHHHi", 0, 0, width, height, encoding) + payload


def update(*rectangles: bytes) -> bytes:
    return struct.pack(">BxH", 0, len(rectangles)) + b"".join(rectangles)


HEXTILES = (
    b"\x01" + bytes(16 * 16 * 4)  # raw
    + b"\x02" + bytes(4)  # a narrow tile: background alone
    + b"\x0e" + bytes(4) + bytes(4) + b"\x02" + bytes(2 * 2)  # two subrectangles of the foreground
    + b"\x18" + b"\x03" + bytes(3 * 6)  # three with colours of their own
)  # fmt: skip
SAID = [
    update(rectangle(3, 2, rfb.RAW, bytes(24))),
    update(),
    update(rectangle(8, 8, rfb.COPY_RECT, bytes(4)), rectangle(9, 2, rfb.CURSOR, bytes(9 * 2 * 4 + 2 * 2))),
    update(rectangle(20, 20, rfb.HEXTILE, HEXTILES), rectangle(0, 0, rfb.EXTENDED_KEYS, b"")),
    bytes((rfb.BELL,)),
    struct.pack(">BxHH", rfb.COLOUR_MAP, 0, 2) + bytes(12),
    struct.pack(">B3xi", rfb.SERVER_CUT_TEXT, 4) + b"text",
    rfb.resized(800, 600),
]


@given(st.lists(st.integers(min_value=1, max_value=700), min_size=1, max_size=12))
def test_what_a_display_says_is_cut_in_the_same_way_however_it_comes(sizes: list[int]) -> None:
    whole, messages, found, at = b"".join(SAID), ServerMessages(4), list[bytes](), 0
    while at < len(whole):
        for size in sizes:
            found += [message.data for message in messages.feed(whole[at : at + size])]
            at += size
    assert found == SAID


def test_messages_say_what_they_paint_and_how_large_it_is() -> None:
    found = ServerMessages(4).feed(b"".join(SAID))
    assert [m.paints for m in found] == [True, False, True, True, False, False, False, False]
    assert found[-1].size == (800, 600)
    assert found[3].rectangles[0] == Rectangle(20, 20, rfb.HEXTILE)


@pytest.mark.parametrize("said", [b"\x09", update(rectangle(1, 1, 16, b""))])
def test_what_was_not_asked_for_is_refused(said: bytes) -> None:
    with pytest.raises(Refused):
        ServerMessages(4).feed(said)


@pytest.mark.parametrize(
    ("message", "length"),
    [
        (b"", None),
        (b"\x00", 20),
        (b"\x02\x00\x00", None),
        (b"\x02\x00\x00\x03", 16),
        (rfb.update_request(1, 1, incremental=True), 10),
        (KEY_DOWN, 8),
        (b"\x05", 6),
        (b"\x06\0\0\0\0\0\0\x05", 13),
        (b"\xff\x00", 12),
    ],
)
def test_what_a_viewer_says_has_a_length(message: bytes, length: int | None) -> None:
    assert client_message(message) == length


@pytest.mark.parametrize("message", [b"\x96", b"\xff\x07", b"\x06\0\0\0\x7f\xff\xff\xff"])
def test_what_a_viewer_was_not_offered_is_refused(message: bytes) -> None:
    with pytest.raises(Refused):
        client_message(message)


# --- handshakes ---


def test_the_password_is_proven_as_the_protocol_has_it() -> None:
    """DES, the key's bits turned round: the first is the cipher's own test vector, the other OpenSSL's."""
    assert proof_of("", bytes(16)).hex() == "8ca64de9c1b123a7" * 2
    assert proof_of("password", CHALLENGE).hex() == "b866924125c8eebb9debc1db61c538e2"
    assert proof_of("secret12", CHALLENGE) == proof_of("secret12 and more", CHALLENGE)
    assert proof_of("secret12", CHALLENGE) != proof_of("secret13", CHALLENGE)


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        ((b"RFB 003.008\n", b"\x01", b"\x01"), [b"\x01\x01", b"\0\0\0\0", b""]),
        ((b"RFB 003.889\n", b"\x01", b"\x01"), [b"\x01\x01", b"\0\0\0\0", b""]),
        ((b"RFB 003.007\n", b"\x01", b"\x01"), [b"\x01\x01", b"", b""]),
        ((b"RFB 003.003\n", b"\x01"), [b"\0\0\0\x01", b""]),
    ],
)
def test_a_viewer_of_any_version_is_let_in_at_a_socket_of_its_own(
    said: tuple[bytes, ...], answers: list[bytes]
) -> None:
    handshake = WithViewer(None, CHALLENGE)
    assert [handshake.feed(part) for part in said] == answers
    assert handshake.done


@pytest.mark.parametrize(("version", "with_choice"), [(b"RFB 003.008\n", True), (b"RFB 003.003\n", False)])
def test_with_a_password_only_who_knows_it_is_let_in(version: bytes, with_choice: bool) -> None:
    for password, right in (("s3cret00", True), ("s3cret01", False)):
        handshake = WithViewer("s3cret00", CHALLENGE)
        asked = handshake.feed(version) + (handshake.feed(b"\x02") if with_choice else b"")
        assert asked.endswith(CHALLENGE)
        result = handshake.feed(proof_of(password, CHALLENGE))
        assert result[:4] == (b"\0\0\0\0" if right else b"\0\0\0\x01")
        handshake.feed(b"\x01")
        assert (handshake.done, handshake.refused) == (right, not right)


def test_what_is_no_viewer_is_refused() -> None:
    with pytest.raises(Refused):
        WithViewer(None, CHALLENGE).feed(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "said", [b"RFB 004.000\n", b"RFB 003.008\n\x01\x02", b"RFB 003.008\n\x01\x01\0\0\0\1"]
)
def test_a_display_that_is_none_of_ours_is_refused(said: bytes) -> None:
    with pytest.raises(Refused):
        WithServer().feed(said)


# --- the splice ---


def begin(width: int = 32, height: int = 16) -> bytes:
    init = rfb.Init(width, height, FORMAT_32, b"web")
    return b"RFB 003.008\n" + b"\x01\x01" + b"\0\0\0\0" + init.encoded()


def connected(splice: Splice, *, width: int = 32, height: int = 16) -> bytes:
    """A display comes; what it is told after the handshake."""
    splice.display_opened()
    splice.from_display(begin(width, height))
    told = bytes(splice.to_display)
    splice.to_display.clear()
    assert told.startswith(rfb.VERSION + b"\x01\x01")
    return told[len(rfb.VERSION) + 2 :]


def taken(buffer: bytearray) -> bytes:
    data = bytes(buffer)
    buffer.clear()
    return data


@pytest.fixture
def splice() -> Splice:
    """A viewer that has said what it wants and waits for its first update."""
    splice = Splice()
    assert connected(splice) == rfb.set_pixel_format(FORMAT_32)
    assert taken(splice.to_viewer) == rfb.Init(32, 16, FORMAT_32, b"web").encoded()
    splice.from_viewer(ENCODINGS + rfb.update_request(32, 16, incremental=False))
    assert taken(splice.to_display) == KEPT_ENCODINGS + rfb.update_request(32, 16, incremental=False)
    return splice


PICTURE = update(rectangle(32, 16, rfb.RAW, bytes(32 * 16 * 4)))
WHOLE = rfb.update_request(32, 16, incremental=False)


def test_half_an_update_of_a_display_that_goes_is_never_seen(splice: Splice) -> None:
    splice.from_display(PICTURE[:-1])
    assert taken(splice.to_viewer) == b""
    splice.display_lost()
    assert connected(splice) == rfb.set_pixel_format(FORMAT_32) + KEPT_ENCODINGS + WHOLE
    splice.from_display(PICTURE)
    assert taken(splice.to_viewer) == PICTURE


def test_a_viewer_that_waits_for_nothing_gets_the_whole_picture_when_it_asks(splice: Splice) -> None:
    splice.from_display(PICTURE)
    splice.display_lost()
    assert connected(splice) == rfb.set_pixel_format(FORMAT_32) + KEPT_ENCODINGS
    splice.from_viewer(rfb.update_request(32, 16, incremental=True))
    assert taken(splice.to_display) == WHOLE
    splice.from_viewer(rfb.update_request(32, 16, incremental=True))
    assert taken(splice.to_display) == rfb.update_request(32, 16, incremental=True)


def test_what_is_asked_for_while_there_is_no_display_is_asked_of_the_next(splice: Splice) -> None:
    splice.from_display(PICTURE)
    splice.display_lost()
    splice.from_viewer(rfb.update_request(32, 16, incremental=True))
    assert connected(splice).endswith(WHOLE)


def test_held_keys_are_held_at_the_next_display_and_let_go_there(splice: Splice) -> None:
    splice.from_viewer(KEY_DOWN)
    splice.display_lost()
    splice.from_viewer(KEY_UP)
    assert connected(splice).endswith(KEY_DOWN + KEY_UP)
    splice.display_lost()
    assert not connected(splice).endswith(KEY_UP)


def test_keys_typed_meanwhile_arrive_once_in_order_and_are_bounded(splice: Splice) -> None:
    splice.display_lost()
    pressed = b"".join(struct.pack(">BBxxI", rfb.KEY, down, 65 + n) for n in range(26) for down in (1, 0))
    pointers = [struct.pack(">BBHH", rfb.POINTER, 0, x, 1) for x in (1, 2)]
    splice.from_viewer(pressed + b"".join(pointers))
    assert connected(splice).endswith(pressed + pointers[-1])
    splice.display_lost()
    splice.from_viewer(KEY_DOWN * WAITING_BYTES)
    assert len(connected(splice)) < WAITING_BYTES + 200


def test_another_pixel_format_in_the_middle_takes_another_connection(splice: Splice) -> None:
    splice.from_viewer(rfb.set_pixel_format(FORMAT_32))
    assert not splice.stale
    splice.from_viewer(rfb.set_pixel_format(FORMAT_16))
    assert splice.stale
    splice.display_lost()
    assert connected(splice) == rfb.set_pixel_format(FORMAT_16) + KEPT_ENCODINGS + WHOLE
    picture = update(rectangle(32, 16, rfb.RAW, bytes(32 * 16 * 2)))
    splice.from_display(picture)
    assert taken(splice.to_viewer) == picture


def test_a_picture_of_another_size_is_told_to_a_viewer_that_understands_it(splice: Splice) -> None:
    splice.display_lost()
    connected(splice, width=64, height=48)
    assert taken(splice.to_viewer) == rfb.resized(64, 48)
    assert not splice.ended
    splice.from_viewer(rfb.update_request(64, 48, incremental=False))
    assert taken(splice.to_display) == rfb.update_request(64, 48, incremental=False)
    splice.from_viewer(rfb.set_encodings((rfb.RAW,)))
    splice.display_lost()
    connected(splice, width=32, height=16)
    assert "32x16" in splice.ended
