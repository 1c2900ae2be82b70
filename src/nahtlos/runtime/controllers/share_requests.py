"""Whether a server can have the share of its host's processors that is asked for. Pure; every refusal names
the field and the remedy."""

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import HostInventory, Inventory
from nahtlos.model.nouns import CpuShare, HostRole
from nahtlos.runtime.controllers.state import State

MAX_WEIGHT = 10_000
DEFAULT = CpuShare()


def checked_share(cpu: CpuShare, vcpus: int) -> CpuShare:
    if cpu.quota and not 1 <= cpu.quota <= 100 * vcpus:
        raise Refused(
            f"{cpu.quota}% of a processor for {_words_of_vcpus(vcpus)}",
            field="cpu_quota",
            remedy=f"give 1 to {100 * vcpus}, or none for no limit",
        )
    if not 1 <= cpu.weight <= MAX_WEIGHT:
        raise Refused(f"a weight of {cpu.weight}", field="cpu_weight", remedy=f"give 1 to {MAX_WEIGHT}")
    return cpu


def _words_of_vcpus(vcpus: int) -> str:
    return "1 vCPU" if vcpus == 1 else f"{vcpus} vCPUs"


def check_shares(state: State, inventory: Inventory, server: ServerId, cpu: CpuShare) -> None:
    """Conflict if the server's host has told that it can share its processors by nothing but the default."""
    owner = state.blueprint.servers.get(server) if state.blueprint else None
    seen = inventory.hosts.get(owner.host) if owner is not None else None
    if seen is None or not seen.no_shares or cpu == DEFAULT:
        return
    able = sorted(host for host, each in inventory.hosts.items() if _can_share(each))
    raise _no_shares(cpu, seen, f"nahtlos server move {server} --to {able[0]}" if able else "")


def check_shares_somewhere(inventory: Inventory, cpu: CpuShare, asked: HostId | None) -> None:
    """Of a server that is to be created: Conflict if the host that was asked for cannot, or none can."""
    hosts = [each for _, each in sorted(inventory.hosts.items()) if each.role is HostRole.COMPUTE]
    hosts = [each for each in hosts if asked in (None, each.host)]
    if cpu != DEFAULT and hosts and not any(_can_share(each) for each in hosts):
        raise _no_shares(cpu, hosts[0], "")


def _can_share(seen: HostInventory) -> bool:
    return seen.role is HostRole.COMPUTE and not seen.no_shares


def _no_shares(cpu: CpuShare, seen: HostInventory, elsewhere: str) -> Conflict:
    what = f"{cpu.quota}% of a processor" if cpu.quota else f"a weight of {cpu.weight}"
    make = f"let the agent of {seen.host} see control groups with the cpu controller that it may write"
    return Conflict(
        f"{seen.host} cannot give {what}: {seen.no_shares}",
        field="cpu_quota" if cpu.quota else "cpu_weight",
        remedy=f"{make}; or move it first: {elsewhere}" if elsewhere else make,
    )
