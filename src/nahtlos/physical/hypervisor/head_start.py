"""A head start for a guest in a process it never ran in: its vCPUs go before others for a moment.

Under emulation such a process translates the guest's code anew, on one thread, before the guest answers
anybody; what waits for a processor then is waited for by every client. The threads of vCPUs alone are put
forward, while they still have nothing to do, and put back once the guest has run for `SECONDS`. A control
group of its own decides instead where a VMM has one; an agent that may not do this does without.

Owns the nice values of vCPUs' threads; a process's other threads keep the one they were started with.
"""

import os
from contextlib import suppress
from pathlib import Path

AHEAD = -10
"""Nice: ten times the weight of another thread."""
SECONDS = 2.0
"""For so long it keeps meeting code of its guest that is not translated yet."""
VCPU_NAMES = ("CPU ", "ALL CPUs")
"""As QEMU names their threads (`debug-threads=on`), one each or one for all."""


def give(pid: int, proc: Path = Path("/proc")) -> None:
    _set(pid, AHEAD, proc)


def take_back(pid: int, proc: Path = Path("/proc")) -> None:
    """To what the process has; harmless if nothing was given."""
    with suppress(ProcessLookupError):
        _set(pid, os.getpriority(os.PRIO_PROCESS, pid), proc)


def _set(pid: int, nice: int, proc: Path) -> None:
    for thread in _vcpus(proc / str(pid) / "task"):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpriority(os.PRIO_PROCESS, thread) != nice:
                os.setpriority(os.PRIO_PROCESS, thread, nice)


def _vcpus(tasks: Path) -> list[int]:
    """None of a process that has ended."""
    found: list[int] = []
    with suppress(FileNotFoundError):
        for task in tasks.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                if (task / "comm").read_text(encoding="utf-8").startswith(VCPU_NAMES):
                    found.append(int(task.name))
    return found
