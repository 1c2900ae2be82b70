"""The seamlessness report: from records to figures.

Pure but for `collect` and `write`. Every figure comes from what probes and checkers wrote down outside the
system under test; of the system's own word only times and names are used (which move, from where to where,
when), and the capacity floor.

A report's folder:

    evidence.json   what the campaign was (`Evidence`)
    probe/          what the prober wrote (`records`)
    report.json     made from these two
    report.html     made from report.json
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.errors import Refused
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.nouns import Size
from nahtlos.runtime.controllers.cloud import HostView
from nahtlos.runtime.evidence.foretold import KINDS, predictions
from nahtlos.runtime.evidence.gaps import arrivals_around, longest_silence, move_window, percentile
from nahtlos.runtime.evidence.promises import judge
from nahtlos.runtime.evidence.records import (
    Arrivals,
    DiskCheck,
    ProbeRecords,
    ServerProbe,
    count,
    lost_at,
    read_probe,
)
from nahtlos.runtime.evidence.report_contents import (
    SCHEMA,
    CampaignFigures,
    CreatedServer,
    Evidence,
    HostFigures,
    MoveFigures,
    Phase,
    Placement,
    ProbeFigures,
    Report,
    ServerFigures,
    Totals,
)

STRIP_BEFORE_SECONDS, STRIP_AFTER_SECONDS = 0.1, 0.3
"""What a move's `arrivals_ms` spans, from the beginning of its gap."""
EVIDENCE_NAME, REPORT_NAME, PROBE_FOLDER = "evidence.json", "report.json", "probe"


# --- from records to figures -------------------------------------------------------------------------


def build_report(evidence: Evidence, probe: ProbeRecords | None) -> Report:
    campaign = _campaign(evidence)
    times = _times_by_server(probe)
    lost = {n: lost_at(a, complete=_complete(probe)) for n, a in probe.arrivals.items()} if probe else {}
    moves = tuple(
        _move(o, times.get(o.subject, []), lost.get(o.subject, []))
        for o in evidence.campaign.operations
        if o.kind == OperationKind.MOVE
    )
    created = _created(evidence, campaign, probe)
    servers = _servers(evidence, probe, moves, times)
    report = Report(
        schema=SCHEMA,
        made_at=evidence.made_at,
        kept=False,
        campaign=campaign,
        servers=servers,
        totals=_totals(evidence, servers, moves, probe),
        promises=(),
        moves=moves,
        hosts=_hosts(evidence, campaign),
        placements=_placements(evidence, campaign, moves),
        created=created,
        machine=evidence.machine,
        probe=_probe(probe),
        predictions=predictions(evidence.campaign.operations, _gaps(evidence, times)),
    )
    promises = judge(report)
    return msgspec.structs.replace(report, promises=promises, kept=all(p.kept for p in promises))


def _campaign(evidence: Evidence) -> CampaignFigures:
    view = evidence.campaign
    last = [max(o.times.values()) for o in view.operations if o.times]
    ended = view.campaign.ended_at or max([view.campaign.created_at, *last])
    return CampaignFigures(
        id=view.campaign.id,
        from_release=", ".join(view.campaign.from_releases),
        to_release=view.campaign.to_release,
        hosts=view.hosts_total,
        hosts_upgraded=view.hosts_upgraded,
        state=view.campaign.state.value,
        seconds=round(ended - view.campaign.created_at, 3),
        began_at=view.campaign.created_at,
        ended_at=ended,
    )


def _times_by_server(probe: ProbeRecords | None) -> dict[str, list[float]]:
    """Arrivals in seconds, rising. A server that fell silent for good is silent until the last datagram
    it was sent, so that its silence counts as the gap it is."""
    if probe is None:
        return {}
    return {name: _with_last_silence(arrivals) for name, arrivals in probe.arrivals.items()}


def _with_last_silence(arrivals: Arrivals) -> list[float]:
    times = arrivals.sorted_times()
    if times and arrivals.sent_at[-1] / 1e9 > times[-1]:
        times.append(arrivals.sent_at[-1] / 1e9)
    return times


def _complete(probe: ProbeRecords | None) -> bool:
    return probe is not None and probe.summary.state == "final"


