"""`nahtlos server …`"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.errors import NotFound
from nahtlos.model.ids import HostId, ImageId, ProjectId, ReleaseId, ServerGroupId, ServerId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import DATA_PLACES, CpuShare
from nahtlos.model.storage import DiskLimits, VolumeFormat
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.amounts import per_cent, port_request
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.consoles import console_command
from nahtlos.ops.cli.power import power_commands
from nahtlos.ops.cli.server_pictures import server as server_picture
from nahtlos.ops.cli.server_set import Quota, Weight, set_command
from nahtlos.ops.cli.server_snapshots import revert_command
from nahtlos.ops.cli.settled import Project
from nahtlos.ops.cli.volume_amounts import count, mebibytes, octets
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerRequest, ServerView

Server = Annotated[str, typer.Argument(metavar="SERVER")]
Wait = Annotated[bool, typer.Option(help="Wait until it is done.")]
Deadline = Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)]


def server_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Servers: what customers run.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All servers, where they run and what they wait for."""
        async with cli.client() as client:
            views = await client.servers()
        cli.show(views, pictures.servers(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, server: Server) -> None:  # pyright: ignore[reportUnusedFunction]
        """One server."""
        async with cli.client() as client:
            view = await client.server(ServerId(server))
        cli.show(view, server_picture(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        vcpus: Annotated[int, typer.Option(min=1)] = 1,
        memory_mib: Annotated[int, typer.Option(min=1)] = 256,
        volume_mib: Annotated[int, typer.Option(min=1)] = 160,
        image: Annotated[str | None, typer.Option(help="Needed if there are several.")] = None,
        host: Annotated[str | None, typer.Option(help="Start it on this host.")] = None,
        group: Annotated[str | None, typer.Option(help="The server group it is in.")] = None,
        pin: Annotated[
            str | None, typer.Option(metavar="HOST", help="Start it on this host, and keep it there.")
        ] = None,
        network: Annotated[
            list[str] | None,
            typer.Option(
                help="A port in this network (repeat for several): NET[,ip=A][,group=G][,address=A]"
                "[,pair=CIDR][,mac=M][,ingress=50M][,egress=50M][,queues=2]."
            ),
        ] = None,
        volume: Annotated[
            list[str] | None, typer.Option(help="A data volume it has from the start; repeatable.")
        ] = None,
        replicas: Annotated[int, typer.Option(help="Copies of its system disk.", min=1)] = 1,
        blackout_budget: Annotated[
            int | None,
            typer.Option(
                metavar="MS",
                help="The longest gap its clients may see when it is carried elsewhere; what is predicted to "
                "take longer is not begun.",
            ),
        ] = None,
        allow_slowdown: Annotated[
            bool, typer.Option("--allow-slowdown", help="Slow it down if a move would not end otherwise.")
        ] = False,
        on_host_failure: Annotated[
            OnHostFailure, typer.Option(help="What becomes of it when its host fails or is emptied.")
        ] = OnHostFailure.EVACUATE_ONLY,
        restart_priority: Annotated[
            int, typer.Option(help="Of several that are restarted, the highest first; -100 to 100.")
        ] = 0,
        allow_post_copy: Annotated[
            bool,
            typer.Option(
                "--allow-post-copy",
                help="If a move would not end otherwise, let it run at its new host before all of its "
                "memory is there: it is lost if the old host fails meanwhile.",
            ),
        ] = False,
        display: Annotated[
            bool, typer.Option("--display", help="With a graphics card: `server console --vnc` shows it.")
        ] = False,
        volume_format: Annotated[VolumeFormat, typer.Option(help="Of its system disk.")] = VolumeFormat.RAW,
        user_data: Annotated[
            typer.FileText | None,
            typer.Option(help="File for the guest's cloud-init: #cloud-config, or a script; - is stdin."),
        ] = None,
        data_places: Annotated[
            int, typer.Option(help="How many data volumes it can have, 2 to 8; decided once.")
        ] = DATA_PLACES,
        max_vcpus: Annotated[
            int, typer.Option(help="How far its vCPUs may be raised while it runs; 0: not at all.", min=0)
        ] = 0,
        max_memory: Annotated[
            str, typer.Option(help="How far its memory may be raised while it runs, as 2G; 0: not at all.")
        ] = "0",
        cpu_quota: Quota = None,
        cpu_weight: Weight = None,
        iops: Annotated[str | None, typer.Option(help="Of its system disk, or none.")] = None,
        bandwidth: Annotated[
            str | None, typer.Option(help="Bytes per second of its system disk: 50M, or none.")
        ] = None,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = 120.0,
    ) -> None:
        """Create a server and boot it."""
        request = ServerRequest(
            name=name,
            vcpus=vcpus,
            memory_mib=memory_mib,
            volume_mib=volume_mib,
            image=ImageId(image) if image else None,
            host=HostId(host) if host else None,
            project=ProjectId(project),
            volumes=tuple(VolumeId(name) for name in volume or ()),
            copies=replicas,
            volume_format=volume_format,
            user_data=user_data.read() if user_data else "",
            networks=tuple(port_request(text) for text in network or ()),
            data_places=data_places,
            max_vcpus=max_vcpus,
            max_memory_mib=mebibytes(max_memory, "max_memory_mib"),
            cpu=CpuShare(
                quota=per_cent(cpu_quota, "cpu_quota") if cpu_quota else 0,
                weight=CpuShare().weight if cpu_weight is None else cpu_weight,
            ),
            limits=DiskLimits(
                iops=count(iops, "iops") if iops else 0,
                bytes=octets(bandwidth, "bytes_per_second") if bandwidth else 0,
            ),
            blackout_budget_ms=blackout_budget,
            allow_slowdown=allow_slowdown,
            display=display,
            on_host_failure=on_host_failure,
            restart_priority=restart_priority,
            allow_post_copy=allow_post_copy,
            group=ServerGroupId(group) if group else None,
            pin=HostId(pin) if pin else None,
        )
        async with cli.client() as client:
            view = await client.create_server(request)
            if wait:
                view = await _until(cli, client, view, f"{name} starts", _runs, deadline)
        cli.show(view, server_picture(view))

    set_command(app, surroundings)
    power_commands(app, surroundings)
    revert_command(app, surroundings)

    @command(app, "move", surroundings)
    async def move(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        to: Annotated[
            str | None,
            typer.Option(help="Destination; chosen if not named."),
        ] = None,
        wait: Wait = True,
        deadline: Deadline = 180.0,
    ) -> None:
        """Move a server to another host while it runs."""
        async with cli.client() as client:
            before = await client.server(ServerId(server))
            view = await client.move_server(ServerId(server), HostId(to) if to else None)
            if wait:
                view = await _until(
                    cli, client, view, f"{server} moves", lambda seen: _moved(before, to, seen), deadline
                )
        cli.show(view, server_picture(view))

    @command(app, "replace-vmm", surroundings)
    async def replace_vmm(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        release: Annotated[
            str | None,
            typer.Option(help="Release of the VMM that takes it over; its host's if not named."),
        ] = None,
        wait: Wait = True,
        deadline: Deadline = 120.0,
    ) -> None:
        """Replace a server's hypervisor where it is, while it runs. Its memory is shared, not copied."""
        async with cli.client() as client:
            view = await client.replace_vmm(ServerId(server), ReleaseId(release) if release else None)
            wanted = view.replaced_by
            if wait:
                view = await _until(
                    cli, client, view, f"{server} is replaced", lambda seen: _replaced(seen, wanted), deadline
                )
        cli.show(view, server_picture(view))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        wait: Wait = True,
        deadline: Deadline = 60.0,
    ) -> None:
        """Delete a server and its system disk. Its data volumes stay, attached to nothing."""
        if not yes and not cli.json and sys.stdin.isatty():
            typer.confirm(f"Delete {server} and its volume?", abort=True, err=True)
        async with cli.client() as client:
            view = await client.delete_server(ServerId(server))
            if wait:
                await wait_until(
                    cli,
                    f"{server} is deleted",
                    lambda: _absent(client, ServerId(server)),
                    lambda gone: gone,
                    lambda _: "still there",
                    deadline=deadline,
                )
        cli.show(view, Text(f"{server} {'deleted' if wait else 'will be deleted'}"))

    console_command(app, surroundings)

    return app


async def _until(
    cli: Cli,
    client: OperatorClient,
    view: ServerView,
    what: str,
    done: Callable[[ServerView], bool],
    deadline: float,
) -> ServerView:
    return await wait_until(cli, what, lambda: client.server(view.id), done, _standing, deadline=deadline)


def _replaced(view: ServerView, by: ReleaseId | None) -> bool:
    return view.release == by and view.replaced_by is None


def _runs(view: ServerView) -> bool:
    return view.state is RunState.RUNNING and view.host is not None and view.moving_to is None


def _moved(before: ServerView, to: str | None, seen: ServerView) -> bool:
    """It runs where it shall; without a destination, anywhere but where it was."""
    if seen.moving_to is not None or seen.state is not RunState.RUNNING:
        return False
    return seen.host == to if to else seen.host != before.host


def _standing(view: ServerView) -> str:
    if view.waits_for:
        return view.waits_for
    if view.moving_to:
        return f"{view.host} → {view.moving_to}"
    return view.state or "not seen yet"


async def _absent(client: OperatorClient, server: ServerId) -> bool:
    try:
        await client.server(server)
    except NotFound:
        return True
    return False
