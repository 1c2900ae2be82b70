"""What is said in RFB (RFC 6143), as far as needed to know where a message ends. Pure.

Only encodings without memory are understood: Raw, CopyRect, Hextile, and pseudo-encodings. Those with a
compressor behind them (ZRLE, Tight, Zlib) go on from what was sent before, and cannot be taken up by another
VMM in the middle.
"""

import struct
from typing import NamedTuple

from nahtlos.model.errors import Refused

VERSION = b"RFB 003.008\n"
NONE, VNC_AUTHENTICATION = 1, 2

SET_PIXEL_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, KEY, POINTER, CUT_TEXT, EXTENDED = 0, 2, 3, 4, 5, 6, 255
FRAMEBUFFER_UPDATE, COLOUR_MAP, BELL, SERVER_CUT_TEXT = 0, 1, 2, 3

RAW, COPY_RECT, HEXTILE = 0, 1, 5
DESKTOP_SIZE, CURSOR, EXTENDED_KEYS = -223, -239, -258
ENCODINGS = (RAW, COPY_RECT, HEXTILE, DESKTOP_SIZE, CURSOR, EXTENDED_KEYS)
TILE = 16
LONGEST = 64 << 20
"""Bytes of a message at most."""

_FIXED = {SET_PIXEL_FORMAT: 20, UPDATE_REQUEST: 10, KEY: 8, POINTER: 6}


class Init(NamedTuple):
    """ServerInit."""

    width: int
    height: int
    format: bytes
    """PIXEL_FORMAT, 16 bytes."""
    name: bytes

    def encoded(self) -> bytes:
        head = struct.pack(">HH", self.width, self.height) + self.format
        return head + struct.pack(">I", len(self.name)) + self.name


def pixel_bytes(pixel_format: bytes) -> int:
    return pixel_format[0] // 8


def init_of(data: bytes | bytearray) -> tuple[Init, int] | None:
    """ServerInit and its length; None if it is not all there."""
    if len(data) < 24:
        return None
    length = struct.unpack_from(">I", data, 20)[0]
    if length > LONGEST or len(data) < 24 + length:
        return None
    width, height = struct.unpack_from(">HH", data)
    return Init(width, height, bytes(data[4:20]), bytes(data[24 : 24 + length])), 24 + length


def client_message(data: bytes | bytearray) -> int | None:
    """Length of the message a viewer has begun `data` with; None if it is not known yet. Refused for one
    that nobody offered to understand."""
    if not data:
        return None
    kind = data[0]
    if kind in _FIXED:
        return _FIXED[kind]
    if kind == SET_ENCODINGS:
        return 4 + 4 * struct.unpack_from(">H", data, 2)[0] if len(data) >= 4 else None
    if kind == CUT_TEXT:
        return 8 + _bounded(abs(struct.unpack_from(">i", data, 4)[0])) if len(data) >= 8 else None
    if kind == EXTENDED:
        if len(data) < 2:
            return None
        if data[1] == 0:
            return 12
    raise Refused(f"message {kind} of the viewer is not understood", field="viewer", remedy="use another one")


def encodings_of(message: bytes) -> tuple[int, ...]:
    count = struct.unpack_from(">H", message, 2)[0]
    return struct.unpack_from(f">{count}i", message, 4)


def set_encodings(encodings: tuple[int, ...]) -> bytes:
    return struct.pack(f">BxH{len(encodings)}i", SET_ENCODINGS, len(encodings), *encodings)


def set_pixel_format(pixel_format: bytes) -> bytes:
    return struct.pack(">B3x", SET_PIXEL_FORMAT) + pixel_format


def update_request(width: int, height: int, *, incremental: bool) -> bytes:
    return struct.pack(">BBHHHH", UPDATE_REQUEST, incremental, 0, 0, width, height)


def resized(width: int, height: int) -> bytes:
    """An update that says so, and nothing else."""
    return struct.pack(">BxHHHHHi", FRAMEBUFFER_UPDATE, 1, 0, 0, width, height, DESKTOP_SIZE)


