"""`nahtlos upgrade …`"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.blueprint import Campaign, CampaignState, Strategy
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import CampaignId, HostId, ReleaseId
from nahtlos.model.nouns import Component
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.command import BROKEN, REFUSED, Cli, Surroundings, command
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.watch import watch
from nahtlos.runtime.controllers.cloud import CampaignView
from nahtlos.runtime.evidence.report import collect
from nahtlos.runtime.evidence.text import render_text

WATCH_POLL = 1.0

Release = Annotated[
    str | None, typer.Argument(metavar="[RELEASE]", help="The release to bring hosts to.", show_default=False)
]
To = Annotated[str | None, typer.Option("--to", metavar="RELEASE", help="The same.", show_default=False)]
Which = Annotated[
    Component,
    typer.Option(
        "--component",
        help="What is replaced: the hypervisor (hosts are emptied); or, under servers that stay, the storage "
        "daemon (of a qemu release) or the network functions.",
    ),
]
How = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        help="How servers get to a new hypervisor: move (to other hosts), in-place (taken over where they "
        "are), auto (moved where that is proven, fits and keeps their budget, else in place).",
    ),
]
NoWayBack = Annotated[
    bool,
    typer.Option(
        "--no-way-back",
        help="Also where servers could not return to the release their hosts come from. It cannot be rolled "
        "back then.",
    ),
]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="Only this host; repeatable. Otherwise all.")]


def upgrade_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Upgrades under running servers.")

    @command(app, "plan", surroundings)
    async def plan(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        release: Release = None,
        to: To = None,
        component: Which = Component.HYPERVISOR,
        strategy: How = Strategy.AUTO,
        host: Hosts = None,
        no_way_back: NoWayBack = False,
    ) -> int:
        """A dry run: order, each server's way and what decides it, predicted times and gaps, blockers with
        remedies. Changes nothing.

        Exit code 2 if something blocks it."""
        async with cli.client() as client:
            forecast = await client.plan_upgrade(
                _target(release, to), _hosts(host), component, strategy, no_way_back
            )
        cli.show(forecast, pictures.forecast(forecast))
        return REFUSED if forecast.blockers else 0

    @command(app, "start", surroundings)
    async def start(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        release: Release = None,
        to: To = None,
        component: Which = Component.HYPERVISOR,
        strategy: How = Strategy.AUTO,
        host: Hosts = None,
        no_way_back: NoWayBack = False,
        follow: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    ) -> int:
        """Bring hosts to RELEASE, one after the other.

        For the hypervisor each is emptied by live moves, or its servers are taken over in place; then it is
        switched, verified, taken back. The storage daemon
        and the network functions are replaced under their servers."""
        async with cli.client() as client:
            view = await client.start_upgrade(
                _target(release, to), _hosts(host), component, strategy, no_way_back
            )
            if follow:
                return await _watch(cli, client, view.campaign.id)
        cli.show(view, pictures.campaign(view))
        cli.say("`nahtlos upgrade watch` shows it as it goes on")
        return 0

    @command(app, "watch", surroundings)
    async def watch_it(cli: Cli) -> int:  # pyright: ignore[reportUnusedFunction]
        """Show the campaign until it is over. Exit code 1 unless it was completed."""
        async with cli.client() as client:
            return await _watch(cli, client, (await client.campaign(None)).campaign.id)

    @command(app, "pause", surroundings)
    async def pause(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Start nothing further; what has begun is ended in order."""
        async with cli.client() as client:
            view = await client.pause_upgrade()
        cli.show(view, pictures.campaign(view))

    @command(app, "resume", surroundings)
    async def resume(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Go on with a paused campaign."""
        async with cli.client() as client:
            view = await client.resume_upgrade()
        cli.show(view, pictures.campaign(view))

    @command(app, "cancel", surroundings)
    async def cancel(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Give the campaign up: what has begun is ended in order, hosts return to service."""
        async with cli.client() as client:
            view = await client.cancel_upgrade()
        cli.show(view, pictures.campaign(view))

    @command(app, "commit", surroundings)
    async def commit(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Make the campaign final before its end: nothing has to be able to return any more."""
        async with cli.client() as client:
            view = await client.commit_upgrade()
        cli.show(view, pictures.campaign(view))

    @command(app, "rollback", surroundings)
    async def rollback(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Bring the campaign's hosts back to the release they came from, servers running throughout. Until it
        is committed, or has ended."""
        async with cli.client() as client:
            view = await client.rollback_upgrade()
        cli.show(view, pictures.campaign(view))
        cli.say("`nahtlos upgrade watch` shows it as it goes on")

    @command(app, "report", surroundings)
    async def report(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        campaign: Annotated[str | None, typer.Argument(help="The newest if not named.")] = None,
        evidence: Annotated[
            Path | None,
            typer.Option(help="Folder with what probes recorded (build/demo): the seamlessness report."),
        ] = None,
    ) -> int:
        """What a campaign did; with --evidence what clients noticed of it.

        With --evidence the exit code is 1 if a promise was not kept."""
        if evidence is not None:
            return _seamlessness(cli, evidence)
        async with cli.client() as client:
            view = await client.campaign(CampaignId(campaign) if campaign else None)
        cli.show(view, pictures.campaign_report(view))
        return 0

    return app


def _target(release: str | None, to: str | None) -> ReleaseId:
    if release is not None and to is not None and release != to:
        raise Refused(f"{release} and {to} are both named", field="to", remedy="name one release")
    name = to or release
    if name is None:
        raise Refused("no release is named", field="to", remedy="nahtlos release list")
    return ReleaseId(name)


def _hosts(names: list[str] | None) -> tuple[HostId, ...] | None:
    return tuple(HostId(name) for name in names) if names else None


async def _watch(cli: Cli, client: OperatorClient, campaign: CampaignId) -> int:
    if cli.json:
        return await _watch_json(cli, client, campaign)
    await watch(client, cli.out)
    view = await client.campaign(campaign)
    cli.out.print(_verdict(view.campaign))
    return _exit_code(view.campaign)


async def _watch_json(cli: Cli, client: OperatorClient, campaign: CampaignId) -> int:
    """A line of JSON for every change, the last one for the end."""
    last: CampaignView | None = None
    while True:
        try:
            view = await client.campaign(campaign)
        except Unavailable:
            await asyncio.sleep(WATCH_POLL)
            continue
        if view != last:
            cli.print_json(view, indent=0)
        if view.campaign.state in (CampaignState.DONE, CampaignState.CANCELLED) and not view.running:
            return _exit_code(view.campaign)
        last = view
        await asyncio.sleep(WATCH_POLL)


def _exit_code(campaign: Campaign) -> int:
    return 0 if campaign.state is CampaignState.DONE else BROKEN


def _verdict(campaign: Campaign) -> Text:
    done = campaign.state is CampaignState.DONE
    return Text(f"campaign {campaign.id}: {campaign.state}", style=pictures.GOOD if done else pictures.BAD)


def _seamlessness(cli: Cli, folder: Path) -> int:
    report = collect(folder)
    cli.show(report, render_text(report))
    return 0 if report.kept else BROKEN
