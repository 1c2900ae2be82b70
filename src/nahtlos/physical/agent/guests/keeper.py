"""Looks at the agents in this host's guests: what they say of themselves, whether their clocks were left
behind, and whether one is frozen though no operation asks for that.

A guest's clock stands still while the guest does: in a move, a replacement, while its disks had stopped it,
while it was suspended. It is set when it is behind by more than `CLOCK_SECONDS` at the first look at a guest
that has come here (or by an agent that was started anew), or has fallen so far behind since the last look. A
clock that is ahead, or was that far behind before, is the guest's own business.
"""

import asyncio
from dataclasses import dataclass

import msgspec

from nahtlos.model.errors import Error, NotFound, Refused
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.guests import asking
from nahtlos.physical.agent.ledger import Hold
from nahtlos.physical.ports import VmmId

TICK_SECONDS = 2.0
"""A guest that has come here is looked at so soon, and one that is to be thawed tried again."""
LOOK_SECONDS = 30.0
CLOCK_SECONDS = 1.0
"""A pause longer than this is made good in the guest's clock."""


@dataclass
class Known:
    vmm: VmmId
    due: float
    behind: float | None = None
    """When its clock was last looked at; None: not yet, under this epoch, by this agent."""


def has_to_be_set(behind: float, before: float | None) -> bool:
    """`before`: how far behind it was at the last look; None: there was none."""
    return behind - max(0.0, before or 0.0) > CLOCK_SECONDS


class GuestKeeper:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[ServerId, Known] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self._context.calm()
            try:
                await self.look()
            except Error as error:
                self._context.say("guest.problem", self._context.settings.host, str(error))

    async def look(self) -> None:
        """At every guest that is due, side by side."""
        now = asyncio.get_running_loop().time()
        due = [known for known in self._mine(now) if known.due <= now]
        if not due:
            return
        vmms = await self._context.drivers.hypervisor.observe()
        runs = {vmm.id for vmm in vmms if vmm.state is RunState.RUNNING}
        async with asyncio.TaskGroup() as tasks:
            for known in due:
                if known.vmm in runs:
                    known.due = now + LOOK_SECONDS
                    tasks.create_task(self._look_at(known))

    def _mine(self, now: float) -> list[Known]:
        """Guests with a channel that nothing else speaks to. One that is to be thawed is due at once."""
        owned = self._context.ledger.ownership()
        here = {
            server: VmmId(server, held.epoch)
            for server, held in owned.items()
            if held.hold is Hold.OWNED and held.server.spec.guest_agent
        }
        for gone in self._known.keys() - here.keys():
            del self._known[gone]
            self._context.guests.pop(gone, None)
            self._context.guest_thaws.discard(gone)
        for server, vmm in here.items():
            if server not in self._known or self._known[server].vmm != vmm:
                self._known[server] = Known(vmm=vmm, due=now)
            if server in self._context.guest_thaws:
                self._known[server].due = now
        return [known for server, known in self._known.items() if self._is_free(server)]

    def _is_free(self, server: ServerId) -> bool:
        context = self._context
        if server in context.guest_freezes or server in context.freezes:
            return False
        return context.ledger.running(server) is None

    async def _look_at(self, known: Known) -> None:
        context, server = self._context, known.vmm.server
        before = context.guests.get(server, GuestStatus())
        try:
            status = await asking.status(context.drivers.hypervisor, known.vmm, context.now())
            if status.frozen:
                await self._thaw(known.vmm)
                status = await asking.status(context.drivers.hypervisor, known.vmm, context.now())
            context.guest_thaws.discard(server)
            set_by = 0.0 if status.frozen else await self._keep_time(known)
            status = msgspec.structs.replace(status, clock_set_by=set_by or before.clock_set_by)
        except Error as error:
            status = msgspec.structs.replace(before, answers=False, why=error.message)
        except Exception as raised:
            context.error_of(raised)
            return
        context.guests[server] = status
        if not _alike(status, before):
            context.changed()

    async def _thaw(self, vmm: VmmId) -> None:
        if vmm.server in self._context.guest_freezes:
            return  # one has begun since this look did
        await asking.thaw(self._context.drivers.hypervisor, vmm)
        text = "its file systems were frozen though no operation asks for that; thawed"
        self._context.say("guest.thawed", vmm.server, text)

    async def _keep_time(self, known: Known) -> float:
        """By how many seconds it was set; 0 if it was not."""
        hypervisor, now = self._context.drivers.hypervisor, self._context.now
        try:
            behind = await asking.clock_behind(hypervisor, known.vmm, now())
            if not has_to_be_set(behind, known.behind):
                known.behind = behind
                return 0.0
            try:
                await asking.set_clock(hypervisor, known.vmm, now())
            except Refused:
                left = await asking.clock_behind(hypervisor, known.vmm, now())
                if has_to_be_set(left, None):
                    raise
            known.behind = 0.0
        except (Refused, NotFound) as error:
            self._context.say("guest.problem", known.vmm.server, f"its clock cannot be kept: {error}")
            return 0.0
        self._context.say("guest.clock", known.vmm.server, f"its clock was {behind:.1f} s behind; set")
        return round(behind, 3)


def _alike(one: GuestStatus, other: GuestStatus) -> bool:
    return msgspec.structs.replace(one, heard_at=0.0) == msgspec.structs.replace(other, heard_at=0.0)
