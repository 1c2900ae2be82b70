"""Waiting for operations that copy, with a bar: how much of how much, how fast, how long still.

Asks the cloud again and again, as `waiting` does; one that cannot be reached for a while is waited for. Ends
with Unavailable at the deadline; what was asked for stays asked for.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
)

from nahtlos.model.errors import Unavailable
from nahtlos.model.storage import Consistency
from nahtlos.ops.cli.command import Cli
from nahtlos.ops.cli.waiting import POLL_SECONDS
from nahtlos.runtime.controllers.volumes import TaskView

_T = TypeVar("_T")
Wait = Annotated[bool, typer.Option(help="Wait until it is done.")]
Deadline = Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)]
Consistent = Annotated[
    Consistency,
    typer.Option(
        help="filesystem: the guest freezes its file systems for it, or nothing is taken; preferred: where "
        "it can; crash: as after a power failure."
    ),
]
DEADLINE = 120.0
COPY_DEADLINE = 3600.0
MIB = 1 << 20


async def copied(
    cli: Cli,
    what: str,
    ask: Callable[[], Awaitable[_T]],
    done: Callable[[_T], bool],
    tasks: Callable[[_T], tuple[TaskView, ...]],
    waits: Callable[[_T], str],
    *,
    deadline: float,
) -> _T:
    """The first answer that is `done`. Meanwhile a bar for each of its operations that copies, and what it
    waits for."""
    began, last = time.monotonic(), ""
    async with _bars(cli, what) as show:
        while True:
            try:
                answer = await ask()
                if done(answer):
                    return answer
                running = tasks(answer)
                last = waits(answer) or (standing(running[0]) if running else "hosts settle")
                show(running, last)
            except Unavailable as error:
                last = str(error)
            if time.monotonic() - began > deadline:
                raise Unavailable(
                    f"not within {deadline:g} s: {what} ({last or 'asked for'})",
                    field="deadline",
                    remedy="it goes on without this command; look again, or wait longer with --deadline",
                )
            await asyncio.sleep(POLL_SECONDS)


def standing(task: TaskView) -> str:
    """How an operation stands, on one line."""
    parts = [task.what]
    if task.id is None:
        return f"{task.what} waits: {task.waits_for}"
    if task.bytes_total:
        parts.append(f"{task.progress:.0%}")
    parts += [text for text in (rate_text(task), task.step, task.waits_for) if text]
    return ", ".join(parts)


def rate_text(task: TaskView) -> str:
    if not task.bytes_per_second:
        return ""
    left = f", {_duration(task.seconds_left)} left" if task.seconds_left is not None else ""
    return f"{task.bytes_per_second / MIB:.1f} MiB/s{left}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


Show = Callable[[tuple[TaskView, ...], str], None]


@asynccontextmanager
async def _bars(cli: Cli, what: str) -> AsyncGenerator[Show]:
    """Bars that change in place on a terminal; nothing elsewhere."""
    if cli.json or not cli.err.is_terminal:
        yield lambda _tasks, _text: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=cli.err, transient=True) as progress:
        head = progress.add_task(what, total=None, pace="")
        known: dict[str, TaskID] = {}

        def show(tasks: tuple[TaskView, ...], text: str) -> None:
            copying = [task for task in tasks if task.id is not None and task.bytes_total]
            progress.update(head, description=f"{what}: {text}", visible=not copying)
            for gone in known.keys() - {task.id for task in copying}:
                progress.remove_task(known.pop(gone))
            for task in copying:
                assert task.id is not None
                if task.id not in known:
                    known[task.id] = progress.add_task(task.what, total=task.bytes_total, pace="")
                completed = int(task.bytes_total * task.progress)
                progress.update(known[task.id], completed=completed, pace=rate_text(task))

        yield show
