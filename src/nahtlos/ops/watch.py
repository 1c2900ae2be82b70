"""The live view of a campaign: hosts, moving servers, what waits for what, and what clients notice.

It reads and shows; it never changes anything. An orchestrator that is away (killed, or being replaced) is
shown as that, and looked for again: moves go on without it. Without a terminal it writes one line for each
change instead.

    look (the API, the probe's summary) -> WatchState -> render (pure) | changes (pure)
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nahtlos.model.blueprint import CampaignState, HostPhase, Waiting, WaitKind
from nahtlos.model.errors import NotFound, Stale, Unavailable
from nahtlos.model.ids import CampaignId
from nahtlos.model.inventory import OperationKind, OperationStatus
from nahtlos.model.nouns import HostRole
from nahtlos.model.values import Value
from nahtlos.runtime.controllers.cloud import CampaignView, CloudEvent, HostView, ServerView, Status
from nahtlos.runtime.evidence.figures import clock, count_of, milliseconds, number, release
from nahtlos.runtime.evidence.records import ProbeSummary, ServerProbe

LOOK_SECONDS = 0.5
LOOK_DEADLINE_SECONDS = 5.0
EVENTS_SHOWN = 5
EVENTS_ASKED = 200
EVENT_PAGES = 20
WAITING_SHOWN = 4

GOOD, BAD, WARN, SOFT = "green", "bold red", "yellow", "dim"
PHASES = {
    HostPhase.SERVING: "",
    HostPhase.CORDONED: WARN,
    HostPhase.EMPTYING: "cyan",
    HostPhase.DRAINED: WARN,
    HostPhase.SWITCHING: "magenta",
}


class Watched(Protocol):
    """What of the cloud is looked at; `ops.client` and the runtime's own cloud both have it."""

    async def status(self) -> Status: ...
    async def hosts(self) -> tuple[HostView, ...]: ...
    async def servers(self) -> tuple[ServerView, ...]: ...
    async def campaign(self, campaign: CampaignId | None) -> CampaignView: ...
    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]: ...


class WatchState(Value, frozen=True, kw_only=True):
    """All that one picture shows. `at` is the wall clock of the look."""

    at: float
    campaign: CampaignView | None = None
    status: Status | None = None
    hosts: tuple[HostView, ...] = ()
    servers: tuple[ServerView, ...] = ()
    events: tuple[CloudEvent, ...] = ()
    """The newest, oldest first."""
    probe: ProbeSummary | None = None
    away_since: float | None = None
    """The orchestrator has not answered since; the rest is what it said before."""


def campaign_over(state: WatchState) -> bool:
    """It is done or cancelled, and nothing of it runs any more."""
    view = state.campaign
    if view is None or state.away_since is not None:
        return False
    return view.campaign.state in (CampaignState.DONE, CampaignState.CANCELLED) and not view.running


async def watch(
    client: Watched,
    console: Console,
    *,
    probe_summary: Path | None = None,
    until: Callable[[WatchState], bool] = campaign_over,
    interval: float = LOOK_SECONDS,
) -> WatchState:
    """Show the newest campaign until `until` says so; returns the last state seen. A probe's summary
    (`probe.json`) adds what clients notice. NotFound if there never was a campaign."""
    state = await look(client, WatchState(at=time.time()), probe_summary)
    if not console.is_terminal:
        return await _watch_plainly(client, console, state, probe_summary, until, interval)
    with Live(render(state), console=console, auto_refresh=False, transient=False) as live:
        while not until(state):
            await asyncio.sleep(interval)
            state = await look(client, state, probe_summary)
            live.update(render(state), refresh=True)
        live.update(render(state), refresh=True)
    return state


async def _watch_plainly(
    client: Watched,
    console: Console,
    state: WatchState,
    probe_summary: Path | None,
    until: Callable[[WatchState], bool],
    interval: float,
) -> WatchState:
    _say(console, changes(WatchState(at=state.at), state))
    while not until(state):
        await asyncio.sleep(interval)
        before, state = state, await look(client, state, probe_summary)
        _say(console, changes(before, state))
    return state


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


# --- looking -----------------------------------------------------------------------------------------


