"""`nahtlos doctor`, `nahtlos status`, `nahtlos promise`."""

import asyncio
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.errors import Error
from nahtlos.model.nouns import Size
from nahtlos.model.placement import ReserveReport
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.command import REFUSED, Cli, Surroundings, command
from nahtlos.ops.cli.placement_pictures import reserve_line
from nahtlos.ops.doctor import examine, fit
from nahtlos.ops.examined import Finding, Level


def machine_commands(app: typer.Typer, surroundings: Surroundings) -> None:
    """Commands without a group of their own."""

    @command(app, "doctor", surroundings)
    async def doctor(cli: Cli) -> int:  # pyright: ignore[reportUnusedFunction]
        """What this machine can and cannot do, with remedies. Exit code 2 if it is not fit for a lab."""
        findings = await asyncio.to_thread(examine, surroundings.build_dir)
        findings += await _of_hosts(cli)
        cli.show(findings, _picture(findings))
        return 0 if fit(findings) else REFUSED

    @command(app, "status", surroundings)
    async def status(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """The cloud in short: whether all is as it should be, and what waits for what."""
        async with cli.client() as client:
            value = await client.status()
        cli.show(value, pictures.status(value))

    @command(app, "promise", surroundings)
    async def promise(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        vcpus: Annotated[int, typer.Option(min=0, help="In total.", show_default=False)],
        memory_mib: Annotated[int, typer.Option(min=0, help="In total.", show_default=False)],
    ) -> None:
        """Set what customers are promised in total: servers stay within it, upgrades never withdraw it."""
        async with cli.client() as client:
            await client.set_promised(Size(vcpus=vcpus, memory_mib=memory_mib))
            value = await client.status()
        cli.show(value, pictures.status(value))


async def _of_hosts(cli: Cli) -> list[Finding]:
    """What the network drivers of the cloud's hosts use and lack, if a cloud is there to be asked."""
    try:
        async with cli.client() as client:
            hosts = [await client.host(view.id) for view in await client.hosts()]
            reserve = (await client.status()).capacity.reserve
    except Error:
        return []
    kept = [] if reserve is None else [_of_reserve(reserve)]
    return kept + [
        Finding(
            name=f"network of {view.id}: {subject}",
            ok=not words.startswith("missing"),
            level=Level.OPTIONAL,
            detail=words,
        )
        for view in hosts
        for subject, words in sorted((view.inventory.network if view.inventory else {}).items())
    ]


def _of_reserve(report: ReserveReport) -> Finding:
    return Finding(
        name="reserve for hosts that fail",
        ok=report.kept,
        level=Level.OPTIONAL,
        detail=reserve_line(report).plain,
        remedy=""
        if report.kept
        else "add or activate a host, delete servers, or keep less in reserve: nahtlos reserve N",
    )


def _picture(findings: list[Finding]) -> RenderableType:
    lines = [_line(finding) for finding in findings]
    missing = sum(not f.ok for f in findings if f.level is Level.REQUIRED)
    verdict = (
        Text(f"{missing} of the things that are needed are missing", style=pictures.BAD)
        if missing
        else Text("this machine can hold a lab", style=pictures.GOOD)
    )
    return Group(*lines, Text(), verdict)


def _line(finding: Finding) -> Text:
    style = pictures.BAD if finding.level is Level.REQUIRED else pictures.WARN
    sign = ("✔ ", pictures.GOOD) if finding.ok else ("✘ ", style)
    line = Text.assemble(sign, (f"{finding.name}: ", "bold"), finding.detail)
    if not finding.ok and finding.level is not Level.REQUIRED:
        line.append(f" ({finding.level})", style=pictures.SOFT)
    if finding.remedy:
        line.append(f"\n    → {finding.remedy}", style="cyan")
    return line
