"""Guests that stand still for a moment while a group of snapshots is taken.

A freeze is in memory only. It ends by `thaw`, by its own time, or with this agent: then the next one finds a
server that stands still though no operation asks for that, and lets it go on first of all. Nothing else
starts, resumes or moves a frozen server meanwhile (`Context.freezes`), so a guest is never resumed here that
has been handed over: a move begins only when the freeze is over.
"""

import asyncio
from collections.abc import Sequence

from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.errors import Conflict, Error, Stale, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context, Freeze
from nahtlos.physical.agent.ledger import Hold, Ownership
from nahtlos.physical.ports import VmmId, VmmStatus
from nahtlos.wire.volumes import VolumeFreeze, VolumeThaw

RESUME_AGAIN_SECONDS = 0.02
RESUME_WITHIN = 2.0
"""After that convergence does it, which looks at everything first."""


def owned(context: Context, server: ServerId, epoch: int = 0) -> Ownership:
    """Conflict unless this host owns the server; Unavailable while an operation of it runs. Who is to be led
    by a copy must tell them apart: a server that no host owns for long counts as gone. `epoch`: by which at
    least: a host that was cut off may not have heard that its server runs elsewhere since."""
    held = context.ledger.owner(server)
    if held is None or held.hold is not Hold.OWNED or held.epoch < epoch:
        raise Conflict(f"{context.settings.host} does not own {server}", field="server")
    running = context.ledger.running(server)
    if running is not None:
        raise Unavailable(f"operation {running.id} of {server} runs", field="server")
    return held


def check_movable(context: Context, held: Ownership, server: ServerConfig) -> None:
    """Before a move of `server` begins at its source. Conflict while it is frozen; Stale if the order was
    made before a volume of it went elsewhere: who has it after the move would look at the old place."""
    if server.spec.id in context.freezes:
        raise Conflict(f"{server.spec.id} is frozen for a snapshot", field="server")
    if held.server.spec.power != server.spec.power:
        raise Stale(f"{server.spec.id} is to be stopped or booted anew first", field="server")
    check_not_frozen(context, server.spec.id)
    check_settled(context, held, server)


def check_settled(context: Context, held: Ownership, server: ServerConfig) -> None:
    """Stale unless it is settled how `server` reaches its volumes, and just as `server` says."""
    if server.spec.id in context.starting:
        raise Stale(f"{server.spec.id} is just being started", field="server")
    check_paths(server, held.server.all_volumes)


def check_paths(server: ServerConfig, volumes: Sequence[VolumeAttachment]) -> None:
    """Stale unless `server` reaches its volumes as `volumes` says. Whoever starts a VMM by what is older may
    read a copy that was given up since, and lacks what the server has written."""
    if [_path(each) for each in server.all_volumes] != [_path(each) for each in volumes]:
        raise Stale(f"{server.spec.id} reaches its volumes otherwise by now", field="server")


def check_not_frozen(context: Context, server: ServerId) -> None:
    """A guest is thawed, and saved, by the host and the VMM that began it."""
    if server in context.guest_freezes:
        raise Conflict(f"the file systems of {server} are frozen for a snapshot", field="server")
    if server in context.saving:
        raise Conflict(f"the memory of {server} is being saved for a snapshot", field="server")


def _path(attachment: VolumeAttachment) -> tuple[object, ...]:
    return (
        attachment.volume,
        attachment.address,
        attachment.port,
        attachment.export,
        attachment.copies,
        attachment.rbd,
    )


async def freeze(context: Context, body: VolumeFreeze) -> None:
    """Returns when the guest stands still: no write of it is on its way any more."""
    held = owned(context, body.server, body.epoch)
    known = context.freezes.get(body.server)
    if known is not None and known.operation != body.id:
        raise Conflict(f"{body.server} is frozen by {known.operation}", field="server")
    if known is not None:
        raise Conflict(f"{body.id} has frozen {body.server} already", field="server")
    state = Freeze(operation=body.id)
    context.freezes[body.server] = state
    vmm = VmmId(body.server, held.epoch)
    try:
        await _stop(context, vmm, state)
    except BaseException:
        await _release(context, vmm, state)
        raise
    context.spawn(_expire(context, vmm, state, body.seconds))


async def _stop(context: Context, vmm: VmmId, state: Freeze) -> None:
    status = await _observed(context, vmm)
    if status is None or status.state in (RunState.CRASHED, RunState.STOPPED):
        return  # it writes nothing, and nobody starts it meanwhile
    if status.disk_problems or status.state not in (RunState.RUNNING, RunState.PAUSED):
        raise Unavailable(f"{vmm.server} is {status.state}, its disks may be behind", field="server")
    await context.drivers.hypervisor.pause(vmm)
    state.stopped = True


async def thaw(context: Context, body: VolumeThaw) -> None:
    state = context.freezes.get(body.server)
    held = context.ledger.owner(body.server)
    if state is None or state.operation != body.id or held is None or state.broken:
        raise Conflict(f"{body.server} was not held still for {body.id}", field="server")
    await _release(context, VmmId(body.server, held.epoch), state)
    if state.broken:
        raise Conflict(f"{body.server} was not held still for {body.id}", field="server")


async def _expire(context: Context, vmm: VmmId, state: Freeze, seconds: float) -> None:
    await asyncio.sleep(seconds)
    if context.freezes.get(vmm.server) is state:
        state.broken = True
        context.say("server.thawed", vmm.server, f"frozen for {seconds:g} s, and nobody asked for more")
        await _release(context, vmm, state)


async def _release(context: Context, vmm: VmmId, state: Freeze) -> None:
    """Let the guest go on; what does not succeed soon is left to convergence."""
    loop = asyncio.get_running_loop()
    until = loop.time() + RESUME_WITHIN
    try:
        while context.freezes.get(vmm.server) is state and loop.time() < until:
            if await _let_go(context, vmm, state):
                return
            await asyncio.sleep(RESUME_AGAIN_SECONDS)
    finally:
        if context.freezes.get(vmm.server) is state:
            del context.freezes[vmm.server]
            context.changed()


async def _let_go(context: Context, vmm: VmmId, state: Freeze) -> bool:
    sure, state.stopped = state.stopped, False
    try:
        if sure:  # nothing is asked first: the guest waits for it
            await context.drivers.hypervisor.resume(vmm)
        else:
            await _resume(context, vmm)
    except Error as error:
        context.say("server.problem", vmm.server, f"not resumed yet: {error}")
        return False
    return True


async def _resume(context: Context, vmm: VmmId) -> None:
    status = await _observed(context, vmm)
    if status is not None and status.state is RunState.PAUSED and not status.sent:
        await context.drivers.hypervisor.resume(vmm)


async def _observed(context: Context, vmm: VmmId) -> VmmStatus | None:
    vmms = await context.drivers.hypervisor.observe()
    return next((each for each in vmms if each.id == vmm), None)
