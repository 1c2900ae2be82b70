"""What this driver last made true, so that drift can be told from a change of configuration.

Owns one JSON file in the host's run directory (gone after a restart of the host, like the devices it is
about), and beside it a list of what verbs have changed since it was written, because a verb must not wait
for all that is known to be written again. Losing them costs words in a report and nothing else.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nahtlos.physical.network.items import Item


class Applied(msgspec.Struct):
    items: set[str] = set()
    """Items in words."""
    touched: set[str] = set()
    """MACs and devices whose entries were changed by a move or a port's creation since then."""
    gates: set[tuple[int, str, str]] = set()
    """VNI, MAC and port of gates that are on: restored if the filter is lost in the middle of a move."""
    rules: str = ""
    """Digest of the packet filter as composed."""
    listed: str = ""
    """Fingerprint of what the kernel listed after that."""
    dropped: dict[str, int] = {}
    """By port: frames that its ring had no room for, as last told."""
    notes: list[str] = []
    """What happened to frames in moves that the next reconcile is to say."""


class Baseline:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._applied: Applied | None = None
        self._written = b""
        self._recorded: frozenset[Item] | None = None

    @property
    def applied(self) -> Applied:
        if self._applied is None:
            self._applied = self._read()
        return self._applied

    def _read(self) -> Applied:
        try:
            self._written = self._path.read_bytes()
            applied = msgspec.json.decode(self._written, type=Applied)
        except (OSError, msgspec.DecodeError):
            applied = Applied()
        with contextlib.suppress(OSError):
            applied.touched |= set(self._touched_path.read_text().split())
        return applied

    @property
    def _touched_path(self) -> Path:
        return self._path.with_suffix(".touched")

    def touch(self, names: Iterable[str]) -> None:
        """These differ from now on because a verb changed them."""
        new = set(names) - self.applied.touched
        if new:
            self.applied.touched |= new
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._touched_path.open("a") as file:
                file.write("".join(f"{name}\n" for name in sorted(new)))

    def record(self, wanted: frozenset[Item]) -> None:
        """All of this has been made true."""
        if self._recorded is None:
            self.applied.items = {str(item) for item in wanted}
        else:
            self.applied.items -= {str(item) for item in self._recorded - wanted}
            self.applied.items |= {str(item) for item in wanted - self._recorded}
        self._recorded = wanted

    def note(self, text: str) -> None:
        self.applied.notes.append(text)
        self.save()

    def take_notes(self) -> list[str]:
        """Each is said once; the next `save` makes that last."""
        notes, self.applied.notes = self.applied.notes, []
        return notes

    def save(self) -> None:
        data = msgspec.json.encode(self.applied, order="deterministic")
        if data != self._written:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_bytes(data)
            new.replace(self._path)
            self._written = data
        self._touched_path.unlink(missing_ok=True)
