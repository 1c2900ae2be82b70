"""Memory that follows a server after it was handed over (post-copy): what each half of the move does until
all of it has come, or is given up.

    source        sends on; takes a broken stream up again wherever the destination waits
    destination   the server runs; if nothing comes for PATIENCE_SECONDS, or its source says that it is gone,
                  the server is lost: its VMM ends, and it is started again like one whose VMM died

Nothing here touches who owns the server: that was settled before. So a source never runs it again, whatever
becomes of its memory, and a destination that gives it up needs nobody's word.
"""

import asyncio
from enum import StrEnum

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.inventory import RunState
from nahtlos.model.values import Value
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.ports import MigrationPhase, MigrationProgress, Missing, VmmId, VmmStatus
from nahtlos.wire.messages import MoveOrder, MoveRecover, MoveRecovers

HANDED_OVER = (MigrationPhase.POST_COPY, MigrationPhase.CUT)
LOOK_SECONDS = 0.05
"""Of the source, at its stream."""
WATCH_SECONDS = 0.2
"""Of the destination, at what has come."""
AGAIN_SECONDS = 0.5
STALLED_SECONDS = 5.0
"""A stream by which nothing was sent for so long is taken up anew, whatever it is said to do."""
ASK_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
"""For which a server is left waiting for memory of which nothing comes."""
SOURCE_PATIENCE_SECONDS = 180.0
"""A source that reaches nobody for so long is not waited for any more."""
ENDING_SECONDS = 5.0
"""From the source's word that its part is done until this side has seen the end of the stream."""


def why_not_followed(host: str, why: str) -> Refused:
    return Refused(
        why or f"the agent of {host} knows of no post-copy",
        field="post_copy",
        remedy=f"move it to another host, or put {host} right; or permit to slow it down (--allow-slowdown)",
    )


# --- source ----------------------------------------------------------------------------------------------


class Word(StrEnum):
    """Of the destination, when it is asked where it waits for the rest."""

    WAITS = "waits"
    MISSES_NOTHING = "misses-nothing"
    NOT_HEARD = "not-heard"


async def all_sent(context: Context, order: MoveOrder, vmm: VmmId, peer: Peer) -> None:
    """Returns once nothing of the server is left here that anybody waits for. At once after a pre-copy."""
    loop = asyncio.get_running_loop()
    moved = heard = loop.time()
    left = -1
    while (progress := await _progress(context, vmm)) is not None and progress.phase in HANDED_OVER:
        _tell(context, order, progress)
        flows = progress.phase is MigrationPhase.POST_COPY
        if flows and progress.remaining != left:
            left, moved, heard = progress.remaining, loop.time(), loop.time()
        if flows and loop.time() - moved < STALLED_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)
            continue
        word, left = await _taken_up(context, order, vmm, peer), -1
        if word is Word.MISSES_NOTHING:
            break
        if word is Word.WAITS:
            heard = loop.time()
        elif loop.time() - heard > SOURCE_PATIENCE_SECONDS:
            break
        await asyncio.sleep(AGAIN_SECONDS)
    context.waits.pop(order.id, None)


def _tell(context: Context, order: MoveOrder, progress: MigrationProgress) -> None:
    context.waits[order.id] = f"the rest of its memory to follow {order.server.spec.id}"
    if progress.total:
        context.progress[order.id] = 1.0 - progress.remaining / progress.total


async def _progress(context: Context, vmm: VmmId) -> MigrationProgress | None:
    """None if there is no such VMM any more, or its process has ended."""
    while True:
        try:
            return await context.drivers.hypervisor.migrate_progress(vmm)
        except NotFound:
            return None
        except Exception:  # asked again until it answers or is gone
            if await _ended(context, vmm):
                return None
        await asyncio.sleep(AGAIN_SECONDS)


async def _ended(context: Context, vmm: VmmId) -> bool:
    try:
        found = [v for v in await context.drivers.hypervisor.observe() if v.id == vmm]
    except Exception:
        return False
    return not found or found[0].state is RunState.CRASHED


async def _taken_up(context: Context, order: MoveOrder, vmm: VmmId, peer: Peer) -> Word:
    try:
        waits = await peer.ask(MoveRecover(id=order.id), MoveRecovers, ASK_SECONDS)
    except (Refused, Conflict, NotFound) as refused:
        context.say("move.following", vmm.server, f"nothing more is sent: {refused.message}", id=order.id)
        return Word.MISSES_NOTHING
    except Exception as error:
        context.waits[order.id] = (
            f"{order.destination} to take up the stream ({context.error_of(error).message})"
        )
        context.changed()
        return Word.NOT_HEARD
    try:
        await context.drivers.hypervisor.migrate_recover(vmm, waits.uri)
    except Exception as error:
        why = context.error_of(error)
        context.say("move.following", vmm.server, f"not taken up yet: {why}", id=order.id)
    else:
        context.say("move.following", vmm.server, "taken up: its memory follows again", id=order.id)
    return Word.WAITS


# --- destination -----------------------------------------------------------------------------------------


class Following(Value, frozen=True, kw_only=True):
    """What was seen of memory that follows. Times are of one clock."""

    arrived: int = -1
    """Bytes."""
    since: float = 0.0
    """When the last of them came."""
    ending: float | None = None
    """When the source said that its part is done."""


class Fate(Value, frozen=True, kw_only=True):
    over: bool = False
    """Nothing is missing any more, or nobody is left to miss it."""
    lost: str = ""
    """Why the rest will not come."""


def looked(following: Following, vmm: VmmStatus | None, now: float) -> tuple[Following, Fate]:
    """Decide from one look."""
    if vmm is None or vmm.state is RunState.CRASHED or vmm.missing is Missing.NOTHING:
        return following, Fate(over=True)
    if vmm.arrived != following.arrived:
        following = Following(arrived=vmm.arrived, since=now, ending=following.ending)
    if following.ending is not None and now - following.ending > ENDING_SECONDS:
        return following, Fate(lost="its source is gone before all of its memory had followed")
    if now - following.since > PATIENCE_SECONDS:
        return following, Fate(lost=f"nothing of its memory has come for {PATIENCE_SECONDS:g} s")
    return following, Fate()


def ended_by_source(following: Following, now: float) -> Following:
    if following.ending is not None:
        return following
    return Following(arrived=following.arrived, since=following.since, ending=now)


def check_missed(vmm: VmmStatus | None) -> None:
    """Refused if there is nothing to be taken up again."""
    if vmm is None or vmm.state is RunState.CRASHED:
        raise Refused("its VMM has ended", field="vmm")
    if vmm.missing is Missing.NOTHING:
        raise Refused("all of its memory is here", field="vmm")


async def wait_anew(context: Context, vmm: VmmId, address: str) -> str:
    """The URI at which this host waits for the rest; Unavailable while it cannot."""
    try:
        return await context.drivers.hypervisor.incoming_recover(vmm, address)
    except Refused as refused:
        raise Unavailable(f"not yet: {refused.message}") from refused
