"""The serial consoles of an agent's servers: read by offset, written, carried along.

The log of a VMM belongs to the hypervisor's driver; what came before it is a fact of the ledger. It is
written when a VMM follows another one: at the end of a replacement, at the end of a move at the
destination. Never keeps a reader's place: who reads says where.
"""

import asyncio

import msgspec

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import OperationId, ServerId
from nahtlos.physical.agent.consoles.past import Past, piece
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Ownership, Role
from nahtlos.physical.ports import CONSOLE_KEPT, VmmId
from nahtlos.wire.messages import ConsoleData, ConsoleRead, ConsoleTaken, ConsoleWrite, Done, MoveConsole

LOOK_SECONDS = 0.05
WAIT_AT_MOST = 30.0
READ_AT_MOST = 64 << 10
TYPE_AT_MOST = 4096
FACT = "console/"


# --- for the orchestrator ----------------------------------------------------------------------------


async def read(context: Context, body: ConsoleRead) -> ConsoleData:
    """NotFound if the server is not here; Unavailable while what it said before is still on its way."""
    loop = asyncio.get_running_loop()
    until = loop.time() + min(body.wait, WAIT_AT_MOST)
    while True:
        await context.calm()
        past, data, offset = await _next(context, body)
        stays = body.history in ("", past.history) and offset == body.offset
        if data or not stays or loop.time() >= until:
            await asyncio.sleep(context.console_pace.take(len(data), loop.time()))
            return ConsoleData(data=data, next_offset=offset + len(data), history=past.history)
        await asyncio.sleep(LOOK_SECONDS)


async def _next(context: Context, body: ConsoleRead) -> tuple[Past, bytes, int]:
    held = owned(context, body.server)
    past = await _past(context, held)
    vmm = VmmId(body.server, held.epoch)
    hypervisor = context.drivers.hypervisor
    size = await hypervisor.console_size(vmm)
    limit = max(0, min(body.limit, READ_AT_MOST))
    wanted = piece(past, size, history=body.history, offset=body.offset, limit=limit)
    if wanted.in_past:
        first = wanted.offset - past.start
        return past, past.data[first : first + wanted.limit], wanted.offset
    data, _ = await hypervisor.console(vmm, wanted.offset - past.end, wanted.limit)
    return past, data, wanted.offset


async def write(context: Context, body: ConsoleWrite) -> Done | ConsoleTaken:
    """Who does not count is told by Unavailable that the guest did not take all. While a server is handed
    over it takes nothing."""
    if len(body.data) > TYPE_AT_MOST:
        raise Refused(f"at most {TYPE_AT_MOST} bytes at once", field="data", remedy="type less at a time")
    held = owned(context, body.server)
    taken = await context.drivers.hypervisor.console_write(VmmId(body.server, held.epoch), body.data)
    if body.counted:
        return ConsoleTaken(taken=taken)
    if taken < len(body.data):
        raise Unavailable(
            f"the guest took {taken} of {len(body.data)} bytes and then no more",
            field="data",
            remedy="it reads its serial port no further, or is being moved: type the rest again",
        )
    return Done()


def owned(context: Context, server: ServerId) -> Ownership:
    held = context.ledger.owner(server)
    if held is None or held.hold is not Hold.OWNED:
        raise NotFound(f"{server} is not on {context.settings.host}", field="server")
    return held


# --- what came before --------------------------------------------------------------------------------


async def _past(context: Context, held: Ownership) -> Past:
    """What comes before the log of the VMM that runs the server now."""
    server = held.server.spec.id
    past = _written(context, server)
    if past is not None and past.epoch == held.epoch:
        return past
    journal = context.ledger.running(server)
    if journal is not None and journal.role is Role.DESTINATION:
        raise Unavailable(f"what {server} said before it came here is on its way", field="history")
    if past is None and journal is not None and journal.replace is not None:
        past = _begun(context, VmmId(server, journal.replace.server.epoch))
    if past is not None and past.epoch < held.epoch:
        past = await _ended(context, past, VmmId(server, past.epoch), held.epoch)
    past = past or _begun(context, VmmId(server, held.epoch))
    _write(context, server, past)
    return past


async def _ended(context: Context, past: Past, vmm: VmmId, epoch: int) -> Past:
    """That VMM says nothing more."""
    hypervisor = context.drivers.hypervisor
    size = await hypervisor.console_size(vmm)
    begin = max(0, size - CONSOLE_KEPT)
    tail, _ = await hypervisor.console(vmm, begin, size - begin)
    return past.followed_by(tail, size, epoch)


def _begun(context: Context, vmm: VmmId) -> Past:
    return Past(history=f"{context.settings.host}.{vmm.epoch}.{int(context.now() * 1000):x}", epoch=vmm.epoch)


def _written(context: Context, server: ServerId) -> Past | None:
    raw = context.ledger.fact(FACT + server)
    return msgspec.msgpack.decode(raw, type=Past) if raw else None


def _write(context: Context, server: ServerId, past: Past | None) -> None:
    context.ledger.remember(
        "console", {FACT + server: None if past is None else msgspec.msgpack.encode(past)}
    )


# --- for operations ----------------------------------------------------------------------------------


async def replaced(context: Context, old: VmmId, new: VmmId) -> None:
    """`old` has ended, `new` runs its server here. Repeatable."""
    past = _written(context, old.server)
    if past is None or past.epoch < new.epoch:
        past = past if past is not None else _begun(context, old)
        _write(context, old.server, await _ended(context, past, old, new.epoch))
    await context.drivers.hypervisor.console_forget(old)


async def leaving(context: Context, vmm: VmmId, operation: OperationId) -> MoveConsole:
    """All that `vmm` has said, which has stopped for good, for the host it goes on at."""
    past = _written(context, vmm.server)
    if past is None or past.epoch != vmm.epoch:
        past = _begun(context, vmm)
    past = await _ended(context, past, vmm, vmm.epoch + 1)
    return MoveConsole(id=operation, history=past.history, end=past.end, data=past.data)


def arrived(context: Context, vmm: VmmId, body: MoveConsole) -> None:
    """Repeatable. Too late if somebody has read here before: a history that was begun is kept."""
    past = _written(context, vmm.server)
    if past is None or past.epoch < vmm.epoch:
        came = Past(history=body.history, epoch=vmm.epoch, end=body.end, data=body.data[-CONSOLE_KEPT:])
        _write(context, vmm.server, came)


async def forgotten(context: Context, vmm: VmmId) -> None:
    """The server is not here any more. Repeatable."""
    await context.drivers.hypervisor.console_forget(vmm)
    if _written(context, vmm.server) is not None:
        _write(context, vmm.server, None)
