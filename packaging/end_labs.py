"""Ends the labs of this checkout, for `make clean`: running ones and what is left of others.

A lab some other checkout runs on the same machine is left alone: one of its processes was started from
there, none from here.
"""

import sys
from pathlib import Path

from nahtlos.lab.cleanup import ROOTS, cleanup, lab_is_running, processes_of
from nahtlos.model.errors import Error

CHECKOUT = Path(__file__).resolve().parents[1]


def labs() -> list[str]:
    """Names under which anything lies on this machine."""
    found = {path.name for path in (*ROOTS.run.glob("*"), *ROOTS.state.glob("*")) if path.is_dir()}
    found |= {path.name.removeprefix("nahtlos-") for path in ROOTS.ram.glob("nahtlos-*") if path.is_dir()}
    return sorted(found)


def ours(lab: str) -> bool:
    """Nobody's leftovers count as ours; a running lab only if it was started from this checkout."""
    commands = [process.command for process in processes_of(lab)]
    if not commands:
        return not lab_is_running(lab)
    return any(f"{CHECKOUT}/" in command for command in commands)


def main() -> int:
    survivors: list[str] = []
    for lab in labs():
        try:
            if ours(lab):
                survivors += cleanup(lab).left
                print(f"ended lab {lab}")
        except Error as error:
            print(f"{lab}: {error}", file=sys.stderr)
    for survivor in survivors:
        print(f"could not be removed: {survivor}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