async def look(client: Watched, before: WatchState, probe_summary: Path | None) -> WatchState:
    """One look at everything. An orchestrator that does not answer leaves the old picture, marked."""
    probe = read_summary(probe_summary) or before.probe
    try:
        async with asyncio.timeout(LOOK_DEADLINE_SECONDS):
            return WatchState(
                at=time.time(),
                campaign=await client.campaign(None),
                status=await client.status(),
                hosts=await client.hosts(),
                servers=await client.servers(),
                events=await _events(client, before.events),
                probe=probe,
            )
    except NotFound:
        if before.campaign is None:
            raise
        return msgspec.structs.replace(before, at=time.time(), probe=probe)
    except (Unavailable, Stale, TimeoutError):
        now = time.time()
        since = before.away_since if before.away_since is not None else now
        return msgspec.structs.replace(before, at=now, probe=probe, away_since=since)


async def _events(client: Watched, known: tuple[CloudEvent, ...]) -> tuple[CloudEvent, ...]:
    """The newest events, catching up page by page; what a look does not reach, the next one does."""
    newest = known
    for _ in range(EVENT_PAGES):
        after = newest[-1].number if newest else 0
        page = await client.events(after, EVENTS_ASKED)
        newest = (*newest, *page)[-EVENTS_SHOWN:]
        if len(page) < EVENTS_ASKED:
            break
    return newest


def read_summary(path: Path | None) -> ProbeSummary | None:
    """None if there is none (yet)."""
    if path is None:
        return None
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=ProbeSummary)
    return None


# --- the picture -------------------------------------------------------------------------------------


def render(state: WatchState) -> RenderableType:
    """The whole picture; fits 80 columns."""
    parts: list[RenderableType] = [*_campaign(state), Text(), _hosts(state)]
    for section in (_moving(state), _clients(state), _waiting(state), _events_shown(state)):
        if section is not None:
            parts += [Text(), section]
    return Group(*parts)


def _campaign(state: WatchState) -> list[RenderableType]:
    view = state.campaign
    if view is None:
        return [Text("no campaign", SOFT)]
    campaign = view.campaign
    ended = campaign.ended_at if campaign.ended_at is not None else state.at
    came = ", ".join(release(r) for r in campaign.from_releases)
    title = Text.assemble(
        (f"{came} → {release(campaign.to_release)}" if came else release(campaign.to_release), "bold"),
        "  ",
        _state_of(campaign.state),
        "  ",
        (clock(max(0.0, ended - campaign.created_at)), SOFT),
        (f"  {campaign.id}", SOFT),
    )
    lines: list[RenderableType] = [title, _progress(view)]
    if state.away_since is not None:
        away = state.at - state.away_since
        lines.append(
            Text(
                f"the orchestrator has not answered for {away:.0f} s; moves under way go on without it", WARN
            )
        )
    return lines


def _state_of(state: CampaignState) -> tuple[str, str]:
    styles = {CampaignState.RUNNING: "cyan", CampaignState.DONE: GOOD, CampaignState.PAUSED: WARN}
    return state.value, styles.get(state, BAD)


def _bar(done: float, total: float, width: int) -> ProgressBar:
    styles = ("bright_black", "cyan", GOOD)
    return ProgressBar(
        total, done, width, style=styles[0], complete_style=styles[1], finished_style=styles[2]
    )


def _progress(view: CampaignView) -> Table:
    total = max(view.moves_total_forecast, view.moves_done, 1)
    done = total if view.campaign.state is CampaignState.DONE else view.moves_done
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_row(
        _bar(done, total, 28),
        Text(f"{view.hosts_upgraded} of {count_of(view.hosts_total, 'host')} upgraded"),
        Text(f"{view.moves_done} of {count_of(total, 'move')}"),
        Text(f"{view.moves_failed} undone", WARN) if view.moves_failed else Text(),
    )
    return row


def _hosts(state: WatchState) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=SOFT)
    for title in ("Host", "Phase", "Release", "Memory", "Servers"):
        table.add_column(title, no_wrap=title != "Servers")
    moving = {s.id: s for s in state.servers if s.moving_to is not None}
    for host in state.hosts:
        if host.role is HostRole.COMPUTE:
            table.add_row(*_host_row(state, host, moving.keys()))
    return table


