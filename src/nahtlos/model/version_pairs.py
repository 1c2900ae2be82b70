"""Which hypervisor may hand a running server to which, and how: a table of what was proven and what was not.

Data, with a source for every row. The planner obeys it; plans and `doctor` name the row that decides. The
first row that fits wins, so exceptions stand before rules.
"""

from enum import StrEnum

from nahtlos.model.nouns import Component
from nahtlos.model.values import Value


class Way(StrEnum):
    MOVE = "move"
    """To another host, by pre-copy."""
    IN_PLACE = "in-place"
    """On its host, the memory being shared."""


class Verdict(StrEnum):
    PROVEN = "proven"
    UNTESTED = "untested"
    """Allowed: its makers support it and nothing is known against it, but nobody has counted here."""
    REFUSED = "refused"


class Pair(Value, frozen=True, kw_only=True):
    """`*` fits everything; a version fits those that begin with it."""

    component: Component = Component.HYPERVISOR
    way: Way
    old: str
    new: str
    accelerator: str
    verdict: Verdict
    why: str
    source: str

    def fits(self, way: Way, old: str, new: str, accelerator: str) -> bool:
        return (
            self.way is way
            and _fits(self.old, old)
            and _fits(self.new, new)
            and self.accelerator in ("*", accelerator)
        )

    def __str__(self) -> str:
        return (
            f"{self.component} {self.old} to {self.new}, {self.way}, {self.accelerator}: {self.verdict}, "
            f"{self.why} ({self.source})"
        )


CORRUPTS = "a live copy of an emulated guest misses pages it writes: 16 of 16 guests died within a second"
COUNTED = "no packet lost, memory and disk verified"

PAIRS = (
    Pair(
        way=Way.MOVE,
        old="7.2",
        new="*",
        accelerator="tcg",
        verdict=Verdict.REFUSED,
        why=CORRUPTS,
        source="docs/version-pairs.md",
    ),
    Pair(
        way=Way.MOVE,
        old="7.2",
        new="*",
        accelerator="kvm",
        verdict=Verdict.REFUSED,
        why="it has no switchover-ack: nothing keeps it from switching over before its frames' path has",
        source="docs/decisions/0002-handover.md",
    ),
    Pair(
        way=Way.MOVE,
        old="*",
        new="7.2",
        accelerator="*",
        verdict=Verdict.REFUSED,
        why="a server could not leave it again by a move",
        source="docs/version-pairs.md",
    ),
    *(
        Pair(
            way=Way.MOVE,
            old=old,
            new=new,
            accelerator="tcg",
            verdict=Verdict.PROVEN,
            why=COUNTED,
            source="benchmarks/moves.py",
        )
        for old in ("10.0", "11.1")
        for new in ("10.0", "11.1")
    ),
    *(
        Pair(
            way=Way.IN_PLACE,
            old=old,
            new=new,
            accelerator="tcg",
            verdict=Verdict.PROVEN,
            why=COUNTED,
            source="tests/live/test_replacement.py",
        )
        for old in ("7.2", "10.0", "11.1")
        for new in ("7.2", "10.0", "11.1")
    ),
    *(
        Pair(
            way=way,
            old=old,
            new=new,
            accelerator="kvm",
            verdict=Verdict.UNTESTED,
            why="the same machine type and devices, and its makers support it",
            source="docs/version-pairs.md",
        )
        for way in Way
        for old in ("7.2", "10.0", "11.1")
        for new in ("7.2", "10.0", "11.1")
    ),
    *(
        Pair(
            way=way,
            old="*",
            new="*",
            accelerator="sim",
            verdict=Verdict.PROVEN,
            why="hypervisors of the simulated world know all of it",
            source="src/nahtlos/physical/sim/hypervisor.py",
        )
        for way in Way
    ),
)


PLUGGED_MEMORY = Pair(
    way=Way.MOVE,
    old="*",
    new="*",
    accelerator="tcg",
    verdict=Verdict.REFUSED,
    why="an emulating QEMU cannot copy memory that can be plugged while its server runs",
    source="docs/version-pairs.md",
)
"""Whatever the versions, for a server with places for memory."""


COPIES_SINCE = (10, 0)
"""From which version on an emulating QEMU copies the memory of a server that runs, to move it or to save it,
and misses nothing of what it writes. 7.2 misses some (`CORRUPTS`); those between were not tried."""
UNPLUGS_SINCE = (10, 2)
"""Before it, an emulating QEMU goes on telling a vCPU that is gone what becomes of memory, as its address
spaces were not destroyed: 7.2 ends, 10.0 hung in one of six replacements in place (docs/decisions/0030)."""


def numbers(version: str) -> tuple[int, ...]:
    """Of `10.0.2`; nothing of what is no version."""
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def pair_for(way: Way, old: str, new: str, accelerator: str) -> Pair:
    """The row that decides. Versions are of releases, e.g. `10.0.2`; `accelerator` as a host's probe chose
    it. What no row knows is refused by one that says so."""
    for pair in PAIRS:
        if pair.fits(way, old, new, accelerator):
            return pair
    return Pair(
        way=way,
        old=old,
        new=new,
        accelerator=accelerator,
        verdict=Verdict.REFUSED,
        why="nobody has tried it",
        source="no row of the table",
    )


def allowed(way: Way, old: str, new: str, accelerator: str) -> bool:
    return pair_for(way, old, new, accelerator).verdict is not Verdict.REFUSED


def moves(version: str) -> bool:
    """Whether servers may be moved among hosts of this version, under emulation, which every host can do."""
    return allowed(Way.MOVE, version, version, "tcg")


def _fits(pattern: str, version: str) -> bool:
    return pattern == "*" or version == pattern or version.startswith(f"{pattern}.")
