"""Runs the outside tools releases are built with, each with a deadline.

A tool that is missing, fails or does not end in time becomes an error of `model.errors` that quotes its last
words. Never a shell: arguments are passed as they are.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nahtlos.model.errors import Refused, Unavailable

QUOTED = 600
"""How many of a tool's last characters are worth repeating in an error."""


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    while_running: Callable[[], None] | None = None,
) -> str:
    """Standard output of a tool that ended with 0 within `timeout` seconds.

    `while_running` is called about every 0.2 s, for progress. Raises Refused if the tool is missing,
    Unavailable if it fails or takes too long."""
    words = [str(word) for word in argv]
    if shutil.which(words[0]) is None:
        raise Refused(f"{words[0]} is not installed", field="packages", remedy="run `make setup`")
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        cwd=cwd,
    )
    deadline = time.monotonic() + timeout
    try:
        output, complaints = _wait(process, stdin, deadline, while_running)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{_name(words)} did not end within {timeout:g} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode != 0:
        said = (complaints or output).decode(errors="replace").strip()[-QUOTED:]
        raise Unavailable(f"{_name(words)} failed with {process.returncode}: {said}")
    return output.decode(errors="replace")


def _wait(
    process: "subprocess.Popen[bytes]",
    stdin: bytes | None,
    deadline: float,
    while_running: Callable[[], None] | None,
) -> tuple[bytes, bytes]:
    """`communicate` in short turns; it may be called again after a timeout without losing output."""
    while True:
        left = deadline - time.monotonic()
        turn = min(left, 0.2) if while_running else left
        try:
            return process.communicate(stdin, timeout=max(turn, 0.01))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
        if while_running:
            while_running()


def _name(words: list[str]) -> str:
    """The tool, and its first argument that is no option: `apt-get update`."""
    verbs = [word for word in words[1:] if not word.startswith("-")]
    return " ".join([Path(words[0]).name, *verbs[:1]])
