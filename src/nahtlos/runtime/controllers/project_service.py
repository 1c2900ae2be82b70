"""`Projects` over the store: reads the state, checks the request, writes intent."""

from collections.abc import Callable

from nahtlos.model import project_limits
from nahtlos.model.ids import ProjectId
from nahtlos.runtime.controllers import project_requests
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.network_requests import checked_project
from nahtlos.runtime.controllers.projects import ProjectChange, ProjectView
from nahtlos.runtime.store import projects as rows

Said = Callable[[str, str, str], None]


class ProjectService:
    """`said`: what has been asked for, as an event."""

    def __init__(self, looks: Looks, *, said: Said) -> None:
        self._looks = looks
        self._said = said

    async def projects(self) -> tuple[ProjectView, ...]:
        state = (await self._looks.now()).state
        return tuple(
            project_requests.project_view(state, project)
            for project in project_requests.known_projects(state)
        )

    async def project(self, project: ProjectId) -> ProjectView:
        return project_requests.project_view((await self._looks.now()).state, project)

    async def change_project(self, project: ProjectId, change: ProjectChange) -> ProjectView:
        name = checked_project(project)
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            limits = project_requests.changed_limits(state, name, change)
            await rows.set_limits(tx, name, limits)
            state = await self._looks.state(tx)
        self._said("project.changed", name, f"what {name} may have in all has changed")
        if name not in project_requests.known_projects(state):
            return ProjectView(id=name, servers=0, limits=limits, used=project_limits.ProjectLimits())
        return project_requests.project_view(state, name)
