"""The live view: pictures of made-up moments as text, the lines written without a terminal, and how it
bears an orchestrator that is away."""

import io
from collections.abc import Iterator
from pathlib import Path

import evidence_samples as samples
import msgspec
import pytest
from rich.console import Console

from nahtlos.model.blueprint import CampaignState, HostPhase, Waiting, WaitKind
from nahtlos.model.errors import NotFound, Unavailable
from nahtlos.model.ids import CampaignId, OperationId, ServerId
from nahtlos.model.inventory import OperationKind, OperationState, OperationStatus
from nahtlos.ops.watch import WatchState, changes, render, watch
from nahtlos.runtime.controllers.cloud import CampaignView, CloudEvent, HostView, ServerView, Status
from nahtlos.runtime.evidence.records import ProbeSummary

replace = msgspec.structs.replace


def event(number: int, at: float, subject: str, text: str) -> CloudEvent:
    return CloudEvent(number=number, at=samples.BEGAN + at, kind="told", subject=subject, text=text)


def summary(damage: samples.Damage) -> ProbeSummary:
    seen = samples.probe(seconds=20).summary
    counts = samples.probe(damage, seconds=20).summary.servers
    servers = tuple(replace(s, packets_lost=damage.lost.get(s.name, 0)) for s in counts)
    return replace(seen, servers=servers)


def moment(
    *, running: bool = True, away: bool = False, damage: samples.Damage = samples.NO_DAMAGE
) -> WatchState:
    """A minute into the campaign: host-1 is done, host-2 is being emptied, db-1 moves."""
    evidence = samples.evidence(damage)
    view = evidence.campaign
    if running:
        campaign = replace(view.campaign, state=CampaignState.RUNNING, ended_at=None)
        move = OperationStatus(
            id=OperationId("op-2"), kind=OperationKind.MOVE, state=OperationState.RUNNING, step="precopy",
            server=ServerId("db-1"), epoch=2, progress=0.62,
        )  # fmt: skip
        waits = Waiting(
            subject="host-3", kind=WaitKind.CAPACITY, reason="has to wait until host-2 is back in service"
        )
        view = replace(
            view, campaign=campaign, hosts_upgraded=1, moves_done=2, moves_failed=0, running=(move,),
            waiting=(waits,), operations=(),
        )  # fmt: skip
    hosts = tuple(
        replace(
            h, phase=phase, release=release, verified_release=release, servers=tuple(map(ServerId, servers))
        )
        for h, phase, release, servers in (
            (evidence.hosts[0], HostPhase.SERVING, samples.NEW, ()),
            (evidence.hosts[1], HostPhase.EMPTYING, samples.OLD, ("db-1", "db-2")),
            (evidence.hosts[2], HostPhase.SERVING, samples.OLD, ("api-1", "api-2", "web-1", "web-2")),
        )
    )
    servers = tuple(
        replace(s, moving_to=samples.host(1) if s.id == "db-1" and running else None)
        for s in evidence.servers_before
    )
    return WatchState(
        at=samples.BEGAN + 60,
        campaign=view,
        hosts=hosts,
        servers=servers,
        events=(
            event(7, 37, "host-1", "host-1 serving"),
            event(8, 58, "db-1", "db-1 moves to host-1"),
        ),
        probe=summary(damage),
        away_since=samples.BEGAN + 57 if away else None,
    )  # fmt: skip


def shown(state: WatchState, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True, color_system=None)
    console.print(render(state))
    return [line.rstrip() for line in console.export_text().splitlines()]


PICTURE = """\
QEMU 10.0.2 → QEMU 11.1.3  running  1:00  campaign-1
━━━━━━━                       1 of 3 hosts upgraded  2 of 8 moves

Host    Phase     Release      Memory        Servers
host-1  serving   QEMU 11.1.3  512/1024 MiB  ←db-1
host-2  emptying  QEMU 10.0.2  512/1024 MiB  db-1 db-2
host-3  serving   QEMU 10.0.2  512/1024 MiB  api-1 api-2 web-1 web-2

db-1  host-2 → host-1  ━━━━━━━━━╸        precopy

Clients  36,000 packets, 0 lost  gap 61.3 ms  0 TCP broken  0 HTTP failed  0 reboots  0 API errors

waits  host-3  has to wait until host-2 is back in service

0:37  host-1 serving
0:58  db-1 moves to host-1"""


def test_the_picture_at_120_columns() -> None:
    assert shown(moment(), 120) == PICTURE.splitlines()