def _host_row(state: WatchState, host: HostView, moving: Iterable[str]) -> tuple[Text, ...]:
    upgraded = state.campaign is not None and host.verified_release == state.campaign.campaign.to_release
    phase = Text(host.phase.value, PHASES[host.phase]) if host.connected else Text("not connected", WARN)
    return (
        Text(host.id, "bold"),
        phase,
        Text(release(host.verified_release or host.release or ""), GOOD if upgraded else ""),
        Text(f"{host.used.memory_mib}/{host.capacity.memory_mib} MiB", SOFT),
        _servers_of(host, set(moving), state.servers),
    )


def _servers_of(host: HostView, moving: set[str], servers: tuple[ServerView, ...]) -> Text:
    text = Text()
    for name in host.servers:
        text.append(f"{name} ", "cyan" if name in moving else "")
    for server in servers:
        if server.moving_to == host.id:
            text.append(f"←{server.id} ", "cyan")
    if not text:
        text.append("–", SOFT)
    return text


def _moving(state: WatchState) -> Table | None:
    """Servers under way, each with how far it has come; and hosts whose release is being checked."""
    operations = state.campaign.running if state.campaign is not None else ()
    known = {s.id: s for s in state.servers}
    table = Table.grid(padding=(0, 2, 0, 0))
    for operation in operations:
        if operation.kind is OperationKind.MOVE and operation.server is not None:
            table.add_row(*_move_row(operation, known.get(operation.server)))
        else:
            table.add_row(Text("checking"), Text(operation.id, SOFT), Text(), Text(_doing(operation), SOFT))
    return table if table.row_count else None


def _move_row(operation: OperationStatus, server: ServerView | None) -> tuple[RenderableType, ...]:
    source = server.host if server is not None and server.host is not None else "?"
    destination = server.moving_to if server is not None and server.moving_to is not None else "?"
    return (
        Text(operation.server or "", "bold"),
        Text(f"{source} → {destination}", "cyan"),
        _bar(operation.progress, 1.0, 16),
        Text(_doing(operation), WARN if operation.waits_for else SOFT),
    )


def _doing(operation: OperationStatus) -> str:
    waits = f", waits for {operation.waits_for}" if operation.waits_for else ""
    return f"{operation.step}{waits}"


def _clients(state: WatchState) -> Text | None:
    """What clients notice: nothing, if all goes well."""
    probe = state.probe
    if probe is None:
        return None
    seen = ClientCounts.of(probe)
    line = Text.assemble(("Clients  ", SOFT), f"{number(seen.sent)} packets, ", _fault(seen.lost, "lost"))
    line.append(f"  gap {milliseconds(seen.gap_ms)}")
    for count, what in ((seen.tcp, "TCP broken"), (seen.http, "HTTP failed"), (seen.reboots, "reboots")):
        line.append("  ").append_text(Text(*_fault(count, what)))
    if probe.api is not None:
        line.append("  ").append_text(Text(*_fault(probe.api.errors, "API errors")))
    silent = [s for s in probe.servers if s.silence_ms > 1000 and s.ended_at is None]
    for server in silent:
        line.append(f"\n         {server.name} silent for {server.silence_ms / 1e3:.1f} s", BAD)
    return line


def _fault(count: int, what: str) -> tuple[str, str]:
    return f"{number(count)} {what}", BAD if count else GOOD


class ClientCounts(Value, frozen=True, kw_only=True):
    sent: int
    lost: int
    gap_ms: float
    tcp: int
    http: int
    reboots: int

    @classmethod
    def of(cls, probe: ProbeSummary) -> "ClientCounts":
        def total(count: Callable[[ServerProbe], int]) -> int:
            return sum(count(s) for s in probe.servers)

        return cls(
            sent=total(lambda s: s.packets_sent),
            lost=total(lambda s: s.packets_lost),
            gap_ms=max((s.longest_gap_ms for s in probe.servers), default=0.0),
            tcp=total(lambda s: s.tcp_sessions_broken),
            http=total(lambda s: s.http_failures),
            reboots=total(lambda s: s.reboots),
        )


def _waiting(state: WatchState) -> Table | None:
    waiting = state.campaign.waiting if state.campaign is not None else ()
    if not waiting:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    for entry in waiting[:WAITING_SHOWN]:
        style = BAD if entry.kind is WaitKind.BLOCKED else WARN
        table.add_row(Text("waits", style), Text(entry.subject, "bold"), Text(_reason(entry)))
    more = len(waiting) - WAITING_SHOWN
    if more > 0:
        table.add_row(Text(), Text(), Text(f"and {more} more", SOFT))
    return table


