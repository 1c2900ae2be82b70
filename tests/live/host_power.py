"""A lab's host loses its power and gets it back: all its processes end at once, and its supervisor, which is
started as at a boot, starts the agent again. Its disk is what was written to it."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from nahtlos.lab.cleanup import processes_of
from nahtlos.lab.paths import LAB_VARIABLE, LabPaths
from nahtlos.lab.topology import NAMESPACES, namespace_of
from nahtlos.physical.supervisor.launch import launch_supervisor


def processes(lab: str, host: str) -> list[int]:
    space = (NAMESPACES / namespace_of(lab, host)).stat().st_ino
    found: list[int] = []
    for process in processes_of(lab):
        with suppress(OSError):  # it has ended
            if Path(f"/proc/{process.pid}/ns/net").stat().st_ino == space:
                found.append(process.pid)
    return found


def power_off(lab: str, host: str) -> None:
    while running := processes(lab, host):
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def power_on(lab: str, host: str) -> None:
    paths = LabPaths(lab).node(host)
    launch_supervisor(
        paths.supervisor,
        paths.state / "supervisor",
        namespace=namespace_of(lab, host),
        environment={LAB_VARIABLE: lab},
    )
