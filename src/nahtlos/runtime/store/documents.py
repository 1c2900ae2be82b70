"""Values as JSON text in a row, and back."""

from typing import TypeVar

import msgspec

T = TypeVar("T")

_encoder = msgspec.json.Encoder(order="deterministic")


def text_of(value: object) -> str:
    return _encoder.encode(value).decode()


def value_of(text: str, kind: type[T]) -> T:
    return msgspec.json.decode(text, type=kind)
