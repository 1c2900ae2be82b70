"""Which waits have lasted long enough to be told, once each. Knows no clock; is given the time."""

from collections.abc import Iterable

from nahtlos.model.blueprint import Waiting

LASTING_SECONDS = 10.0


class LastingWaits:
    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}
        self._told: set[tuple[str, str]] = set()

    def lasting(self, waiting: Iterable[Waiting], now: float) -> list[Waiting]:
        """Those of `waiting` that have lasted and were not told yet. What no longer waits is forgotten."""
        current = {(w.subject, w.kind.value): w for w in waiting}
        self._since = {key: self._since.get(key, now) for key in current}
        self._told &= current.keys()
        due = [key for key in current if key not in self._told and now - self._since[key] >= LASTING_SECONDS]
        self._told.update(due)
        return [current[key] for key in due]
