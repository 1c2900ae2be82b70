"""How a long build tells what it does: values for a progress bar, no drawing."""

from collections.abc import Callable

from nahtlos.model.values import Value


class Progress(Value, frozen=True, kw_only=True):
    """`done` of `total` in `unit`; a total of 0 means that it is not known (yet)."""

    step: str
    """e.g. `index`, `download`, `unpack`, `select`, `hash`, `ask`, `done`"""
    text: str
    done: int = 0
    total: int = 0
    unit: str = "steps"


OnProgress = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """For callers who do not want to know."""
