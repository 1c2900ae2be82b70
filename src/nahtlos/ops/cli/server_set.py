"""`nahtlos server set`: more or less of what a running server is given, in one call, and how long each took
until it held.

Of vCPUs, memory and processors the host says itself how long it took. Of ports and disks what is shown is
the time from the cloud's answer until the host was seen to have come to the configuration with it, which is
looked at again and again: an upper bound.
"""

import time
from collections.abc import Callable
from typing import Annotated

import typer
from msgspec import UNSET, UnsetType
from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.values import Value
from nahtlos.ops.cli import amounts, pictures, server_pictures, volume_amounts
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.server_pictures import disks_text, network_text, share_text
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.runtime.controllers.cloud import ServerChange, ServerView

Server = Annotated[str, typer.Argument(metavar="SERVER")]
Quota = Annotated[
    str | None, typer.Option(help="Of one processor, all its vCPUs together: 50%, 200%, or none.")
]
Weight = Annotated[
    int | None, typer.Option(help="1 to 10000, beside other servers' where processors are short.")
]

VCPUS, MEMORY, CPU, NETWORK, DISKS, PIN = "vcpus", "memory", "cpu", "network", "disks", "pin"
MEASURED = (VCPUS, MEMORY, CPU)
"""Which the host measures."""


class Given(Value, frozen=True, kw_only=True):
    """One thing that is different."""

    what: str
    before: str
    after: str
    took_ms: int | None = None
    """Until it held; None: it was not waited for."""


class GivenAll(Value, frozen=True, kw_only=True):
    server: ServerView
    changes: tuple[Given, ...]


def set_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        cpu_quota: Quota = None,
        cpu_weight: Weight = None,
        vcpus: Annotated[int | None, typer.Option(help="Up to what it was created for.")] = None,
        memory: Annotated[
            str | None, typer.Option(help="As 2G, up to what it was created for; a plain number is MiB.")
        ] = None,
        net_in: Annotated[
            str | None, typer.Option(help="What each of its ports may receive: 50M, 1G, or none.")
        ] = None,
        net_out: Annotated[
            str | None, typer.Option(help="What each of its ports may send: 50M, 1G, or none.")
        ] = None,
        iops: Annotated[str | None, typer.Option(help="Of each of its disks, or none.")] = None,
        bandwidth: Annotated[
            str | None, typer.Option(help="Bytes per second of each of its disks: 50M, or none.")
        ] = None,
        blackout_budget: Annotated[
            str | None,
            typer.Option(metavar="MS", help="The longest gap when it is carried elsewhere, or none."),
        ] = None,
        allow_slowdown: Annotated[
            bool | None, typer.Option(help="Slow it down if a move would not end otherwise.")
        ] = None,
        allow_post_copy: Annotated[
            bool | None,
            typer.Option(
                help="If a move would not end otherwise, let it run at its new host before all of its "
                "memory is there: it is lost if the old host fails meanwhile."
            ),
        ] = None,
        on_host_failure: Annotated[
            OnHostFailure | None, typer.Option(help="What becomes of it when its host fails or is emptied.")
        ] = None,
        restart_priority: Annotated[
            int | None, typer.Option(help="Of several that are restarted, the highest first; -100 to 100.")
        ] = None,
        pin: Annotated[
            str | None, typer.Option(metavar="HOST", help="Keep it on this host, where it is.")
        ] = None,
        unpin: Annotated[bool, typer.Option("--unpin", help="It may be moved again.")] = False,
        wait: Annotated[bool, typer.Option(help="Wait until it holds.")] = True,
        deadline: Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)] = 60.0,
    ) -> None:
        """Give a running server more or less: processors, memory, network, disks. All of it or nothing."""
        asked = ServerChange(
            vcpus=UNSET if vcpus is None else vcpus,
            memory_mib=UNSET if memory is None else volume_amounts.mebibytes(memory, "memory_mib"),
            cpu_quota=_limit(cpu_quota, amounts.per_cent, "cpu_quota"),
            cpu_weight=UNSET if cpu_weight is None else cpu_weight,
            net_in=UNSET if net_in is None else amounts.rate(net_in, "net_in"),
            net_out=UNSET if net_out is None else amounts.rate(net_out, "net_out"),
            iops=_limit(iops, volume_amounts.count, "iops"),
            bytes_per_second=_limit(bandwidth, volume_amounts.octets, "bytes_per_second"),
            blackout_budget_ms=UNSET if blackout_budget is None else _milliseconds(blackout_budget),
            allow_slowdown=UNSET if allow_slowdown is None else allow_slowdown,
            allow_post_copy=UNSET if allow_post_copy is None else allow_post_copy,
            on_host_failure=UNSET if on_host_failure is None else on_host_failure,
            restart_priority=UNSET if restart_priority is None else restart_priority,
            pin=_pin(pin, unpin=unpin),
        )
        async with cli.client() as client:
            before = await client.server(ServerId(server))
            view = await client.change_server(ServerId(server), asked)
            changes = differences(before, view)
            if wait:
                watch = Watch(changes)
                view = await wait_until(
                    cli,
                    f"{server} is given it",
                    lambda: client.server(ServerId(server)),
                    watch.holds,
                    lambda seen: standing(seen, changes),
                    deadline=deadline,
                )
                changes = watch.timed(view)
        cli.show(GivenAll(server=view, changes=changes), _picture(view, changes))


