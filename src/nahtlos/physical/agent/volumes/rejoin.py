"""What the end of a VMM means to the copies it wrote to.

A VMM that ended while it wrote: its copies may differ in what was on its way. One is read from then on; that
the others are stale is recorded before the guest runs, so that none of them is ever read instead. They come
back by what differs (`rebuild`).

A copy whose memory of its own writes is gone can still come back by what the others remember, if the VMM that
wrote to it has run on since: whatever was on its way to the lost copy it has written again to the others.

Owns facts of the ledger: which losses a VMM has run through, and servers of which no write can be on its way.
Never decides by itself which copies count: that is recorded by the orchestrator (`replicas.record_loss`).
"""

import asyncio
from contextlib import suppress

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, NotFound
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Ledger
from nahtlos.physical.agent.volumes.freeze import owned
from nahtlos.physical.agent.volumes.replicas import PREFIX, place, ran_on, record_loss, without_lost
from nahtlos.physical.ports import DiskProblem, DiskTrouble, VmmId

FRESH = "fresh/"
"""Servers that never ran, or that stood still before they were ended for good."""
STILL_WITHIN = 8.0
"""A copy that hangs is cut off within a few seconds."""


# --- decisions -----------------------------------------------------------------------------------------


def candidates(attachment: VolumeAttachment, here: HostId) -> tuple[VolumeEndpoint, ...]:
    """Copies one of which is read from now on, the best first; none if there are not several copies."""
    if len(attachment.copies) < 2:
        return ()
    able = [each for each in attachment.copies if not each.joining]
    return tuple(sorted(able, key=lambda each: each.host != here))


# --- a VMM has ended -------------------------------------------------------------------------------------


def never_ran(ledger: Ledger, server: ServerId) -> bool:
    """Nor has it begun to write anything that may not be everywhere."""
    return f"{FRESH}{server}" in ledger.facts(FRESH)


def note_fresh(ledger: Ledger, server: ServerId, *, fresh: bool) -> None:
    if fresh != never_ran(ledger, server):
        ledger.remember("fresh", {f"{FRESH}{server}": b"" if fresh else None})


async def on_one_copy(context: Context, server: ServerConfig) -> ServerConfig:
    """Before a server is started whose VMM has ended as nobody knows. Unavailable while no orchestrator is
    connected: without its record a copy could be read later that lacks what the guest has seen."""
    _no_vmm_ran_on(context.ledger, server)
    for attachment in server.all_volumes:
        able = candidates(attachment, context.settings.host)
        for chosen in able:
            try:
                server = await _without_others(context, server, attachment, chosen)
                break
            except Conflict as conflict:  # another one is recorded as the only current copy
                if conflict.field != "lost" or chosen == able[-1]:
                    raise
    return server


async def _without_others(
    context: Context, server: ServerConfig, attachment: VolumeAttachment, chosen: VolumeEndpoint
) -> ServerConfig:
    for copy in attachment.copies:
        if copy != chosen:
            problem = DiskProblem(
                volume=attachment.volume,
                trouble=DiskTrouble.REPLICA_LOST,
                replica=copy.host,
                text="the server ended while it wrote, and its copies may differ",
            )
            server = await record_loss(context, server, problem)
    return server


def _no_vmm_ran_on(ledger: Ledger, server: ServerConfig) -> None:
    known = ledger.facts(PREFIX)
    mine = {key: b"" for key, value in known.items() if value.startswith(f"{server.spec.id} ".encode())}
    if mine:
        ledger.remember("ended", dict(mine))


async def end_alike(context: Context, server: ServerConfig) -> None:
    """Before the VMM of a server is ended for good: what it has begun to write is at every copy of its
    volumes, or it is recorded that one of them counts alone. So whoever has a volume next never reads two
    that differ. Unavailable while neither can be had: it is to be tried again."""
    ledger, name = context.ledger, server.spec.id
    held = ledger.owner(name)
    if held is None or held.hold is not Hold.OWNED or never_ran(ledger, name):
        return
    if all(len(each.copies) < 2 for each in held.server.all_volumes):
        return
    if await _stands_still(context, VmmId(name, held.epoch)):
        note_fresh(ledger, name, fresh=True)
        return
    with suppress(NotFound):  # nobody keeps a record of it any more
        await on_one_copy(context, await without_lost(context, held.server))


async def _stands_still(context: Context, vmm: VmmId) -> bool:
    """And every write it has begun is done everywhere."""
    hypervisor = context.drivers.hypervisor
    try:
        async with asyncio.timeout(STILL_WITHIN):
            found = {each.id: each.state for each in await hypervisor.observe()}
            if found.get(vmm) not in (RunState.RUNNING, RunState.PAUSED, RunState.STOPPED):
                return False
            await hypervisor.pause(vmm)
            return not await hypervisor.disks_check(vmm)
    except (Error, TimeoutError):
        return False


async def check_ran_on(context: Context, server: ServerId, gone: VolumeEndpoint) -> None:
    """Conflict unless the VMM that lost the copy runs on, and all it had begun to write is at the others."""
    held = owned(context, server)
    known = context.ledger.facts(PREFIX).get(f"{PREFIX}{place(gone)}")
    if known != ran_on(held.server):
        raise Conflict(f"{server} was started anew since it lost {gone.export}", field="export")
    if not await context.drivers.hypervisor.disks_settled(VmmId(server, held.epoch), held.server):
        raise Conflict(f"{server} stands still, or its disks are about to change", field="server")
    if owned(context, server).epoch != held.epoch:
        raise Conflict(f"{server} has moved meanwhile", field="server")
