"""What the figures were measured on. Owns reading it from the running system, never the judging."""

import os
import platform
import re
from pathlib import Path

from nahtlos.model.values import Value


class Machine(Value, frozen=True, kw_only=True):
    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    system: str
    accelerator: str
    """Under which guests ran: figures under `tcg` (emulation) and under `kvm` do not compare."""
    accelerator_reason: str = ""
    nahtlos: str = ""
    python: str = ""


def observe_machine(*, accelerator: str, reason: str = "", version: str = "") -> Machine:
    """This machine; what cannot be read is left empty."""
    return Machine(
        cpu=_field("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=int(_field("/proc/meminfo", r"MemTotal:\s*(\d+)") or 0) // 1024,
        kernel=platform.release(),
        system=_field("/etc/os-release", r'PRETTY_NAME="?([^"\n]+)'),
        accelerator=accelerator,
        accelerator_reason=reason,
        nahtlos=version,
        python=platform.python_version(),
    )


def _field(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return ""
    return found.group(1).strip() if found else ""
