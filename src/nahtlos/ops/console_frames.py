"""What travels over the WebSocket of a serial console: JSON objects, one per message, bytes in base64.

    GET /v1/servers/SERVER/console/stream?history=H&offset=N&write=1&force=0&session=S

    server -> client   output (what the server says)   mode (whether this session may type)
                       typed (an input was taken, or why not)   failed (the last message)
    client -> server   input

A client that was cut off comes back with the history and offset of what it has shown, and is sent what
follows. It sends one input at a time and waits for `typed`: of an input that was not answered nobody knows
whether it was typed, so it is not sent again.
"""

import msgspec

from nahtlos.model.errors import ErrorRecord


class Output(msgspec.Struct, frozen=True, kw_only=True, tag="output"):
    history: str
    offset: int
    """Of the first byte of `data`, counted over all moves."""
    data: bytes
    dropped: int | None = 0
    """Bytes before it that were said and cannot be shown; None: nobody knows how many."""


class Mode(msgspec.Struct, frozen=True, kw_only=True, tag="mode"):
    writer: bool


class Typed(msgspec.Struct, frozen=True, kw_only=True, tag="typed"):
    number: int
    error: ErrorRecord | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    error: ErrorRecord


class Input(msgspec.Struct, frozen=True, kw_only=True, tag="input"):
    number: int
    data: bytes


FromServer = Output | Mode | Typed | Failed

encode = msgspec.json.Encoder().encode
decode_from_server = msgspec.json.Decoder(FromServer).decode
decode_input = msgspec.json.Decoder(Input).decode

INPUT_BYTES = 4096
"""Of one input at most."""
REFUSED, AGAIN = 4000, 1013
"""Codes with which the server closes: told why, do not come back so; come back."""
