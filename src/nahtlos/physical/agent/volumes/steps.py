"""Moments at which all copies of a volume are in step, so that one that goes away later can come back by what
differs.

    every copy begins to remember its writes -> every write of the guest ends everywhere -> all note it

What they note is durable, and so is what was written. Never decides which copies count. A step that fails
leaves everything as it was.
"""

import asyncio
import secrets

from nahtlos.model.config import VolumeAttachment
from nahtlos.model.errors import Conflict, Error
from nahtlos.model.ids import ServerId
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Ownership
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.physical.agent.volumes.replicas import place
from nahtlos.physical.ports import VmmId
from nahtlos.wire.volumes import VolumeStep

STEP_SECONDS = 300.0
"""What was written since the last step is copied when a copy comes back."""
LOOK_SECONDS = 5.0
AGAIN_SECONDS = 60.0
ASK_SECONDS = 10.0


def new_step(copies: int) -> str:
    """A name no step ever had. The storage reads from it how many copies were in step."""
    return f"{copies}-{secrets.token_hex(8)}"


def can_step(attachment: VolumeAttachment) -> bool:
    return len(attachment.copies) > 1 and not any(each.joining for each in attachment.copies)


class Stepper:
    """Brings the copies of this host's servers in step, now and then."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._due: dict[tuple[ServerId, tuple[str, ...]], float] = {}
        """When the copies of a volume are to be brought in step again."""
        self._said: dict[ServerId, str] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except Error as error:
                self._context.say("volume.not-in-step", self._context.settings.host, str(error))

    async def look(self) -> None:
        now = asyncio.get_running_loop().time()
        wanted = {
            (server, tuple(place(each) for each in attachment.copies)): (held, attachment)
            for server, held in self._context.ledger.ownership().items()
            if self._is_calm(held)
            for attachment in held.server.all_volumes
            if can_step(attachment)
        }
        self._due = {key: due for key, due in self._due.items() if key in wanted}
        for key, (held, attachment) in wanted.items():
            if self._due.get(key, 0.0) > now:
                continue
            done = await self._tried(held, attachment)
            self._due[key] = now + (STEP_SECONDS if done else AGAIN_SECONDS)

    def _is_calm(self, held: Ownership) -> bool:
        server = held.server.spec.id
        return (
            held.hold is Hold.OWNED
            and self._context.ledger.running(server) is None
            and server not in self._context.freezes
        )

    async def _tried(self, held: Ownership, attachment: VolumeAttachment) -> bool:
        server = held.server.spec.id
        try:
            await step(self._context, held, attachment)
        except Exception as raised:
            text = f"the copies of {attachment.volume} are not in step: {self._context.error_of(raised)}"
            self._said[server] = self._context.say_anew(
                "volume.not-in-step", attachment.volume, text, last=self._said.get(server, "")
            )
            return False
        self._said.pop(server, None)
        return True


async def step(context: Context, held: Ownership, attachment: VolumeAttachment) -> None:
    """Every copy has, durably, whatever was written before. Raises if that could not be brought about, which
    leaves everything as it was."""
    name, hosts = new_step(len(attachment.copies)), Hosts(context, ())
    try:
        await _tell(hosts, attachment, VolumeStep(volume=attachment.volume, step=name))
        server, vmm = held.server, VmmId(held.server.spec.id, held.epoch)
        settled = await context.drivers.hypervisor.disks_settled(vmm, server)
        now = context.ledger.owner(server.spec.id)
        if not settled or now is None or (now.hold, now.epoch) != (held.hold, held.epoch):
            raise Conflict(f"{server.spec.id} stands still, or its disks have changed", field="server")
        await _tell(hosts, attachment, VolumeStep(volume=attachment.volume, step=name, reached=True))
    finally:
        await hosts.close()


async def _tell(hosts: Hosts, attachment: VolumeAttachment, body: VolumeStep) -> None:
    for copy in attachment.copies:
        await hosts.ask(copy.host, body, ASK_SECONDS)
