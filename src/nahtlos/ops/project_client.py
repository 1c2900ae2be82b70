"""The operator API of projects as a typed client: the same methods as `Projects` of `runtime.controllers`.
Sending is `ops.client`'s."""

from nahtlos.model.ids import ProjectId
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.projects import ProjectChange, ProjectView


class ProjectClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def projects(self) -> tuple[ProjectView, ...]:
        return await self._ask("GET", ("projects",), None, tuple[ProjectView, ...])

    async def project(self, project: ProjectId) -> ProjectView:
        return await self._ask("GET", ("projects", project), None, ProjectView)

    async def change_project(self, project: ProjectId, change: ProjectChange) -> ProjectView:
        return await self._ask("PATCH", ("projects", project), change, ProjectView)
