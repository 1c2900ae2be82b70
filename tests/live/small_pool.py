"""A host whose volumes are on a pool of their own, which is soon full."""

import os
import subprocess
from pathlib import Path

from physical_host import Host

POOL_MIB = 96
LEFT_KIB = 512


def pool(host: Host) -> Path:
    return host.settings.state_dir / "volumes"


def with_small_pool(host: Host) -> None:
    """Before it has any volume. See `without_pool`."""
    pool(host).mkdir(parents=True)
    words = ("mount", "-t", "tmpfs", "-o", f"size={POOL_MIB}m", "tmpfs", str(pool(host)))
    subprocess.run(words, check=True, timeout=10)


def without_pool(host: Host) -> None:
    """Nothing to do if it had none."""
    subprocess.run(["umount", "-l", str(pool(host))], check=False, capture_output=True, timeout=10)


def fill(host: Host, left: int = LEFT_KIB << 10) -> Path:
    """Up to `left` bytes; the file that does it."""
    ballast = pool(host) / "ballast"
    free = os.statvfs(pool(host))
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)
    return ballast