def _reason(waiting: Waiting) -> str:
    return f"{waiting.reason} ({waiting.remedy})" if waiting.remedy else waiting.reason


def _events_shown(state: WatchState) -> Table | None:
    if not state.events:
        return None
    began = state.campaign.campaign.created_at if state.campaign is not None else state.events[0].at
    table = Table.grid(padding=(0, 2, 0, 0))
    for event in state.events[-EVENTS_SHOWN:]:
        since = event.at - began
        table.add_row(Text(clock(since) if since >= 0 else "", SOFT), Text(event.text, overflow="fold"))
    return table


# --- without a terminal ------------------------------------------------------------------------------


def changes(before: WatchState, after: WatchState) -> list[str]:
    """What is new, in lines of their own; nothing if nothing is."""
    lines = [
        *_campaign_changes(before, after),
        *_host_changes(before, after),
        *_server_changes(before, after),
        *_waiting_changes(before, after),
        *_client_changes(before, after),
    ]
    began = after.campaign.campaign.created_at if after.campaign is not None else after.at
    return [f"{clock(max(0.0, after.at - began)):>5}  {line}" for line in lines]


def _campaign_changes(before: WatchState, after: WatchState) -> Iterable[str]:
    if (before.away_since is None) != (after.away_since is None):
        yield "the orchestrator answers again" if after.away_since is None else "the orchestrator is away"
    if after.campaign is None:
        return
    now, was = after.campaign, before.campaign
    if was is None or was.campaign.state is not now.campaign.state:
        to = release(now.campaign.to_release)
        yield f"campaign {now.campaign.id} to {to}: {now.campaign.state.value}"
    if was is not None and was.hosts_upgraded != now.hosts_upgraded:
        yield f"{now.hosts_upgraded} of {count_of(now.hosts_total, 'host')} upgraded"
    if was is not None and was.moves_failed < now.moves_failed:
        yield f"a move was undone ({now.moves_failed} so far)"


def _host_changes(before: WatchState, after: WatchState) -> Iterable[str]:
    known = {h.id: h for h in before.hosts}
    for host in after.hosts:
        was = known.get(host.id)
        if was is None:
            continue
        if was.phase is not host.phase:
            yield f"{host.id} {host.phase.value}"
        if was.connected is not host.connected:
            yield f"{host.id} {'is connected' if host.connected else 'lost its connection'}"


def _server_changes(before: WatchState, after: WatchState) -> Iterable[str]:
    known = {s.id: s for s in before.servers}
    for server in after.servers:
        was = known.get(server.id)
        if was is None:
            if before.servers:
                yield f"{server.id} is new"
            continue
        if was.host != server.host and was.host is not None:
            yield f"{server.id} runs on {server.host}, under {release(server.release or '')}"
        if was.moving_to != server.moving_to and server.moving_to is not None:
            yield f"{server.id} moves from {server.host} to {server.moving_to}"
    gone = known.keys() - {s.id for s in after.servers}
    yield from (f"{name} is gone" for name in sorted(gone))


def _waiting_changes(before: WatchState, after: WatchState) -> Iterable[str]:
    """A reason in which only a figure has changed is not told again."""
    known = {_gist(w) for w in before.campaign.waiting} if before.campaign is not None else set[str]()
    for waiting in after.campaign.waiting if after.campaign is not None else ():
        if _gist(waiting) not in known:
            yield f"{waiting.subject} waits: {_reason(waiting)}"


def _gist(waiting: Waiting) -> str:
    return f"{waiting.subject} {waiting.kind} {re.sub(r'[0-9.]+', '#', waiting.reason)}"


def _client_changes(before: WatchState, after: WatchState) -> Iterable[str]:
    if after.probe is None:
        return
    now = ClientCounts.of(after.probe)
    was = ClientCounts.of(before.probe) if before.probe is not None else None
    for what, count, earlier in (
        ("packets lost", now.lost, was.lost if was else 0),
        ("TCP sessions broken", now.tcp, was.tcp if was else 0),
        ("HTTP requests failed", now.http, was.http if was else 0),
        ("reboots", now.reboots, was.reboots if was else 0),
    ):
        if count > earlier:
            yield f"{what}: {number(count)}"