def _move(operation: OperationRecord, arrivals: Sequence[float], lost: Sequence[float]) -> MoveFigures:
    times = operation.times
    begin, end = min(times.values(), default=None), max(times.values(), default=None)
    switch = times.get("switch", times.get("stopped", end))
    window = move_window(times)
    silence = longest_silence(arrivals, window) if window is not None else None
    strip = _strip(arrivals, silence.begin) if silence is not None else []
    return MoveFigures(
        id=operation.id,
        server=operation.subject,
        source=operation.source or "",
        destination=operation.destination or "",
        state=operation.state,
        reason=operation.reason,
        begin=begin,
        switch=switch,
        end=end,
        gap_ms=round(silence.milliseconds, 3) if silence is not None else None,
        gap_begin=silence.begin if silence is not None else None,
        packets_lost=sum(window.begin <= at <= window.end for at in lost) if window is not None else 0,
        vmm_before=operation.release_before or "",
        vmm_after=operation.release_after or "",
        arrivals_ms=tuple(round(t, 2) for t in strip),
    )


def _gaps(evidence: Evidence, times: dict[str, list[float]]) -> dict[str, float]:
    """By operation, in milliseconds: of those that a client watched."""
    found: dict[str, float] = {}
    for operation in evidence.campaign.operations:
        window = move_window(operation.times) if operation.kind in KINDS else None
        silence = longest_silence(times.get(operation.subject, []), window) if window is not None else None
        if silence is not None:
            found[operation.id] = silence.milliseconds
    return found


def _strip(arrivals: Sequence[float], at: float) -> list[float]:
    return arrivals_around(arrivals, at, before=STRIP_BEFORE_SECONDS, after=STRIP_AFTER_SECONDS)


def _ended_well(move: MoveFigures) -> bool:
    return move.state == OperationState.DONE


def _servers(
    evidence: Evidence,
    probe: ProbeRecords | None,
    moves: tuple[MoveFigures, ...],
    times: dict[str, list[float]],
) -> tuple[ServerFigures, ...]:
    """Every server anybody knows of: one that was not probed is there, with nothing to its credit."""
    probed = {s.name: s for s in probe.summary.servers} if probe is not None else {}
    known = [*(v.id for v in evidence.servers_before), *(v.id for v in evidence.servers_after), *probed]
    complete = _complete(probe)
    return tuple(
        _server(
            name,
            evidence,
            probed.get(name),
            probe.arrivals.get(name) if probe is not None else None,
            tuple(m for m in moves if m.server == name and _ended_well(m)),
            times.get(name, []),
            complete=complete,
        )
        for name in sorted(set(known))
    )


def _server(
    name: str,
    evidence: Evidence,
    seen: ServerProbe | None,
    arrivals: Arrivals | None,
    moves: tuple[MoveFigures, ...],
    times: list[float],
    *,
    complete: bool,
) -> ServerFigures:
    seen = seen or ServerProbe(name=name, ip="", asked_at=0.0)
    counted = count(arrivals or Arrivals.empty(), complete=complete or seen.ended_at is not None)
    disk = next((d for d in evidence.disks if d.server == name), None)
    silence = longest_silence(times)
    before, after = _vmms(name, evidence, moves)
    return ServerFigures(
        name=name,
        moves=len(moves),
        reboots=seen.reboots,
        packets_sent=counted.sent,
        packets_lost=counted.lost,
        packets_duplicated=counted.duplicated,
        longest_gap_ms=round(silence.milliseconds, 3) if silence is not None else None,
        gaps_ms=tuple(m.gap_ms for m in moves if m.gap_ms is not None),
        tcp_sessions_broken=seen.tcp_sessions_broken,
        http_failures=seen.http_failures,
        memory_verified=seen.memory_pages_verified > 0 and seen.memory_errors == 0,
        disk_writes_acknowledged=max(seen.disk_acknowledged, disk.acknowledged if disk else 0),
        disk_writes_lost=_writes_lost(seen, disk),
        vmm_before=before,
        vmm_after=after,
        ip=seen.ip,
        created_during=name in (evidence.created or ()),
        boot_seen=bool(seen.boots),
        packets_reordered=counted.reordered,
        longest_send_gap_ms=seen.longest_send_gap_ms,
        tcp_lines=seen.tcp_lines,
        tcp_longest_stall_ms=seen.tcp_longest_stall_ms,
        http_requests=seen.http_requests,
        http_slowest_ms=seen.http_slowest_ms,
        heartbeats_lost=seen.heartbeats_lost,
        guest_longest_gap_ms=seen.guest_longest_gap_ms,
        memory_pages_verified=seen.memory_pages_verified,
        memory_errors=seen.memory_errors,
        disk_checked=disk is not None,
    )


