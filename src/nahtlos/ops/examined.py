"""What the doctor examines (`Machine`, which stands for the outside: files, tools, resources) and what it
says of it (`Finding`)."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from nahtlos.model.values import Value

MIB = 1 << 20
TRIAL_SECONDS = 10.0


class Level(StrEnum):
    REQUIRED = "required"
    """Without it the demo cannot run."""
    USEFUL = "useful"
    """Without it something is slower or less complete; the detail says what."""
    OPTIONAL = "optional"
    """Not used today; named because people ask."""


class Finding(Value, frozen=True, kw_only=True):
    name: str
    ok: bool
    level: Level
    detail: str
    remedy: str = ""


class Machine:
    """The outside, as the checks see it. Tests replace `root` and `trial`."""

    def __init__(self, root: Path = Path("/"), checkout: Path | None = None) -> None:
        self.root = root
        self.checkout = checkout or Path(__file__).resolve().parents[3]

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def text(self, path: str) -> str:
        """Content of a file; empty if it cannot be read."""
        try:
            return self.path(path).read_text(errors="replace")
        except OSError:
            return ""

    def is_root(self) -> bool:
        return os.geteuid() == 0

    def free_mib(self, path: Path) -> int:
        """Of the file system that holds `path`, or would."""
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free // MIB

    def total_mib(self, path: Path) -> int:
        """Of the file system that holds `path`, which exists."""
        return shutil.disk_usage(path).total // MIB

    def trial(self, argv: Sequence[str], stdin: str = "") -> str:
        """Empty if the command succeeds, else why not."""
        try:
            done = subprocess.run(
                argv, input=stdin, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
            )
        except FileNotFoundError:
            return f"{argv[0]} is not installed"
        except subprocess.TimeoutExpired:
            return f"{argv[0]} did not end within {TRIAL_SECONDS:g} s"
        except OSError as error:
            return f"{argv[0]}: {error.strerror}"
        if done.returncode == 0:
            return ""
        said = (done.stderr or done.stdout).strip().splitlines()
        return said[0] if said else f"{argv[0]} ended with {done.returncode}"

    def isolated(self, argv: Sequence[str], stdin: str = "") -> str:
        """`trial` in a network namespace of its own."""
        return self.trial(["unshare", "--net", *argv], stdin)


def required(name: str, ok: bool, detail: str, remedy: str) -> Finding:
    return Finding(name=name, ok=ok, level=Level.REQUIRED, detail=detail, remedy="" if ok else remedy)