class Rectangle(NamedTuple):
    width: int
    height: int
    encoding: int


class Message(NamedTuple):
    data: bytes
    rectangles: tuple[Rectangle, ...] = ()

    @property
    def paints(self) -> bool:
        return any(each.encoding >= 0 for each in self.rectangles)

    @property
    def size(self) -> tuple[int, int] | None:
        """The new one, if it says so."""
        sizes = [(r.width, r.height) for r in self.rectangles if r.encoding == DESKTOP_SIZE]
        return sizes[-1] if sizes else None


class ServerMessages:
    """Cuts what a VMM sends into whole messages. Refused for what was not asked for."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        """Bytes of a pixel."""
        self._held = bytearray()
        self._at = 0
        """Where the rectangle begins that is not whole yet."""
        self._rectangles: list[Rectangle] = []

    def feed(self, data: bytes) -> list[Message]:
        self._held += data
        found: list[Message] = []
        while (message := self._next()) is not None:
            found.append(message)
        if len(self._held) > LONGEST:
            raise Refused(f"an update of more than {LONGEST} bytes", field="display")
        return found

    def _next(self) -> Message | None:
        if not self._held:
            return None
        match self._held[0]:
            case kind if kind == FRAMEBUFFER_UPDATE:
                return self._update()
            case kind if kind == BELL:
                return self._cut(1)
            case kind if kind == COLOUR_MAP and len(self._held) >= 6:
                return self._cut(6 + 6 * struct.unpack_from(">H", self._held, 4)[0])
            case kind if kind == SERVER_CUT_TEXT and len(self._held) >= 8:
                return self._cut(8 + _bounded(abs(struct.unpack_from(">i", self._held, 4)[0])))
            case kind if kind in (COLOUR_MAP, SERVER_CUT_TEXT):
                return None
            case kind:
                raise Refused(f"message {kind} of the display is not understood", field="display")

    def _cut(self, length: int) -> Message | None:
        if len(self._held) < length:
            return None
        message = Message(bytes(self._held[:length]), tuple(self._rectangles))
        del self._held[:length]
        self._at, self._rectangles = 0, []
        return message

    def _update(self) -> Message | None:
        if len(self._held) < 4:
            return None
        count = struct.unpack_from(">H", self._held, 2)[0]
        self._at = max(self._at, 4)
        while len(self._rectangles) < count:
            if len(self._held) < self._at + 12:
                return None
            width, height, encoding = struct.unpack_from(">HHi", self._held, self._at + 4)
            end = self._end(self._at + 12, Rectangle(width, height, encoding))
            if end is None or end > len(self._held):
                return None
            self._rectangles.append(Rectangle(width, height, encoding))
            self._at = end
        return self._cut(self._at)

    def _end(self, begin: int, rectangle: Rectangle) -> int | None:
        width, height, encoding = rectangle
        match encoding:
            case e if e == RAW:
                return begin + width * height * self._depth
            case e if e == COPY_RECT:
                return begin + 4
            case e if e == HEXTILE:
                return self._hextile(begin, width, height)
            case e if e in (DESKTOP_SIZE, EXTENDED_KEYS):
                return begin
            case e if e == CURSOR:
                return begin + width * height * self._depth + (width + 7) // 8 * height
            case _:
                raise Refused(f"encoding {encoding} was not asked for", field="display")

    def _hextile(self, at: int, width: int, height: int) -> int | None:
        held, depth, whole = self._held, self._depth, len(self._held)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                if at >= whole:
                    return None
                how = held[at]
                at += 1
                if how & 1:
                    at += min(TILE, width - left) * min(TILE, height - top) * depth
                    continue
                at += (depth if how & 2 else 0) + (depth if how & 4 else 0)
                if how & 8:
                    if at >= whole:
                        return None
                    at += 1 + held[at] * (2 + (depth if how & 16 else 0))
        return at


def _bounded(length: int) -> int:
    if length > LONGEST:
        raise Refused(f"a text of {length} bytes", field="viewer")
    return length