def test_the_picture_fits_80_columns() -> None:
    lines = shown(moment(), 80)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 18
    assert lines[4].startswith("host-1  serving   QEMU 11.1.3  512/1024 MiB")
    assert any("db-1  host-2 → host-1" in line for line in lines)


def test_damage_and_absence_are_seen() -> None:
    lines = "\n".join(shown(moment(away=True, damage=samples.WOUNDED), 120))
    assert "41 lost" in lines
    assert "1 TCP broken" in lines
    assert "has not answered for 3 s" in lines


def test_a_name_is_never_markup() -> None:
    state = moment()
    told = event(9, 60, "x", "[bold]host[/nothing]")
    assert "[bold]host[/nothing]" in "\n".join(shown(replace(state, events=(told,)), 100))


def test_nothing_new_is_no_line() -> None:
    assert changes(moment(), replace(moment(), at=samples.BEGAN + 61)) == []


def test_every_change_is_one_line() -> None:
    before, after = moment(), moment(running=False, damage=samples.WOUNDED)
    hosts = (replace(after.hosts[0], connected=False), *after.hosts[1:])
    servers = (replace(after.servers[0], host=samples.host(1), release=samples.NEW), *after.servers[1:])
    lines = changes(before, replace(after, hosts=hosts, servers=servers))
    assert [line.strip() for line in lines] == [
        "1:00  campaign campaign-1 to QEMU 11.1.3: done",
        "1:00  3 of 3 hosts upgraded",
        "1:00  a move was undone (1 so far)",
        "1:00  host-1 lost its connection",
        "1:00  api-1 runs on host-1, under QEMU 11.1.3",
        "1:00  packets lost: 41",
        "1:00  TCP sessions broken: 1",
        "1:00  HTTP requests failed: 6",
    ]


def test_a_reason_with_another_figure_is_not_told_again() -> None:
    before = moment()
    assert before.campaign is not None

    def lacking(mib: int) -> WatchState:
        waits = Waiting(subject="db-2", kind=WaitKind.CAPACITY, reason=f"lacks {mib} MiB")
        assert before.campaign is not None
        return replace(before, campaign=replace(before.campaign, waiting=(waits,)))

    assert [line.split("  ")[-1] for line in changes(before, lacking(128))] == ["db-2 waits: lacks 128 MiB"]
    assert changes(lacking(128), lacking(96)) == []


class Scripted:
    """A cloud that shows one state after the other; None: it does not answer."""

    def __init__(self, states: list[WatchState | None]) -> None:
        self._states: Iterator[WatchState | None] = iter(states)
        self._now: WatchState = moment()

    async def campaign(self, campaign: CampaignId | None) -> CampaignView:
        state = next(self._states)
        if state is None:
            raise Unavailable("refused")
        if state.campaign is None:
            raise NotFound("there was no campaign")
        self._now = state
        return state.campaign

    async def status(self) -> Status:
        assert self._now.campaign is not None
        return Status(
            version="0", orchestrator_epoch=1, leader=True, blueprint="bp-1", converged=False, waiting=(),
            capacity=self._now.campaign.capacity, time=self._now.at,
        )  # fmt: skip

    async def hosts(self) -> tuple[HostView, ...]:
        return self._now.hosts

    async def servers(self) -> tuple[ServerView, ...]:
        return self._now.servers

    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]:
        return tuple(e for e in self._now.events if e.number > after)[:limit]


@pytest.mark.parametrize("terminal", [False, True])
async def test_it_watches_through_an_absence_until_the_end(terminal: bool, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal, color_system=None)
    (tmp_path / "probe.json").write_bytes(msgspec.json.encode(samples.probe(seconds=20).summary))
    script = Scripted([moment(), None, None, moment(), moment(running=False)])
    last = await watch(script, console, probe_summary=tmp_path / "probe.json", interval=0.001)
    assert last.campaign is not None
    assert last.campaign.campaign.state is CampaignState.DONE
    assert last.probe is not None
    assert len(last.events) == 2
    said = out.getvalue()
    if terminal:
        assert "has not answered" in said
        assert "36,000 packets" in said
    else:
        assert said.count("the orchestrator is away") == 1
        assert said.count("the orchestrator answers again") == 1
        assert len(said.splitlines()) == 6


async def test_no_campaign_is_an_error() -> None:
    with pytest.raises(NotFound):
        await watch(Scripted([WatchState(at=0.0)]), Console(file=io.StringIO()))
