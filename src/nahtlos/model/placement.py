"""Which servers are to be together and which apart, in OpenStack's words: server groups with a policy."""

from enum import StrEnum

from nahtlos.model.ids import HostId, ProjectId, ServerGroupId, ServerId
from nahtlos.model.networking import DEFAULT_PROJECT
from nahtlos.model.nouns import Size
from nahtlos.model.values import Value


class GroupPolicy(StrEnum):
    AFFINITY = "affinity"
    """All on one host. They leave it together, to one other host, or not at all."""
    ANTI_AFFINITY = "anti-affinity"
    """No two on one host, nor one on its way to the host of another."""
    SOFT_AFFINITY = "soft-affinity"
    SOFT_ANTI_AFFINITY = "soft-anti-affinity"
    """These two are preferred among hosts that would do, and never waited for."""

    @property
    def is_hard(self) -> bool:
        return self in (GroupPolicy.AFFINITY, GroupPolicy.ANTI_AFFINITY)

    @property
    def is_together(self) -> bool:
        return self in (GroupPolicy.AFFINITY, GroupPolicy.SOFT_AFFINITY)


class ServerGroup(Value, frozen=True, kw_only=True):
    """A server is in it from its creation until its end, and in no other."""

    id: ServerGroupId
    project: ProjectId = DEFAULT_PROJECT
    policy: GroupPolicy


class ReserveReport(Value, frozen=True, kw_only=True):
    """Whether the servers of any `hosts` hosts that fail together could be started on the others."""

    hosts: int
    of: int
    """Hosts there are, in service or with servers."""
    kept: bool
    lost: tuple[HostId, ...] = ()
    """Not kept: hosts that may not fail together."""
    left: tuple[ServerId, ...] = ()
    """Of theirs, some that could not be started then."""
    needs: Size = Size()
    """What the servers of `lost` take."""
    free: Size = Size()
    """On all others together."""
    pinned: tuple[ServerId, ...] = ()
    """For these nothing is kept: they could be started nowhere else."""


class MoveLimits(Value, frozen=True, kw_only=True):
    """How many moves may run beside each other. Of one host one at a time is switched, whatever runs."""

    at_once: int
    """In the whole cloud."""
    per_host: int
    """From one host; and, counted apart, to one host."""
    bytes_per_second: int
    """Of a host's link, for moves; 0: the link is not divided, and moves are only counted."""
    running: int
