"""What the runtime offers to operators of where servers are to be: server groups and the reserve.

As in `cloud`: every method answers at once from the store or writes intent and returns.
"""

from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.blueprint import DrainForecast
from nahtlos.model.ids import HostId, ProjectId, ServerGroupId, ServerId
from nahtlos.model.networking import DEFAULT_PROJECT
from nahtlos.model.placement import GroupPolicy, MoveLimits, ReserveReport
from nahtlos.model.values import Value


class ServerGroupRequest(Value, frozen=True, kw_only=True):
    name: str
    policy: GroupPolicy
    project: ProjectId = DEFAULT_PROJECT


class ServerGroupView(Value, frozen=True, kw_only=True):
    id: ServerGroupId
    project: ProjectId
    policy: GroupPolicy
    members: dict[ServerId, HostId | None] = {}
    """Where each is, or is to be; None: not placed yet."""
    violation: str = ""
    """How members are not as the policy says, in words. Of a hard one: while a group goes to another host, or
    since the world has put them so."""


class MoveLimitsChange(Value, frozen=True, kw_only=True):
    """What is left out stays as it is."""

    at_once: int | UnsetType = UNSET
    per_host: int | UnsetType = UNSET


class Placement(Protocol):
    async def server_groups(self) -> tuple[ServerGroupView, ...]: ...
    async def server_group(self, group: ServerGroupId) -> ServerGroupView: ...
    async def create_server_group(self, request: ServerGroupRequest) -> ServerGroupView: ...
    async def delete_server_group(self, group: ServerGroupId) -> ServerGroupView:
        """Conflict while servers are in it."""
        ...

    async def plan_drain(self, host: HostId) -> DrainForecast:
        """What a drain of `host` would do. Changes nothing."""
        ...

    async def reserve(self) -> ReserveReport: ...
    async def set_reserve(self, hosts: int) -> ReserveReport:
        """Conflict, with figures, if it could not be kept as the cloud is."""
        ...

    async def move_limits(self) -> MoveLimits: ...
    async def limit_moves(self, change: MoveLimitsChange) -> MoveLimits:
        """Moves that run already go on."""
        ...
