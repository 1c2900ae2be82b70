"""What an agent asks of VMMs: to run servers, to show and type into them, to carry them over."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Protocol

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import NotFound
from nahtlos.model.ids import HostId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import Accelerator, ComputeStatus, RunState
from nahtlos.model.nouns import Size


class VmmId(msgspec.Struct, frozen=True, order=True):
    server: ServerId
    epoch: int

    @property
    def unit(self) -> str:
        return f"vmm.{self.server}.{self.epoch}"


CONSOLE_KEPT = 256 << 10
"""Bytes of what a server's console has said that are kept, and travel with it."""


class DiskTrouble(StrEnum):
    NO_SPACE = "no-space"
    """The pool under the volume is full: the guest goes on once there is room."""
    ERROR = "error"
    REPLICA_LOST = "replica-lost"
    """A write was not acknowledged because this copy did not take it."""


class DiskProblem(msgspec.Struct, frozen=True, kw_only=True):
    volume: VolumeId
    trouble: DiskTrouble
    replica: HostId | None = None
    text: str = ""


class Missing(StrEnum):
    """Of the memory of a server that was taken over by post-copy."""

    NOTHING = ""
    COMING = "coming"
    CUT = "cut"
    """Some of it, and the stream has broken: a guest that touches it stands still."""


class VmmStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: VmmId
    state: RunState
    """RUNNING, PAUSED, INCOMING (still receiving or waiting to), STARTING; STOPPED if the guest has switched
    itself off (never resumed: it has to be ended); CRASHED if the process ended."""
    release: ReleaseId | None
    size: Size
    migrated: bool = False
    """This VMM has received a server (destination) and may be resumed: all of it, or, by post-copy, all but
    memory that follows."""
    missing: Missing = Missing.NOTHING
    """Of what this VMM has received."""
    arrived: int = 0
    """Bytes of its memory that are here, of a VMM that lacks some: more as they come."""
    sent: bool = False
    """This VMM has sent its server completely (source); resuming it would run a second copy."""
    disk_problems: tuple[DiskProblem, ...] = ()
    """Why its guest was stopped by its disks, and copies that failed."""
    compute: ComputeStatus = ComputeStatus()


def no_channel(vmm: VmmId) -> NotFound:
    return NotFound(
        f"the machine of {vmm.server} has no channel to an agent in the guest",
        field="guest_agent",
        remedy="servers that are created from now on have one",
    )


class MigrationPhase(StrEnum):
    NONE = "none"
    ACTIVE = "active"
    POST_COPY = "post-copy"
    """The guest was handed over, and what it lacks is sent."""
    CUT = "cut"
    """Likewise, and the stream has broken: `migrate_recover` takes it up again."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MigrationProgress(msgspec.Struct, frozen=True, kw_only=True):
    phase: MigrationPhase
    remaining: int = 0
    """Bytes; late in a pass this figure is stale (see `passes`)."""
    total: int = 0
    transferred: int = 0
    """Bytes of memory, before they were compressed."""
    passes: int = 0
    """Number of dirty-bitmap syncs so far."""
    error: str = ""


Sink = Callable[[bytes], Awaitable[None]]


class DisplayLine(Protocol):
    """One connection to a server's display, which speaks RFB 3.8 without security on it."""

    async def read(self, limit: int) -> bytes:
        """Empty once the VMM has closed it."""
        ...

    async def write(self, data: bytes) -> None:
        """Unavailable once it takes nothing any more."""
        ...

    async def close(self) -> None: ...


