"""The agent in a simulated guest: as much of QEMU's guest agent protocol as hosts use.

As in truth it answers only while its guest runs, and of what it is told little while file systems are frozen.
"""

import asyncio
from collections.abc import Mapping

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.ports import no_channel
from nahtlos.physical.sim.clock import virtual_loop
from nahtlos.physical.sim.guests import Guest, Vmm
from nahtlos.physical.sim.world import World

VERSION = "sim-1"
WHILE_FROZEN = ("guest-ping", "guest-info", "guest-fsfreeze-status", "guest-fsfreeze-thaw")
COMMANDS = (
    *WHILE_FROZEN,
    "guest-get-time",
    "guest-set-time",
    "guest-get-osinfo",
    "guest-network-get-interfaces",
    "guest-fsfreeze-freeze",
    "guest-shutdown",
)


async def answer(
    world: World, vmm: Vmm, command: str, arguments: Mapping[str, object], within: float
) -> object:
    server = vmm.id.server
    if not vmm.server.spec.guest_agent:
        raise no_channel(vmm.id)
    if server in world.without_agent or not world.facts(server).up:
        raise Unavailable(f"nobody in {server} listens to its agent's channel", field="guest_agent")
    if vmm.guest is None or not vmm.running or server in world.silent:
        await asyncio.sleep(within)
        raise Unavailable(
            f"the guest's agent did not answer {command} within {within:g} s", field="guest_agent"
        )
    if command not in COMMANDS or (vmm.guest.frozen and command not in WHILE_FROZEN):
        raise Refused(f"the guest's agent: Command {command} has been disabled", field="guest_agent")
    world.note(vmm.host, command, server)
    return _carried_out(world, vmm, vmm.guest, command, arguments)


def _carried_out(
    world: World, vmm: Vmm, guest: Guest, command: str, arguments: Mapping[str, object]
) -> object:
    match command:
        case "guest-info":
            return {
                "version": VERSION,
                "supported_commands": [{"name": n, "enabled": True} for n in COMMANDS],
            }
        case "guest-get-time":
            return round((virtual_loop().wall() - guest.behind) * 1e9)
        case "guest-set-time":
            told = arguments.get("time")
            guest.behind = virtual_loop().wall() - (told if isinstance(told, int) else 0) / 1e9
            return {}
        case "guest-get-osinfo":
            return {"id": "sim", "pretty-name": "simulated guest", "kernel-release": "1"}
        case "guest-network-get-interfaces":
            return [_interface(index, port.ip) for index, port in enumerate(vmm.server.spec.ports)]
        case "guest-fsfreeze-status":
            return "frozen" if guest.frozen else "thawed"
        case "guest-fsfreeze-freeze":
            world.disks.use(vmm)
            guest.frozen = True
            return 1
        case "guest-fsfreeze-thaw":
            was, guest.frozen = guest.frozen, False
            world.disks.use(vmm)
            return int(was)
        case "guest-shutdown":
            world.kill_vmm(vmm, "its guest was shut down")
            return {}
        case _:
            return {}


def _interface(index: int, address: str) -> dict[str, object]:
    found = [{"ip-address": address, "ip-address-type": "ipv4", "prefix": 24}] if address else []
    return {"name": f"eth{index}", "ip-addresses": found}
