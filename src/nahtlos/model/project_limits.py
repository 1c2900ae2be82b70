"""What the servers of a project may have in all."""

from nahtlos.model.values import Value


class ProjectLimits(Value, frozen=True, kw_only=True):
    """On the sum of a project's servers. 0: no limit."""

    vcpus: int = 0
    memory_mib: int = 0
    iops: int = 0
    """Of the disks of its servers, as they are limited."""
    bytes_per_second: int = 0
    """As above."""