class Hypervisor(Protocol):
    async def releases(self) -> tuple[ReleaseId, ...]:
        """Releases whose files are present and match their manifest."""
        ...

    async def why_no_shares(self) -> str:
        """Why servers here cannot be given other than the default share of its processors; empty if they
        can."""
        ...

    async def observe(self) -> tuple[VmmStatus, ...]:
        """Every VMM of this host, also those an earlier agent started."""
        ...

    async def verify(self, release: ReleaseId) -> Accelerator:
        """Boot a probe guest under `release` and choose an accelerator by it; check that
        switchover-ack holds an idle guest. Refused with the reason if the release cannot serve."""
        ...

    async def start(self, server: ServerConfig, release: ReleaseId) -> None:
        """Boot. Taps must exist (`Network.port_create`). Repeatable."""
        ...

    async def kill(self, vmm: VmmId) -> None:
        """End the process at once and remove what belongs to it (RAM file, sockets). Repeatable."""
        ...

    async def power_button(self, vmm: VmmId) -> None:
        """Press it: the guest may switch itself off in its own time (`RunState.STOPPED`), or not care."""
        ...

    # the serial console: what a VMM has said stays when it ends, and goes on when it is started again

    async def console(self, vmm: VmmId, offset: int, limit: int) -> tuple[bytes, int]:
        """At most `limit` bytes from `offset`, and the offset after them. Of what it has said the last
        `CONSOLE_KEPT` bytes are kept; what is asked of before them is undefined."""
        ...

    async def console_size(self, vmm: VmmId) -> int:
        """Bytes it has said so far, kept or not; 0 for one that is not known."""
        ...

    async def console_write(self, vmm: VmmId, data: bytes) -> int:
        """Returns how many bytes of `data` the guest's serial port took: fewer when it takes no more, or when
        the guest was stopped. Unavailable if nobody answers."""
        ...

    async def display_open(self, vmm: VmmId) -> DisplayLine:
        """Several at a time. Refused if the server has no display; Unavailable if it does not answer."""
        ...

    async def console_forget(self, vmm: VmmId) -> None:
        """What it has said goes. Repeatable."""
        ...

    async def guest_ask(
        self, vmm: VmmId, command: str, arguments: Mapping[str, object] | None = None, *, within: float
    ) -> object:
        """What the agent in the guest returns to a command of QEMU's guest agent protocol, as decoded JSON. A
        guest is not to be believed: it may answer anything. Unavailable if it does not answer within so many
        seconds (it may do what it was told all the same) or nothing listens in it; Refused, with the guest's
        words, if its agent answers with an error; NotFound if its hardware has no such channel."""
        ...

    # what a VMM that runs is given

    async def compute_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        """Give it the vCPUs, the memory and the share of the processors that `server` names, and wait a
        moment for the guest to take (or give back) them; what it has then is in `VmmStatus.compute`. Returns
        what was changed. Refused where its hardware or its release has no way to; a later call goes on."""
        ...

    async def dirty_rate(self, vmm: VmmId) -> int | None:
        """Bytes of memory a second that the guest touches, from a sample of its pages over a moment; None if
        this release cannot tell. Not while it is sent or received."""
        ...

    # disks of a VMM that runs

    async def disks_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        """Attach, detach, enlarge, limit, and reach every volume by exactly the copies `server` names: a copy
        that is not named any more is let go, one that is new is used from now on (whoever calls this has made
        sure that it holds every acknowledged write). Each change is atomic for the guest; it sees no error.
        Returns what was changed. Refused where the machine has no place left, Unavailable while a copy does
        not answer or a guest does not let go of a disk; a later call goes on from there. A guest that its
        disks have stopped is not resumed, but may be, afterwards."""
        ...

    async def disks_settled(self, vmm: VmmId, server: ServerConfig) -> bool:
        """Wait for every write the guest has begun to end. True: it runs, and all ended at every copy that
        `server` names. What had failed before is written again by then."""
        ...

    async def disks_watch(self, *, timeout: float) -> tuple[VmmId, ...]:
        """VMMs whose guest was stopped by its disks: at once when that happens, at the latest after `timeout`
        seconds. Copies that leave requests unanswered are cut off meanwhile, which stops their guests."""
        ...

    async def disks_check(self, vmm: VmmId) -> tuple[DiskProblem, ...]:
        """`VmmStatus.disk_problems`, and which copies are lost: their daemon does not answer within 2 s."""
        ...

    async def copies_lost(self, server: ServerConfig) -> tuple[DiskProblem, ...]:
        """Of a server that does not run: copies whose daemon does not answer, where there are several."""
        ...

    # suspended

    async def save(self, vmm: VmmId, sink: Sink, *, running: bool = False) -> None:
        """Of a guest that stands still (`pause`): memory and devices go to `sink`, in pieces and in order;
        all of them have when this returns. Its guest may be let go on after that, or after a failure. Refused
        if the release would not; what `sink` raises is raised.

        `running`: the guest goes on meanwhile, and what it changes is sent again, until somebody has it stand
        still (`migrate_progress` tells when little is left); what is saved is of that moment. A guest that
        changes nothing may be found standing still already when this returns."""
        ...

    async def restore(self, server: ServerConfig, release: ReleaseId, pieces: AsyncIterator[bytes]) -> None:
        """Start a VMM by `server.epoch` that has what was saved, and stands still (PAUSED). Taps must exist.
        Refused if it does not take it; what `pieces` raises is raised. What is left then is for `kill`."""
        ...

    # moves: destination

    async def incoming_start(
        self,
        server: ServerConfig,
        epoch: int,
        release: ReleaseId,
        *,
        in_place: bool = False,
        post_copy: bool = False,
        channels: int = 1,
        compressed: bool = False,
    ) -> None:
        """Start a VMM that waits (`-incoming defer -S`), capabilities cleared and set. Repeatable.

        `in_place`: for the server that runs here by `server.epoch`. Its memory is shared, not copied, and its
        ports are those of `Network.replace_prepare`. `post_copy`: its source may use `migrate_post_copy`.
        `channels`, `compressed`: of its memory, as its source sends it; one and not if `post_copy`."""
        ...

    async def incoming_listen(self, vmm: VmmId, address: str) -> str:
        """Start listening for the stream (TLS, both sides proven); returns the URI for the source."""
        ...

    async def incoming_wait(self, vmm: VmmId, *, timeout: float) -> None:
        """Returns when the server may be resumed (`VmmStatus.migrated`). Refused if the stream failed;
        Unavailable on timeout."""
        ...

    async def incoming_recover(self, vmm: VmmId, address: str) -> str:
        """Wait anew for a stream that broke in post-copy; returns the URI for the source. Also where this
        side has not noticed yet. Refused if nothing is missing."""
        ...

    async def why_no_post_copy(self) -> str:
        """Why this host's kernel cannot hold a guest up until a page has come (userfaultfd); empty if it
        can."""
        ...

    async def resume(self, vmm: VmmId) -> None:
        """Let the guest run (again). Who calls this has made sure that no other copy can."""
        ...

    # moves: source

    async def migrate_start(
        self,
        vmm: VmmId,
        uri: str,
        *,
        peer: str,
        bandwidth: int,
        slow_down: bool = False,
        post_copy: bool = False,
        channels: int = 1,
        compressed: bool = False,
    ) -> None:
        """Begin pre-copy; it will not switch over by itself (switchover-ack). `peer` is the name the
        destination's certificate must prove. `slow_down`, `post_copy`: `migrate_slow_down`,
        `migrate_post_copy` may follow. Refused if it failed at once."""
        ...

    async def migrate_pace(self, vmm: VmmId, bandwidth: int) -> None:
        """Bytes a second a pre-copy that runs may use from now on. Without effect on one that has ended."""
        ...

    async def migrate_slow_down(self, vmm: VmmId) -> None:
        """From now on the guest gets less and less of its vCPUs while it writes faster than can be sent; it
        gets all of them back when the stream has ended, whichever way."""
        ...

    async def migrate_post_copy(self, vmm: VmmId) -> None:
        """From now on `pause` lets the destination have the server at once, and what it lacks follows.
        Nothing changes before that."""
        ...

    async def migrate_recover(self, vmm: VmmId, uri: str) -> None:
        """Take a stream that broke in post-copy up again, to where its destination waits now. Also where this
        side has not noticed yet."""
        ...

    async def replace_send(self, vmm: VmmId, to: VmmId) -> None:
        """After `pause`: send everything but the memory to `to`, which was started in place. Refused if that
        failed at once; `incoming_wait` tells when it has arrived."""
        ...

    async def migrate_progress(self, vmm: VmmId) -> MigrationProgress: ...

    async def migrate_in_flight(self, vmm: VmmId) -> int:
        """Bytes that count as sent and have not come: they wait in this host's socket, or on the way."""
        ...

    async def pause(self, vmm: VmmId) -> None:
        """Stop the guest's CPUs; the migration then completes, or goes on by post-copy."""
        ...

    async def migrate_cancel(self, vmm: VmmId) -> None:
        """Returns when the source is free for another migration. Repeatable; fine if none runs."""
        ...
