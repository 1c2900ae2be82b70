"""What a host says of itself: the inventory, put together from what its drivers and its ledger know."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from nahtlos import __version__
from nahtlos.model.availability import OnHostFailure
from nahtlos.model.config import HostConfig
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.inventory import (
    ComputeStatus,
    HostInventory,
    OperationStatus,
    RunState,
    ServerStatus,
    VolumeStatus,
)
from nahtlos.model.power import PowerState
from nahtlos.model.server_snapshots import MEMORY_SNAPSHOTS
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.converge import Converger
from nahtlos.physical.agent.leases import Leases
from nahtlos.physical.agent.ledger import Hold, Journal, Ownership
from nahtlos.physical.ports import VmmStatus

KNOWS = ("power", "suspend", "guest-agent", "post-copy", MEMORY_SNAPSHOTS)
_NO_VMM = {
    PowerState.ON: RunState.CRASHED,
    PowerState.OFF: RunState.STOPPED,
    PowerState.SUSPENDED: RunState.SUSPENDED,
}
NOT_MEASURED: Mapping[ServerId, int] = {}


def servers_of(
    owned: Mapping[ServerId, Ownership],
    vmms: Iterable[VmmStatus],
    now: float,
    dirty_rates: Mapping[ServerId, int] = NOT_MEASURED,
    enforced: bool = False,
    guests: Mapping[ServerId, GuestStatus] = MappingProxyType({}),
) -> tuple[ServerStatus, ...]:
    """Every server owned here, running or not, and every VMM that waits for one. `enforced`: what needs a
    lease runs only under one."""
    statuses = {(v.id.server, v.id.epoch): v for v in vmms}
    found: list[ServerStatus] = []
    for server, held in owned.items():
        vmm = statuses.pop((server, held.epoch), None)
        if held.hold is Hold.OWNED:
            found.append(
                ServerStatus(
                    id=server,
                    epoch=held.epoch,
                    state=vmm.state if vmm else _NO_VMM[held.server.spec.power.state],
                    release=vmm.release if vmm else None,
                    size=held.server.spec.size,
                    since=now,
                    compute=vmm.compute if vmm else ComputeStatus(),
                    power=held.server.spec.power.serial,
                    saved=held.server.saved if held.server.spec.power.state is PowerState.SUSPENDED else None,
                    dirty_rate=dirty_rates.get(server) if vmm else None,
                    under_lease=enforced and held.server.spec.on_host_failure is OnHostFailure.RESTART,
                    guest=guests.get(server),
                )
            )
    for (server, epoch), vmm in statuses.items():
        held = owned.get(server)
        if held is None or epoch > held.epoch:
            found.append(
                ServerStatus(
                    id=server, epoch=epoch, state=RunState.INCOMING, release=vmm.release, size=vmm.size
                )
            )
    return tuple(found)


def operation_status(journal: Journal, waits_for: str, progress: float) -> OperationStatus:
    return OperationStatus(
        id=journal.id,
        kind=journal.kind,
        state=journal.state,
        step=journal.step,
        server=journal.server,
        volume=next(iter(journal.volumes), None),
        router=journal.router,
        epoch=order.epoch
        if (order := journal.order or journal.replace or journal.gateway or journal.power)
        else 0,
        waits_for=waits_for,
        error=journal.error,
        progress=progress if journal.running else 1.0,
        times=journal.times,
        result=results(journal.notes),
    )


RESULT = "result."
"""Begins those of a journal's notes that are told."""


def results(notes: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(RESULT): text for name, text in notes.items() if name.startswith(RESULT)}


async def _storage_release(
    context: Context, converger: Converger, config: HostConfig | None
) -> ReleaseId | None:
    """Where there is nothing to serve, the one that would serve."""
    runs = await context.drivers.storage.release()
    if config is None or config.volumes or converger.generation != config.generation:
        return runs
    return config.storage_release or runs


async def inventory(
    context: Context,
    converger: Converger,
    journals: Iterable[Journal],
    boot_id: str,
    releases: tuple[ReleaseId, ...],
    leases: Leases,
) -> HostInventory:
    config: HostConfig | None = context.ledger.config()
    vmms = await context.drivers.hypervisor.observe()
    volumes: tuple[VolumeStatus, ...] = await context.drivers.storage.observe()
    verified = context.ledger.verified()
    settings = context.settings
    return HostInventory(
        host=settings.host,
        role=settings.role,
        boot_id=boot_id,
        agent_version=__version__,
        taken_at=context.now(),
        generation=converger.generation,
        target_generation=config.generation if config else 0,
        capacity=settings.capacity,
        releases=releases,
        verified_release=verified.release if verified else None,
        accelerator=verified,
        storage_release=await _storage_release(context, converger, config),
        network_release=await context.drivers.network.release(),
        servers=servers_of(
            context.ledger.ownership(),
            vmms,
            context.now(),
            context.dirty_rates,
            leases.enforced,
            context.guests,
        ),
        volumes=volumes,
        pool=await context.drivers.storage.pool(),
        snapshots=await context.drivers.storage.snapshots(),
        operations=tuple(
            operation_status(j, context.waits.get(j.id, ""), context.progress.get(j.id, 0.0))
            for j in journals
        ),
        load_balancers=await context.drivers.network.load_balancers(),
        disk_problems=tuple(context.disk_problems.values()),
        drift=converger.drift,
        problems=converger.problems,
        knows=KNOWS,
        why_no_post_copy=converger.why_no_post_copy or "",
        no_shares=await context.drivers.hypervisor.why_no_shares(),
        network=converger.network,
        standing=leases.standing(),
    )
