"""What the runtime offers to operators of projects: what each may have in all, and has.

As in `cloud`: every method answers at once from the store or writes intent and returns. A project is a name;
it exists as long as something is its own or it is limited. In a change, what is left out (UNSET) stays.
"""

from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.ids import ProjectId
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.model.values import Value


class ProjectChange(Value, frozen=True, kw_only=True):
    """0: no limit."""

    vcpus: int | UnsetType = UNSET
    memory_mib: int | UnsetType = UNSET
    iops: int | UnsetType = UNSET
    bytes_per_second: int | UnsetType = UNSET


class ProjectView(Value, frozen=True, kw_only=True):
    id: ProjectId
    servers: int
    limits: ProjectLimits
    used: ProjectLimits
    """The sums that the limits are on."""


class Projects(Protocol):
    async def projects(self) -> tuple[ProjectView, ...]: ...
    async def project(self, project: ProjectId) -> ProjectView: ...
    async def change_project(self, project: ProjectId, change: ProjectChange) -> ProjectView:
        """Conflict if the project has more already."""
        ...
