"""A viewer's one connection, spliced to a display whose connections come and go. Pure: bytes in, bytes out.

              viewer                       splice                          display
                |  ServerInit of the first   |                                |
                |<---------------------------|<------- handshake ------------>|
                |  whole messages            |        (moves: gone)           X
                |<---------------------------|<------- handshake ------------>| the next VMM
                |                            |  same pixel format, encodings; whole picture asked for;
                |                            |  keys that are held pressed again; what was typed meanwhile

The viewer gets whole messages alone, so that a connection that ends in the middle of one leaves nothing half
said. One connection to a display has one pixel format from its first request on: when the viewer wants
another one, `stale` asks for a new connection. `ended` says why the viewer cannot be served any more.
"""

from nahtlos.model.errors import Refused
from nahtlos.ops import rfb
from nahtlos.ops.rfb_handshakes import WithServer

WAITING_BYTES = 4096
"""Of keys and texts that wait for a display."""


class Splice:
    def __init__(self) -> None:
        self.to_viewer = bytearray()
        self.to_display = bytearray()
        self.stale = False
        """The connection to the display is to be replaced."""
        self.ended = ""
        self._viewer = bytearray()
        self._handshake: WithServer | None = None
        self._messages: rfb.ServerMessages | None = None
        """None while there is no display that is ready."""
        self._format = b""
        self._size = (0, 0)
        """As the viewer knows it."""
        self._encodings: tuple[int, ...] | None = None
        self._asked = False
        """The viewer waits for an update."""
        self._whole = False
        """What it sees is older than the display's connection: all of it is to be asked for."""
        self._fresh = False
        """Nothing was asked for on this connection yet."""
        self._grown = False
        """The viewer does not know the size yet."""
        self._pressed: dict[bytes, bytes] = {}
        self._waiting: list[bytes] = []
        self._pointer = b""

    @property
    def ready(self) -> bool:
        return self._messages is not None

    # --- the display ---

    def display_opened(self) -> None:
        self._handshake, self._messages = WithServer(), None
        self.to_display.clear()
        self.stale = False

    def display_lost(self) -> None:
        self._handshake = self._messages = None
        self.to_display.clear()
        self.stale = False

    def from_display(self, data: bytes) -> None:
        """Refused if it does not speak RFB, or says what it was not asked for."""
        if self._handshake is not None:
            self.to_display += self._handshake.feed(data)
            if self._handshake.init is None:
                return
            init, data = self._handshake.init, self._handshake.rest
            self._handshake = None
            self._begin(init)
        if self._messages is not None:
            for message in self._messages.feed(data):
                self._pass_on(message)

    def _begin(self, init: rfb.Init) -> None:
        first = not self._format
        if first:
            self._format, self._size = init.format, (init.width, init.height)
            self.to_viewer += init.encoded()
        self._messages = rfb.ServerMessages(rfb.pixel_bytes(self._format))
        if (init.width, init.height) != self._size:
            self._resize(init.width, init.height)
        self.to_display += rfb.set_pixel_format(self._format)
        if self._encodings is not None:
            self.to_display += rfb.set_encodings(self._encodings)
        self._fresh, self._whole = True, not first
        if self._asked:
            self._ask_whole()
        for key in self._pressed.values():
            self.to_display += key
        for message in self._waiting:
            self._pass_key(message)
        self.to_display += self._pointer
        self._waiting, self._pointer = [], b""

    def _resize(self, width: int, height: int) -> None:
        self._size = (width, height)
        if rfb.DESKTOP_SIZE not in (self._encodings or ()):
            self.ended = f"the picture is {width}x{height} now, which this viewer does not understand"
        elif self._asked:
            self.to_viewer += rfb.resized(width, height)
            self._asked = False
        else:
            self._grown = True

    def _pass_on(self, message: rfb.Message) -> None:
        self.to_viewer += message.data
        self._asked = self._asked and not message.paints
        self._size = message.size or self._size

    # --- the viewer ---

    def from_viewer(self, data: bytes) -> None:
        """Refused for what is no RFB."""
        self._viewer += data
        while (length := rfb.client_message(self._viewer)) is not None and length <= len(self._viewer):
            message = bytes(self._viewer[:length])
            del self._viewer[:length]
            self._take(message)

    def _take(self, message: bytes) -> None:
        match message[0]:
            case rfb.SET_PIXEL_FORMAT:
                self._set_format(message[4:20])
            case rfb.SET_ENCODINGS:
                wanted = tuple(e for e in rfb.encodings_of(message) if e in rfb.ENCODINGS)
                self._encodings = wanted
                self._say(rfb.set_encodings(wanted))
            case rfb.UPDATE_REQUEST:
                self._ask(message)
            case rfb.POINTER:
                if not self._say(message):
                    self._pointer = message
            case _:
                if self.ready:
                    self._pass_key(message)
                elif sum(map(len, self._waiting)) + len(message) <= WAITING_BYTES:
                    self._waiting.append(message)

    def _say(self, message: bytes) -> bool:
        if self.ready:
            self.to_display += message
        return self.ready

    def _set_format(self, wanted: bytes) -> None:
        if wanted == self._format:
            return
        if wanted[0] not in (8, 16, 32):
            raise Refused(f"pixels of {wanted[0]} bits", field="viewer", remedy="8, 16 or 32 bits")
        self._format = wanted
        if self._messages is None:
            return
        if self._fresh:
            self._messages = rfb.ServerMessages(rfb.pixel_bytes(wanted))
            self.to_display += rfb.set_pixel_format(wanted)
        else:
            self.stale = True

    def _ask(self, message: bytes) -> None:
        if self._grown:
            self._grown = False
            self.to_viewer += rfb.resized(*self._size)
            return
        self._asked = True
        if not self.ready or self.stale:
            return
        if self._whole:
            self._ask_whole()
        else:
            self._fresh = False
            self.to_display += message

    def _ask_whole(self) -> None:
        self._whole = self._fresh = False
        self.to_display += rfb.update_request(*self._size, incremental=False)

    def _pass_key(self, message: bytes) -> None:
        """A key that is held when the display changes is to be held there, too: what is not pressed there
        could not be let go."""
        self.to_display += message
        if message[0] == rfb.KEY:
            down, key = message[1], message[4:8]
        elif message[0] == rfb.EXTENDED:
            down, key = message[3], message[4:12]
        else:
            return
        if down:
            self._pressed[key] = message
        else:
            self._pressed.pop(key, None)
