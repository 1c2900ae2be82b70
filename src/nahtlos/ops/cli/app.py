"""The command line but for labs, which `entry.cli` adds."""

import typer

from nahtlos.ops.cli.backups import backup_commands
from nahtlos.ops.cli.balancers import load_balancer_commands
from nahtlos.ops.cli.command import Surroundings, shared_options
from nahtlos.ops.cli.hosts import host_commands
from nahtlos.ops.cli.images import image_commands
from nahtlos.ops.cli.machine import machine_commands
from nahtlos.ops.cli.move_limits import moves_command
from nahtlos.ops.cli.networks import network_commands, subnet_commands
from nahtlos.ops.cli.operations import operation_commands
from nahtlos.ops.cli.operators import operator_commands
from nahtlos.ops.cli.ports import port_commands
from nahtlos.ops.cli.projects import project_commands
from nahtlos.ops.cli.releases import release_commands
from nahtlos.ops.cli.reserve import reserve_command
from nahtlos.ops.cli.routers import floating_ip_commands, router_commands
from nahtlos.ops.cli.security import security_group_commands
from nahtlos.ops.cli.server_groups import server_group_commands
from nahtlos.ops.cli.servers import server_commands
from nahtlos.ops.cli.snapshots import snapshot_commands
from nahtlos.ops.cli.upgrades import upgrade_commands
from nahtlos.ops.cli.volumes import volume_commands

HELP = "nahtlos: a software-defined cloud that is upgraded while it runs."
EPILOG = "Exit codes: 0 done, 1 a promise broken or failed, 2 refused, 3 unavailable, 4 stale."


def build_app(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(
        name="nahtlos", help=HELP, epilog=EPILOG, no_args_is_help=True, pretty_exceptions_enable=False
    )
    shared_options(app)
    app.add_typer(host_commands(surroundings), name="host")
    app.add_typer(release_commands(surroundings), name="release")
    app.add_typer(server_commands(surroundings), name="server")
    app.add_typer(server_group_commands(surroundings), name="server-group")
    app.add_typer(project_commands(surroundings), name="project")
    app.add_typer(volume_commands(surroundings), name="volume")
    app.add_typer(snapshot_commands(surroundings), name="snapshot")
    app.add_typer(image_commands(surroundings), name="image")
    app.add_typer(backup_commands(surroundings), name="backup")
    app.add_typer(network_commands(surroundings), name="network")
    app.add_typer(subnet_commands(surroundings), name="subnet")
    app.add_typer(port_commands(surroundings), name="port")
    app.add_typer(security_group_commands(surroundings), name="security-group")
    app.add_typer(router_commands(surroundings), name="router")
    app.add_typer(floating_ip_commands(surroundings), name="floating-ip")
    app.add_typer(load_balancer_commands(surroundings), name="load-balancer")
    app.add_typer(upgrade_commands(surroundings), name="upgrade")
    app.add_typer(operation_commands(surroundings), name="operation")
    app.add_typer(operator_commands(surroundings), name="operator")
    reserve_command(app, surroundings)
    moves_command(app, surroundings)
    machine_commands(app, surroundings)
    return app
