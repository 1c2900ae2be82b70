"""Guests whose file systems stand still for a moment, so that a snapshot holds them whole.

    (none) --freeze--> FROZEN --thaw--> (none)          in time, and frozen all the while
                          `--expired, or the guest thawed by itself--> broken --thaw: Conflict--> (none)

A freeze is in memory only. It ends by `thaw`, by its own time, or with this agent: the guest itself remembers
that it is frozen, so the next look at it (`keeper`) finds that no operation asks for that and thaws it. A
guest that does not answer when it is to be thawed is asked again and again by the same means. While one is
frozen its server begins no move here.
"""

import asyncio

from nahtlos.model.errors import Conflict, Error, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context, Freeze
from nahtlos.physical.agent.guests import asking
from nahtlos.physical.agent.volumes.freeze import owned
from nahtlos.physical.ports import VmmId
from nahtlos.wire.volumes import GuestFreeze, GuestThaw


async def freeze(context: Context, body: GuestFreeze) -> None:
    """Returns when the guest says that its file systems stand still."""
    held = owned(context, body.server, body.epoch)
    known = context.guest_freezes.get(body.server)
    if known is not None:
        raise Conflict(f"{body.server} is frozen by {known.operation}", field=asking.FIELD)
    vmm = VmmId(body.server, held.epoch)
    state = Freeze(operation=body.id)
    context.guest_freezes[body.server] = state
    try:
        await _check_runs(context, vmm)
        async with asyncio.timeout(body.seconds):
            await asking.freeze(context.drivers.hypervisor, vmm)
        state.stopped = True
    except BaseException as error:
        await _let_go(context, vmm, state)
        if isinstance(error, TimeoutError):
            raise Unavailable(f"{body.server} was not frozen within {body.seconds:g} s") from None
        raise
    context.spawn(_expire(context, vmm, state, body.seconds))


async def _check_runs(context: Context, vmm: VmmId) -> None:
    vmms = await context.drivers.hypervisor.observe()
    status = next((each for each in vmms if each.id == vmm), None)
    if status is None or status.state is not RunState.RUNNING:
        raise Unavailable(f"{vmm.server} does not run: its agent answers nobody", field=asking.FIELD)


async def thaw(context: Context, body: GuestThaw) -> None:
    """Conflict if the guest has not been frozen all the while; it is thawed in any case."""
    state = context.guest_freezes.get(body.server)
    held = context.ledger.owner(body.server)
    if state is None or state.operation != body.id or held is None:
        raise Conflict(f"{body.server} was not frozen for {body.id}", field=asking.FIELD)
    vmm = VmmId(body.server, held.epoch)
    try:
        still = not state.broken and await asking.is_frozen(context.drivers.hypervisor, vmm)
    except Error:
        still = False
    await _let_go(context, vmm, state)
    if not still or state.broken:
        raise Conflict(f"{body.server} was not frozen all the while for {body.id}", field=asking.FIELD)


async def _expire(context: Context, vmm: VmmId, state: Freeze, seconds: float) -> None:
    await asyncio.sleep(seconds)
    if context.guest_freezes.get(vmm.server) is state:
        state.broken = True
        context.say("guest.thawed", vmm.server, f"frozen for {seconds:g} s, and nobody asked for more")
        await _let_go(context, vmm, state)


async def _let_go(context: Context, vmm: VmmId, state: Freeze) -> None:
    """What does not succeed at once is the keeper's."""
    try:
        await asking.thaw(context.drivers.hypervisor, vmm)
    except Error as error:
        context.guest_thaws.add(vmm.server)
        context.say("guest.problem", vmm.server, f"not thawed yet: {error}")
    finally:
        forget(context, vmm.server, state)


def forget(context: Context, server: ServerId, state: Freeze) -> None:
    if context.guest_freezes.get(server) is state:
        del context.guest_freezes[server]
