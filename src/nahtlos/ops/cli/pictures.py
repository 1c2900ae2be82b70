"""Results as people read them: tables and short texts. Pure: values in, renderables out."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nahtlos.model.blueprint import (
    CampaignState,
    CapacityReport,
    Forecast,
    HostIntent,
    HostPhase,
    OperationRecord,
    Waiting,
    WaitKind,
)
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import HostInventory, OperationState, RunState
from nahtlos.model.nouns import Component, Release, Size
from nahtlos.model.operators import Listed
from nahtlos.ops.cli import placement_pictures, upgrade_pictures
from nahtlos.runtime.controllers.cloud import CampaignView, HostView, ServerView, Status
from nahtlos.runtime.evidence.figures import count_of
from nahtlos.runtime.evidence.foretold import predictions
from nahtlos.runtime.evidence.text import exactness

GOOD, WARN, BAD, SOFT = "green", "yellow", "bold red", "dim"
NOTHING = "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], empty: str) -> RenderableType:
    """Columns whose title begins with `>` are aligned right."""
    lines = list(rows)
    if not lines:
        return Text(empty, style=SOFT)
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=SOFT)
    for title in columns:
        drawn.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    for line in lines:
        drawn.add_row(*(_text(cell) for cell in line))
    return drawn


def facts(pairs: Iterable[tuple[str, str | Text]]) -> RenderableType:
    drawn = Table.grid(padding=(0, 2, 0, 0))
    for name, value in pairs:
        drawn.add_row(Text(name, style=SOFT), _text(value))
    return drawn


def _text(value: str | Text) -> Text:
    """Plain strings are shown as they are: they are data, not markup."""
    return Text(value) if isinstance(value, str) else value


def short(release: ReleaseId | None) -> str:
    """A release without its digest: `qemu-11.1.3`."""
    return release.rsplit("-", 1)[0] if release else NOTHING


def size(value: Size) -> str:
    return f"{value.vcpus} vCPU, {value.memory_mib} MiB"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


# --- hosts -------------------------------------------------------------------------------------------


def hosts(views: Sequence[HostView]) -> RenderableType:
    columns = ("Host", "Role", "State", "Domain", "Address", "Release", ">Servers", ">vCPU", ">Memory MiB")
    return table(columns, (_host_row(view) for view in views), "no host has joined yet")


def _host_row(view: HostView) -> tuple[str | Text, ...]:
    return (
        view.id,
        view.role,
        _host_state(view),
        view.domain or NOTHING,
        view.address,
        short(view.release),
        str(len(view.servers)),
        f"{view.used.vcpus}/{view.capacity.vcpus}",
        f"{view.used.memory_mib}/{view.capacity.memory_mib}",
    )


def _host_state(view: HostView) -> Text:
    text = Text(view.phase, style=GOOD if view.phase is HostPhase.SERVING else WARN)
    if view.intent is HostIntent.DRAINED and view.phase is not HostPhase.DRAINED:
        text.append(" (drains)", style=SOFT)
    if not view.connected:
        text.append(f" {view.failure or 'disconnected'}", style=BAD)
    elif view.generation != view.target_generation:
        text.append(" converging", style=SOFT)
    return text


def host(view: HostView) -> RenderableType:
    accelerator = view.accelerator
    parts: list[RenderableType] = [
        facts(
            [
                ("host", view.id),
                ("role", view.role),
                ("state", _host_state(view)),
                ("intent", view.intent),
                ("failure domain", view.domain or "its own"),
                ("address", view.address),
                ("release", view.release or NOTHING),
                ("verified", view.verified_release or NOTHING),
                ("accelerator", f"{accelerator.name}: {accelerator.reason}" if accelerator else NOTHING),
                ("capacity", f"{size(view.used)} of {size(view.capacity)}"),
                ("configuration", f"{view.generation} of {view.target_generation}"),
                ("servers", ", ".join(view.servers) or NOTHING),
                ("volumes", _kept(view)),
            ]
        )
    ]
    if view.inventory is not None:
        parts += _observed(view.inventory)
    return Group(*parts)


def _kept(view: HostView) -> str:
    """Volumes with a copy here, and snapshots; while they leave, what is left and for how long."""
    kept = view.kept
    names = ", ".join((*kept.volumes, *(f"{name} (snapshot)" for name in kept.snapshots)))
    return (f"{names}; {leaving(view)}" if kept.leaving else names) or NOTHING


def leaving(view: HostView) -> str:
    kept = view.kept
    pace = f" at {kept.bytes_per_second / (1 << 20):.1f} MiB/s" if kept.bytes_per_second else ""
    time = f", about {seconds(kept.seconds_left)} more" if kept.seconds_left is not None else ""
    return f"{kept.bytes_left / (1 << 20):.0f} MiB to go elsewhere{pace}{time}"


def _network_lines(inventory: HostInventory) -> list[Text]:
    """What the network driver of a host uses, and what it lacks."""
    return [
        Text(f"network: {subject}: {words}", style=WARN if words.startswith("missing") else SOFT)
        for subject, words in sorted(inventory.network.items())
    ]


def _observed(inventory: HostInventory) -> list[RenderableType]:
    running = [o for o in inventory.operations if o.state is OperationState.RUNNING]
    lines = [Text(f"{o.kind} {o.server or ''}: {o.step} {o.waits_for}".rstrip()) for o in running]
    lines += [Text(f"drift: {text}", style=WARN) for text in inventory.drift]
    lines += [Text(f"problem: {problem.raised()}", style=BAD) for problem in inventory.problems]
    lines += _network_lines(inventory)
    return [Text(), *lines] if lines else []


# --- releases ----------------------------------------------------------------------------------------


def releases(values: Sequence[Release]) -> RenderableType:
    columns = ("Release", "Version", "Suite", ">MiB", "Machine types")
    rows = ((r.id, r.version, r.suite, str(r.size_mib), f"up to {_newest(r.machine_types)}") for r in values)
    return table(columns, rows, "no release is registered; `nahtlos release build`")


def _newest(machine_types: tuple[str, ...]) -> str:
    """The newest of the machine types our servers have."""
    ours = [m for m in machine_types if re.fullmatch(r"pc-q35-[0-9.]+", m)]
    return max(ours, key=_numbers, default=NOTHING)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", text)]


def release(value: Release) -> RenderableType:
    artifacts = table(
        ("Package", "Version", "sha256"),
        ((a.name, a.version, a.sha256[:12]) for a in value.artifacts),
        "no packages recorded",
    )
    return Group(
        facts(
            [
                ("release", value.id),
                ("component", value.component),
                ("version", value.version),
                ("suite", value.suite),
                ("digest", value.digest),
                ("machine types", ", ".join(value.machine_types)),
                ("size", f"{value.size_mib} MiB"),
            ]
        ),
        Text(),
        artifacts,
    )


# --- servers -----------------------------------------------------------------------------------------


def servers(views: Sequence[ServerView]) -> RenderableType:
    columns = ("Server", "State", "Host", "Address", "VMM", ">vCPU", ">MiB", "Volume on", "Waits for")
    return table(columns, (_server_row(v) for v in views), "no servers yet; `nahtlos server create NAME`")


def _server_row(view: ServerView) -> tuple[str | Text, ...]:
    where = view.host or NOTHING
    return (
        view.id,
        server_state(view),
        f"{where} → {view.moving_to}" if view.moving_to else where,
        view.ip,
        short(view.release),
        str(view.size.vcpus),
        str(view.size.memory_mib),
        view.volume_host,
        view.waits_for,
    )


def server_state(view: ServerView) -> Text:
    if view.state is None:
        return Text("not seen yet", style=SOFT)
    styles = {RunState.RUNNING: GOOD, RunState.CRASHED: BAD}
    return Text(view.state, style=styles.get(view.state, WARN))


# --- upgrades ----------------------------------------------------------------------------------------


def forecast(plan: Forecast) -> RenderableType:
    """A dry run: what would be done in which order, how long it takes, what is in the way."""
    columns = (">", "Host", "From", "To", "Moves", ">Seconds", ">Brownout s", ">Gap ms", ">Worst")
    parts: list[RenderableType] = [
        table(
            columns, _forecast_rows(plan), "no host could be upgraded" if plan.blockers else "nothing to do"
        ),
        Text(),
        Text.assemble(
            ("Predicted: ", "bold"),
            f"{count_of(plan.total_moves, 'move')} ({plan.moves_per_server:.2f} per server), "
            f"{seconds(plan.seconds)}, "
            f"gap {plan.gap_ms_p50:.0f} ms (median), capacity never below {plan.capacity_floor:.0%}",
        ),
        Text(f"from {plan.basis}{upgrade_pictures.exactness(plan)}", style=SOFT),
    ]
    if servers := upgrade_pictures.ways(plan):
        parts += [Text(), servers]
    if plan.component is Component.HYPERVISOR:
        parts += [Text(upgrade_pictures.point_of_no_return(plan), style=SOFT)]
    if plan.ways_back:
        parts += [Text(f"the way back: {'; '.join(plan.ways_back)}", style=SOFT)]
    if plan.reserve is not None:
        parts += [Text.assemble(("Reserve: ", "bold"), placement_pictures.reserve_line(plan.reserve))]
    if plan.obstacles:
        parts += [Text(), placement_pictures.obstacles(plan.obstacles)]
    if plan.blockers:
        parts += [Text(), Text("Blocked:", style=BAD), waiting(plan.blockers)]
    return Group(*parts)


def _forecast_rows(plan: Forecast) -> Iterable[tuple[str | Text, ...]]:
    for number, step in enumerate(plan.hosts, 1):
        head = (str(number), step.host, short(step.from_release), short(step.to_release))
        yield (
            *head,
            _moved(plan, len(step.moves)),
            f"{step.seconds:.1f}",
            "",
            "",
            "",
        )
        for move in step.moves:
            what = upgrade_pictures.place(move)
            figures = (
                f"{move.seconds:.1f}",
                f"{move.brownout_seconds:.1f}",
                f"{move.gap_ms:.0f}",
                f"{move.gap_ms_max:.0f}",
            )
            yield ("", "", "", "", *(Text(part, style=SOFT) for part in (what, *figures)))


def _moved(plan: Forecast, moves: int) -> str:
    if plan.component is not Component.HYPERVISOR:
        return "stays in use"
    return count_of(moves, "move") if moves else "empty"


def waiting(steps: Sequence[Waiting]) -> RenderableType:
    lines: list[Text] = []
    for step in steps:
        line = Text.assemble(
            (f"{step.subject}: ", BAD if step.kind is WaitKind.BLOCKED else WARN), step.reason
        )
        if step.remedy:
            line.append(f"\n  → {step.remedy}", style="cyan")
        lines.append(line)
    return Group(*lines)


_CAMPAIGN_STYLE = {CampaignState.DONE: GOOD, CampaignState.PAUSED: WARN, CampaignState.CANCELLED: BAD}


def campaign(view: CampaignView) -> RenderableType:
    value = view.campaign
    took = f" in {seconds(value.ended_at - value.created_at)}" if value.ended_at else ""
    parts: list[RenderableType] = [
        facts(
            [
                ("campaign", value.id),
                ("component", value.component),
                ("strategy", value.strategy if value.component is Component.HYPERVISOR else NOTHING),
                ("state", Text.assemble((value.state, _CAMPAIGN_STYLE.get(value.state, "")), took)),
                ("from", ", ".join(short(r) for r in value.from_releases) or NOTHING),
                ("to", value.to_release),
                ("way back", upgrade_pictures.way_back(value) or NOTHING),
                ("hosts", f"{view.hosts_upgraded} of {view.hosts_total} upgraded"),
                ("moves", _moves(view)),
                ("capacity", _capacity(view.capacity, view.capacity_floor)),
            ]
        )
    ]
    if view.running:
        parts += [
            Text(),
            *(Text(f"{o.server or o.id}: {o.kind}, {o.step} {o.waits_for}") for o in view.running),
        ]
    if view.waiting:
        parts += [Text(), waiting(view.waiting)]
    return Group(*parts)


def _moves(view: CampaignView) -> Text:
    text = Text(f"{view.moves_done} of about {view.moves_total_forecast}")
    if view.moves_failed:
        text.append(f", {view.moves_failed} undone", style=WARN)
    return text


def _capacity(report: CapacityReport, floor: float) -> str:
    return f"{report.share:.0%} of what is promised ({size(report.promised)}); never below {floor:.0%}"


def campaign_report(view: CampaignView) -> RenderableType:
    """A campaign and everything that ended in it."""
    columns = (
        "Operation",
        "Subject",
        "State",
        "From",
        "To",
        ">Seconds",
        ">Predicted",
        ">Pause",
        ">Predicted",
        "Reason",
    )
    rows = (_operation_row(operation) for operation in view.operations)
    told = exactness(predictions(view.operations, {}))
    return Group(campaign(view), Text(), table(columns, rows, "nothing has ended in it yet"), *told)


def _operation_row(record: OperationRecord) -> tuple[str | Text, ...]:
    times = record.times.values()
    took = f"{max(times) - min(times):.1f}" if record.times else ""
    good = record.state == OperationState.DONE
    why = record.error.message if record.error else record.reason
    return (
        record.kind,
        record.subject,
        Text(record.state, style=GOOD if good else BAD),
        record.source or "",
        record.destination or "",
        took,
        f"{record.predicted.seconds:.1f}" if record.predicted else "",
        *_pauses(record),
        why,
    )


def _pauses(record: OperationRecord) -> tuple[str, str]:
    """In milliseconds, as measured and as predicted."""
    stopped, running = record.times.get("stopped"), record.times.get("running")
    return (
        f"{(running - stopped) * 1000:.0f} ms" if stopped is not None and running is not None else "",
        f"{record.predicted.pause_ms:.0f} ms" if record.predicted else "",
    )


# --- operators ---------------------------------------------------------------------------------------


def operators(listed: Sequence[Listed]) -> RenderableType:
    rows = ((operator.name, str(operator.tokens)) for operator in listed)
    return table(
        ("Operator", ">Tokens"), rows, "no operator elsewhere; `nahtlos operator add NAME --out FILE`"
    )


# --- the cloud ---------------------------------------------------------------------------------------


def status(value: Status) -> RenderableType:
    parts: list[RenderableType] = [
        facts(
            [
                ("version", value.version),
                ("orchestrator", f"epoch {value.orchestrator_epoch}{'' if value.leader else ', not leader'}"),
                ("blueprint", value.blueprint),
                ("converged", Text("yes", style=GOOD) if value.converged else Text("no", style=WARN)),
                ("capacity", f"{value.capacity.share:.0%} of what is promised"),
                ("reserve", placement_pictures.reserve_line(value.capacity.reserve)),
            ]
        )
    ]
    if value.waiting:
        parts += [Text(), waiting(value.waiting)]
    return Group(*parts)