def _pin(host: str | None, *, unpin: bool) -> HostId | UnsetType | None:
    if host is not None and unpin:
        raise Refused("both --pin and --unpin are given", field="pin", remedy="give one of them")
    return None if unpin else UNSET if host is None else HostId(host)


def _limit(text: str | None, read: Callable[[str, str], int], field: str) -> int | UnsetType:
    """0, which the cloud takes for no limit, is none only if that is what was written."""
    if text is None:
        return UNSET
    value = read(text, field)
    if not value and text.lower() != amounts.NONE:
        raise Refused(f"a limit of {text}", field=field, remedy="give more than that, or none for no limit")
    return value


def _milliseconds(text: str) -> int | None:
    """None for `none`. Which figures are a budget is the cloud's to say."""
    if text == "none":
        return None
    if not text.lstrip("-").isdecimal():
        raise Refused(
            f"'{text}' is no number of milliseconds",
            field="blackout_budget_ms",
            remedy="give milliseconds as a whole number, or none",
        )
    return int(text)


# --- what is different -------------------------------------------------------------------------------


def differences(before: ServerView, after: ServerView) -> tuple[Given, ...]:
    """Between what was asked for then and is asked for now."""
    texts = {
        VCPUS: (str(before.size.vcpus), str(after.size.vcpus)),
        MEMORY: (f"{before.size.memory_mib} MiB", f"{after.size.memory_mib} MiB"),
        CPU: (share_text(before.cpu), share_text(after.cpu)),
        NETWORK: (network_text(before), network_text(after)),
        DISKS: (disks_text(before), disks_text(after)),
        PIN: (before.pin or "none", after.pin or "none"),
    }
    return tuple(Given(what=what, before=old, after=new) for what, (old, new) in texts.items() if old != new)


# --- until it holds ----------------------------------------------------------------------------------


class Watch:
    """Looks at what is reported, and remembers when the host had converged."""

    def __init__(self, changes: tuple[Given, ...]) -> None:
        self._changes = changes
        self._began = time.monotonic()
        self._converged_ms: int | None = None

    def holds(self, seen: ServerView) -> bool:
        if seen.converged and self._converged_ms is None:
            self._converged_ms = round(1000 * (time.monotonic() - self._began))
        return all(holds(seen, change.what) for change in self._changes)

    def timed(self, seen: ServerView) -> tuple[Given, ...]:
        return tuple(
            Given(
                what=change.what,
                before=change.before,
                after=change.after,
                took_ms=self._took(seen, change.what),
            )
            for change in self._changes
        )

    def _took(self, seen: ServerView, what: str) -> int | None:
        return seen.compute.took_ms.get(what) if what in MEASURED else self._converged_ms


def holds(seen: ServerView, what: str) -> bool:
    has = seen.compute
    if seen.state is not RunState.RUNNING:
        return False
    match what:
        case "vcpus":
            return has.vcpus == seen.size.vcpus
        case "memory":
            return has.memory_mib == seen.size.memory_mib
        case "cpu":
            return has.vcpus > 0 and has.cpu == seen.cpu
        case _:
            return seen.converged


def standing(seen: ServerView, changes: tuple[Given, ...]) -> str:
    """What it waits for, in words."""
    if seen.state is not RunState.RUNNING:
        return seen.waits_for or f"it is {seen.state or 'not seen yet'}"
    if seen.compute.waits_for:
        return seen.compute.waits_for
    late = ", ".join(change.what for change in changes if not holds(seen, change.what))
    where = seen.host or "its host"
    return f"{late}: {where} has not said that it holds; what keeps it from that: nahtlos host show {where}"


def _picture(view: ServerView, changes: tuple[Given, ...]) -> RenderableType:
    columns = ("Given", "Before", "Now", ">Held after")
    rows = ((each.what, each.before, each.after, _took_text(each)) for each in changes)
    return Group(pictures.table(columns, rows, "nothing is different"), Text(), server_pictures.server(view))


def _took_text(change: Given) -> str:
    if change.took_ms is None:
        return "not measured" if change.what in MEASURED else pictures.NOTHING
    return f"{'≤ ' if change.what not in MEASURED else ''}{change.took_ms} ms"
