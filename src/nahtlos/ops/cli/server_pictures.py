"""A server as people read it: where it is, what it is given, and what it has of that. Pure."""

import time
from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from nahtlos.model.nouns import CpuShare, Size
from nahtlos.ops.cli.amounts import rate_text
from nahtlos.ops.cli.pictures import NOTHING, WARN, facts, server_state, size
from nahtlos.ops.cli.volume_pictures import limits_text
from nahtlos.runtime.controllers.cloud import ServerView


def server(view: ServerView) -> RenderableType:
    return facts(
        [
            ("server", view.id),
            ("state", server_state(view)),
            ("host", view.host or NOTHING),
            ("moves to", view.moving_to or NOTHING),
            ("replaced by", view.replaced_by or NOTHING),
            ("waits for", view.waits_for or NOTHING),
            ("project", view.project),
            ("server group", view.group or NOTHING),
            ("pinned to", view.pin or NOTHING),
            ("address", f"{view.ip} ({view.mac})"),
            ("ports", ", ".join(view.ports) or NOTHING),
            ("size", _size(view)),
            ("may have", _most(view)),
            ("processors", _share(view)),
            ("network", network_text(view)),
            ("disks", disks_text(view)),
            ("blackout budget", f"{view.blackout_budget_ms} ms" if view.blackout_budget_ms else NOTHING),
            ("if its host fails", _on_failure(view)),
            ("guest", guest_text(view)),
            ("in the guest", ", ".join(view.guest.addresses) if view.guest else NOTHING),
            ("VMM", view.release or NOTHING),
            ("volume on", view.volume_host),
            ("epoch", str(view.epoch)),
        ]
    )


def _size(view: ServerView) -> Text:
    """As asked for, and what it has if that is something else."""
    text, has = Text(size(view.size)), view.compute
    if not has.vcpus:
        return text
    measured = Size(vcpus=has.vcpus, memory_mib=has.memory_mib)
    if measured != view.size:
        text.append(f"; has {size(measured)}", style=WARN)
    if has.waits_for:
        text.append(f" ({has.waits_for})", style=WARN)
    return text


def _on_failure(view: ServerView) -> str:
    priority = f", priority {view.restart_priority}" if view.restart_priority else ""
    return f"{view.on_host_failure}{priority}"


def _most(view: ServerView) -> str:
    """How far its vCPUs and memory may be changed while it runs."""
    parts = [f"1 to {view.max_vcpus} vCPU"] if view.max_vcpus else []
    parts += [f"{view.boot_memory_mib} to {view.max_memory_mib} MiB"] if view.max_memory_mib else []
    return ", ".join(parts) or "what it has: decided when it was created"


def _share(view: ServerView) -> Text:
    text, has = Text(share_text(view.cpu)), view.compute
    if has.vcpus and has.cpu != view.cpu:
        text.append(f"; has {share_text(has.cpu)}", style=WARN)
    return text


def share_text(cpu: CpuShare) -> str:
    quota = f"{cpu.quota}% of one processor" if cpu.quota else "not limited"
    return f"{quota}, weight {cpu.weight}"


def guest_text(view: ServerView) -> Text:
    """What its agent says of it."""
    guest = view.guest
    if not view.guest_agent:
        return Text("no channel to an agent: decided when it was created")
    if guest is None:
        return Text("its host has not looked yet")
    if not guest.answers:
        known = f"; last heard {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(guest.heard_at))}"
        return Text(f"no agent answers: {guest.why}{known if guest.heard_at else ''}", style=WARN)
    text = Text(f"agent {guest.version} answers")
    if guest.system or guest.kernel:
        text.append(f", {guest.system or 'unknown system'}, kernel {guest.kernel or 'unknown'}")
    if guest.frozen:
        text.append("; file systems frozen", style=WARN)
    return text


def network_text(view: ServerView) -> str:
    return _named(
        (port, f"in {rate_text(each.ingress)}, out {rate_text(each.egress)}")
        for port, each in view.bandwidth.items()
    )


def disks_text(view: ServerView) -> str:
    words = ((volume, limits_text(limits)) for volume, limits in view.limits.items())
    return _named((volume, "not limited" if text == "none" else text) for volume, text in words)


def _named(texts: Iterable[tuple[str, str]]) -> str:
    """Without names where all are alike."""
    known = dict(texts)
    if len(set(known.values())) <= 1:
        return next(iter(known.values()), NOTHING)
    return "; ".join(f"{name}: {text}" for name, text in known.items())
