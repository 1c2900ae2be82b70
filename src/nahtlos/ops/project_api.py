"""The operator API of projects: paths over `runtime.controllers.projects.Projects`. How bodies are read and
answers written it is given; errors, callers and logging are `ops.api`'s."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import ProjectId
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.projects import ProjectChange, Projects


def project_routes(routes: APIRouter, of: Callable[[], Projects], body: Body, answer: Answer) -> None:
    """Adds them to `routes`. `of` gives the projects at the time of a call."""

    @routes.get("/projects")
    async def projects() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().projects())

    @routes.get("/projects/{project}")
    async def project(project: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().project(ProjectId(project)))

    @routes.patch("/projects/{project}")
    async def change(project: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await body(request, ProjectChange)
        return answer(await of().change_project(ProjectId(project), asked))
