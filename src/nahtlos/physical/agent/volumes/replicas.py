"""Servers whose disks have stopped them, and copies of their volumes that are lost.

    guest stands still --why?--> a copy is lost --the orchestrator records it--> reached by the others -.
                          |          `no orchestrator: it waits, and says so                            | |->
                          connections broke, their daemons answer: made anew -----------------------| `-> no
                          space, or its only copy fails: again, less and less often -------------+-> goes on

The order is what keeps every acknowledged write: a copy that did not take a write is durably no current one
before the guest learns that the write is done. A copy once lost is never reached again by the export it was
lost with (a fact of the ledger), whatever an older configuration says: it comes back under another epoch.

Nothing is touched while an operation of the server runs or it is frozen: who ends that looks here again.

How a server reaches its volumes is the ledger's: others change that while this here waits for an answer, and
who would go by what it knew before takes back what they have done. So it is read again after every wait, and
whoever changes it writes it down before the disks are led there: the last word is the one that is acted on.
"""

import asyncio

import msgspec

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import ServerId, VolumeId
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Ledger, Ownership
from nahtlos.physical.ports import DiskProblem, DiskTrouble, VmmId
from nahtlos.wire.volumes import ReplicaLost, ReplicasRecorded

PREFIX = "lost/"
LOST_BEFORE = "lost_before"
"""Field of the refusal to reach a copy by an export it was lost with."""
LOOK_SECONDS = 0.5
"""How often connections are looked at; a guest that is stopped is seen at once."""
RECORD_SECONDS = 10.0
AGAIN_SECONDS = (0.0, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between attempts to let a guest go on whose disk fails or has no room; the last one for ever."""
RUNS_SECONDS = 15.0
"""A guest that was let go and has not been stopped again for so long runs."""
REMEDIES = {
    DiskTrouble.NO_SPACE: "free space in its pool, or enlarge it: the server goes on by itself",
    DiskTrouble.ERROR: "look at the disk under the volume and at the log of its storage daemon; "
    "it is tried again every {pause:g} s",
}


def lost_exports(ledger: Ledger) -> frozenset[str]:
    """Exports by which copies were lost: never to be reached again."""
    return frozenset(name.removeprefix(PREFIX) for name in ledger.facts(PREFIX))


def place(endpoint: VolumeEndpoint) -> str:
    return f"{endpoint.host} {endpoint.export}"


def without(attachment: VolumeAttachment, lost: frozenset[str]) -> VolumeAttachment:
    """Reached by the copies that are not lost. As it is if there are none."""
    left = tuple(each for each in attachment.copies if place(each) not in lost)
    return attachment if not left or left == attachment.copies else reached_by_copies(attachment, left)


def reached_by_copies(attachment: VolumeAttachment, copies: tuple[VolumeEndpoint, ...]) -> VolumeAttachment:
    first = copies[0]
    return msgspec.structs.replace(
        attachment,
        address=first.address,
        port=first.port,
        export=first.export,
        copies=copies if len(copies) > 1 else (),
    )


def wanted_disks(
    wanted: ServerConfig,
    held: ServerConfig,
    *,
    lost: frozenset[str],
    pinned: frozenset[VolumeId],
) -> ServerConfig:
    """`held` with the disks of `wanted`: what the configuration says of volumes that take part in an
    operation is not acted on, nor are copies reached that were lost."""
    known = {each.volume: each for each in held.all_volumes}

    def settled(each: VolumeAttachment) -> VolumeAttachment:
        return known[each.volume] if each.volume in pinned and each.volume in known else without(each, lost)

    going = {each.volume for each in held.data_volumes} - {each.volume for each in wanted.data_volumes}
    if going & pinned:
        return held
    return msgspec.structs.replace(
        held,
        spec=msgspec.structs.replace(held.spec, data_volumes=wanted.spec.data_volumes),
        volume=settled(wanted.volume),
        data_volumes=tuple(settled(each) for each in wanted.data_volumes),
    )


def ran_on(server: ServerConfig) -> bytes:
    """Of a loss: which VMM has run on after it. See `rejoin`."""
    return f"{server.spec.id} {server.epoch}".encode()


async def record_loss(
    context: Context, server: ServerConfig, problem: DiskProblem, *, by: bytes = b""
) -> ServerConfig:
    """Have it recorded that this copy is not current, here as well; how the server's disks are reached then.
    Unavailable while no orchestrator is connected, Conflict if no other copy is current. `by`: `ran_on` if
    the VMM that wrote to it lives."""
    assert problem.replica is not None, problem
    gone = next((e for e in _attached(server, problem.volume).copies if e.host == problem.replica), None)
    if gone is None:
        return server
    before = context.ledger.owner(server.spec.id)
    asked = ReplicaLost(
        server=server.spec.id,
        epoch=server.epoch,
        volume=problem.volume,
        lost=gone.host,
        export=gone.export,
    )
    answer = await context.ask(asked, RECORD_SECONDS)
    if not isinstance(answer, ReplicasRecorded):
        raise Refused(f"the orchestrator answered {type(answer).__name__} to a lost copy")
    context.ledger.remember("lost", {f"{PREFIX}{place(gone)}": by})
    lost = lost_exports(context.ledger)
    held = context.ledger.owner(server.spec.id)
    if held is not None and held != before and held.epoch == server.epoch:
        server = held.server  # it is reached otherwise since: a copy has joined, or another one is lost, too
    if all(each.volume != problem.volume for each in server.all_volumes):
        return server
    known = _attached(server, problem.volume)
    recorded = {answer.attachment.export, *(each.export for each in answer.attachment.copies)}
    left = tuple(
        msgspec.structs.replace(each, joining=each.joining and each.export not in recorded)
        for each in known.copies
        if place(each) not in lost
    )
    if all(each.joining for each in left):
        raise Conflict(
            f"every copy of {problem.volume} is lost",
            field="volume",
            remedy="bring a host with a current copy back",
        )
    after = with_attachment(server, reached_by_copies(known, left))
    context.ledger.adopt(after)
    context.say(
        "volume.replica-lost",
        problem.volume,
        f"the copy on {problem.replica} is lost to {server.spec.id}: {problem.text}",
    )
    return after


def _attached(server: ServerConfig, volume: VolumeId) -> VolumeAttachment:
    return next(each for each in server.all_volumes if each.volume == volume)


def with_attachment(server: ServerConfig, attachment: VolumeAttachment) -> ServerConfig:
    found = tuple(attachment if each.volume == attachment.volume else each for each in server.all_volumes)
    return msgspec.structs.replace(server, volume=found[0], data_volumes=found[1:])


async def without_lost(context: Context, server: ServerConfig) -> ServerConfig:
    """Before a VMM is started: a copy that does not answer then would keep it from starting."""
    for problem in await context.drivers.hypervisor.copies_lost(server):
        server = await record_loss(context, server, problem)
    return server


class Attempt(msgspec.Struct):
    """Attempts to let a guest go on, in a row."""

    number: int = 0
    at: float = 0.0

    @property
    def pause(self) -> float:
        return AGAIN_SECONDS[min(self.number, len(AGAIN_SECONDS) - 1)]


class DiskKeeper:
    """Lets servers go on that their disks have stopped."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._attempts: dict[ServerId, Attempt] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:
                self._context.say(
                    "disks.problem", self._context.settings.host, str(self._context.error_of(error))
                )
                await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        stopped = await self._context.drivers.hypervisor.disks_watch(timeout=LOOK_SECONDS)
        names = {vmm.server for vmm in stopped}
        for server in (self._attempts.keys() | self._context.disk_problems.keys()) - names:
            self._forget(server)
        for vmm in stopped:
            await self._settle(vmm)
        if stopped:
            await asyncio.sleep(0.02)  # what keeps failing must not spin

    def _forget(self, server: ServerId) -> None:
        """It runs (or is gone)."""
        attempt = self._attempts.get(server)
        since = asyncio.get_running_loop().time() - attempt.at if attempt else RUNS_SECONDS
        if since > RUNS_SECONDS:
            self._attempts.pop(server, None)
        if since > LOOK_SECONDS and self._context.disk_problems.pop(server, None):
            self._context.changed()

    def _ours(self, vmm: VmmId) -> Ownership | None:
        held = self._context.ledger.owner(vmm.server)
        if held is None or held.hold is not Hold.OWNED or held.epoch != vmm.epoch:
            return None
        if self._context.ledger.running(vmm.server) is not None or vmm.server in self._context.freezes:
            return None
        return held

    async def _settle(self, vmm: VmmId) -> None:
        attempt = self._attempts.setdefault(vmm.server, Attempt())
        now = asyncio.get_running_loop().time()
        if now - attempt.at > RUNS_SECONDS + attempt.pause:
            attempt.number = 0
        if now < attempt.at + attempt.pause or self._ours(vmm) is None:
            return
        try:
            await self._let_go_on(vmm, attempt)
        except Exception as error:
            self._say(vmm, f"{vmm.server} stands still: {self._context.error_of(error)}")
            self._count(attempt)

    async def _let_go_on(self, vmm: VmmId, attempt: Attempt) -> None:
        hypervisor = self._context.drivers.hypervisor
        problems = await hypervisor.disks_check(vmm)
        held = self._ours(vmm)
        if held is None:
            return
        server = held.server
        for problem in problems:
            if problem.trouble is DiskTrouble.REPLICA_LOST:
                server = await record_loss(self._context, server, problem, by=ran_on(server))
        self._say(vmm, self._told(problems, server, attempt))
        if not await self._reconciled(vmm):
            return
        await hypervisor.resume(vmm)
        self._count(attempt)
        if server != held.server:
            attempt.number = 0
        self._context.changed()
        await self._reconciled(vmm)

    async def _reconciled(self, vmm: VmmId) -> bool:
        """To what the ledger says now. False if it is not ours to touch, any more."""
        held = self._ours(vmm)
        if held is None:
            return False
        await self._context.drivers.hypervisor.disks_reconcile(vmm, held.server)
        return self._ours(vmm) is not None

    def _count(self, attempt: Attempt) -> None:
        attempt.at = asyncio.get_running_loop().time()
        attempt.number += 1

    def _told(self, problems: tuple[DiskProblem, ...], server: ServerConfig, attempt: Attempt) -> str:
        """What a person has to know of; of several copies only that which comes again and again."""
        quiet = set[VolumeId]()
        if attempt.number < len(AGAIN_SECONDS):
            quiet = {each.volume for each in server.all_volumes if len(each.copies) > 1}
        return "; ".join(
            f"{each.volume} of {server.spec.id}: {each.text} "
            f"({REMEDIES[each.trouble].format(pause=attempt.pause)})"
            for each in problems
            if each.trouble is DiskTrouble.NO_SPACE
            or (each.trouble is DiskTrouble.ERROR and each.volume not in quiet)
        )

    def _say(self, vmm: VmmId, text: str) -> None:
        held = self._context.disk_problems
        if text and held.get(vmm.server) != text:
            held[vmm.server] = text
            self._context.say("server.disks", vmm.server, text)
            self._context.changed()