def _writes_lost(seen: ServerProbe, disk: DiskCheck | None) -> int:
    """Of all that was acknowledged to the probe, also what a check of fewer blocks did not look for."""
    if disk is None:
        return 0
    return disk.lost + disk.wrong + max(0, seen.disk_acknowledged - disk.acknowledged)


def _vmms(name: str, evidence: Evidence, moves: tuple[MoveFigures, ...]) -> tuple[str, str]:
    before = next((v.release or "" for v in evidence.servers_before if v.id == name), "")
    after = next((v.release or "" for v in evidence.servers_after if v.id == name), "")
    if moves:
        before = before or moves[0].vmm_before
        after = after or moves[-1].vmm_after
    return before, after


def _totals(
    evidence: Evidence,
    servers: tuple[ServerFigures, ...],
    moves: tuple[MoveFigures, ...],
    probe: ProbeRecords | None,
) -> Totals:
    done = [m for m in moves if _ended_well(m)]
    gaps = [gap for s in servers for gap in s.gaps_ms]
    at_begin = len(evidence.servers_before)
    api = probe.summary.api if probe is not None else None
    promised = evidence.campaign.capacity.promised != Size()
    return Totals(
        servers=len(servers),
        servers_at_begin=at_begin,
        moves=len(done),
        moves_undone=sum(m.state in (OperationState.UNDONE, OperationState.STUCK) for m in moves),
        reboots=sum(s.reboots for s in servers),
        packets_sent=sum(s.packets_sent for s in servers),
        packets_lost=sum(s.packets_lost for s in servers),
        packets_duplicated=sum(s.packets_duplicated for s in servers),
        longest_gap_ms=max((s.longest_gap_ms for s in servers if s.longest_gap_ms is not None), default=None),
        gap_ms_p50=percentile(gaps, 0.50),
        gap_ms_p99=percentile(gaps, 0.99),
        gap_ms_max=max(gaps, default=None),
        tcp_lines=sum(s.tcp_lines for s in servers),
        tcp_sessions_broken=sum(s.tcp_sessions_broken for s in servers),
        http_requests=sum(s.http_requests for s in servers),
        http_failures=sum(s.http_failures for s in servers),
        memory_verified=bool(servers) and all(s.memory_verified for s in servers),
        memory_pages_verified=sum(s.memory_pages_verified for s in servers),
        memory_errors=sum(s.memory_errors for s in servers),
        disk_writes_acknowledged=sum(s.disk_writes_acknowledged for s in servers),
        disk_writes_lost=sum(s.disk_writes_lost for s in servers),
        moves_per_server=round(len(done) / at_begin, 4) if at_begin else None,
        api_requests=api.requests if api is not None else 0,
        api_errors=api.errors if api is not None else 0,
        api_slowest_ms=api.slowest_ms if api is not None else 0.0,
        capacity_floor=evidence.campaign.capacity_floor if promised else None,
    )


def _created(
    evidence: Evidence, campaign: CampaignFigures, probe: ProbeRecords | None
) -> tuple[CreatedServer, ...] | None:
    if evidence.created is None:
        return None
    probed = {s.name: s for s in probe.summary.servers} if probe is not None else {}
    before = round(evidence.booted_seconds, 3) if evidence.booted_seconds is not None else None
    seen = (_created_server(name, probed.get(name), campaign) for name in evidence.created)
    return tuple(msgspec.structs.replace(each, booted_before_seconds=before) for each in seen)


