"""Sizes, rates and durations of volumes as people type them, read into values. Pure."""

import re

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId
from nahtlos.model.storage import DiskLimits, StorageBackend

_SIZE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?$", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIME = re.compile(r"^([0-9]+)\s*([smhd]?)$", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
MIB = 1 << 20
NONE = "none"
CEPH = "ceph"

LIMITS = (
    "iops",
    "iops_read",
    "iops_write",
    "bytes",
    "bytes_read",
    "bytes_write",
    "iops_burst",
    "bytes_burst",
    "burst_seconds",
)


def octets(text: str, field: str) -> int:
    """`10M`, `1.5G`, or bytes; `none` is 0."""
    if text.lower() == NONE:
        return 0
    match = _SIZE.match(text)
    if match is None:
        raise Refused(f"'{text}' is no amount", field=field, remedy="write it as 10M, 1.5G or none")
    return round(float(match.group(1)) * _UNITS[match.group(2).lower()])


def count(text: str, field: str) -> int:
    """A whole number; `none` is 0."""
    if text.lower() == NONE:
        return 0
    if not text.isdecimal():
        raise Refused(f"'{text}' is no whole number", field=field, remedy="write it as 500 or none")
    return int(text)


def mebibytes(text: str, field: str = "size_mib") -> int:
    """`10G`, `512M`; a plain number is MiB."""
    if text.isdecimal():
        return int(text)
    size = octets(text, field)
    if size % MIB:
        raise Refused(f"'{text}' is no whole number of MiB", field=field, remedy="write it as 512M or 10G")
    return size // MIB


def duration(text: str, field: str) -> int:
    """Seconds: `90`, `15m`, `1h`, `2d`."""
    match = _TIME.match(text)
    if match is None:
        raise Refused(f"'{text}' is no time", field=field, remedy="write it as 90s, 15m, 1h or 2d")
    return int(match.group(1)) * _SECONDS[match.group(2).lower()]


def limits(texts: list[str], before: DiskLimits | None = None) -> DiskLimits:
    """`iops=1000`, `bytes=50M`, …; each replaces what was there, `none` alone takes all away."""
    if texts == [NONE]:
        return DiskLimits()
    values = {name: getattr(before or DiskLimits(), name) for name in LIMITS}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in LIMITS:
            names = ", ".join(LIMITS)
            raise Refused(f"'{text}' is no limit", field="limit", remedy=f"write NAME=VALUE; names: {names}")
        values[name] = octets(value, "limit")
    return DiskLimits(**values)


def destination(text: str | None) -> tuple[HostId | None, StorageBackend | None]:
    """A host's name, or `ceph`."""
    if text is None:
        return None, None
    if text == CEPH:
        return None, StorageBackend.CEPH
    return HostId(text), StorageBackend.EMBEDDED