def _created_server(name: str, seen: ServerProbe | None, campaign: CampaignFigures) -> CreatedServer:
    if seen is None:
        return CreatedServer(server=name, during=False, seconds=None)
    return CreatedServer(
        server=name,
        during=campaign.began_at <= seen.asked_at <= campaign.ended_at,
        seconds=round(seen.answered_at - seen.asked_at, 3) if seen.answered_at is not None else None,
    )


def _hosts(evidence: Evidence, campaign: CampaignFigures) -> tuple[HostFigures, ...]:
    views = {v.id: v for v in evidence.hosts}
    hosts = evidence.campaign.campaign.hosts
    return tuple(_host(h, views.get(h), evidence.campaign.operations, campaign) for h in hosts)


def _host(
    host: str, view: HostView | None, operations: tuple[OperationRecord, ...], campaign: CampaignFigures
) -> HostFigures:
    """Emptied from its first departure, or from the end of what came before, to its last; then switched."""
    leaving = [o.times for o in operations if o.kind == OperationKind.MOVE and o.source == host and o.times]
    checks = [o for o in operations if o.kind == OperationKind.VERIFY and host in (o.subject, o.source)]
    phases: list[Phase] = []
    if leaving:
        phases.append(
            Phase(
                phase="emptying",
                begin=min(min(t.values()) for t in leaving),
                end=max(max(t.values()) for t in leaving),
            )
        )
    phases.extend(
        Phase(phase="switching", begin=min(o.times.values()), end=max(o.times.values()))
        for o in checks
        if o.times
    )
    well = [o for o in checks if o.state == OperationState.DONE and o.times]
    before = next((o.release_before for o in checks if o.release_before), None) or campaign.from_release
    return HostFigures(
        host=host,
        release_before=before,
        release_after=(view.verified_release if view is not None else None) or "",
        upgraded_at=max((max(o.times.values()) for o in well), default=None),
        phases=tuple(phases),
    )


def _placements(
    evidence: Evidence, campaign: CampaignFigures, moves: tuple[MoveFigures, ...]
) -> tuple[Placement, ...]:
    found: list[Placement] = []
    begun = {v.id for v in evidence.servers_before}
    views = {v.id: v for v in (*evidence.servers_after, *evidence.servers_before)}
    for name in sorted(views):
        own = [m for m in moves if m.server == name and _ended_well(m)]
        at = campaign.began_at if name in begun else max(campaign.began_at, views[name].created_at)
        host = own[0].source if own else views[name].host or ""
        for move in own:
            left = move.switch if move.switch is not None else at
            found.append(Placement(server=name, host=host, begin=at, end=left))
            at, host = left, move.destination
        if host:
            found.append(Placement(server=name, host=host, begin=at, end=max(at, campaign.ended_at)))
    return tuple(found)


def _probe(probe: ProbeRecords | None) -> ProbeFigures | None:
    if probe is None:
        return None
    summary = probe.summary
    return ProbeFigures(
        packets_per_second=summary.packets_per_second,
        scheduling=summary.scheduling,
        cpu_share=summary.cpu_share,
        complete=_complete(probe),
    )


# --- files -------------------------------------------------------------------------------------------


def encode(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def decode(data: bytes) -> Report:
    return msgspec.json.decode(data, type=Report)


def save_evidence(folder: Path, evidence: Evidence) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / EVIDENCE_NAME, msgspec.json.encode(evidence))


def collect(folder: Path) -> Report:
    """From `evidence.json` and `probe/` if they are there; else the report that is there."""
    try:
        if (folder / EVIDENCE_NAME).exists():
            evidence = msgspec.json.decode((folder / EVIDENCE_NAME).read_bytes(), type=Evidence)
            probed = (folder / PROBE_FOLDER / "probe.json").exists()
            return build_report(evidence, read_probe(folder / PROBE_FOLDER) if probed else None)
        return decode((folder / REPORT_NAME).read_bytes())
    except FileNotFoundError as error:
        raise Refused(
            f"neither {EVIDENCE_NAME} nor {REPORT_NAME} is in {folder}",
            field="folder",
            remedy="name the folder of a demo or a campaign report",
        ) from error
    except msgspec.DecodeError as error:
        raise Refused(f"not a report's records: {error}", field="folder") from error


def write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
