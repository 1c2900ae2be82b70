"""The lowest line: what an agent asks of its host. Real drivers and the simulated world serve the same
protocols, and one contract suite (tests/contract) runs against both.

A VMM is named by (server, epoch): the source of a move runs epoch n, the destination n + 1, so both can
exist on one host. Taps are named by their port. File descriptors never pass through these protocols:
they live in the supervisor's store under a name (as in systemd's FDSTORE), where they outlive the agent.

Every call has a deadline of its own inside; it raises Unavailable when that passes, Refused when asked
for something impossible.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec

from nahtlos.model.config import (
    HostConfig,
    NetworkConfig,
    PortConfig,
    ServerConfig,
    VolumeAttachment,
    VolumeEndpoint,
)
from nahtlos.model.errors import NotFound
from nahtlos.model.ids import (
    BackupId,
    HostId,
    KeyId,
    OperationId,
    PortId,
    ReleaseId,
    RouterId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.inventory import (
    Accelerator,
    ComputeStatus,
    LoadBalancerStatus,
    PoolStatus,
    RunState,
    SnapshotStatus,
    VolumeStatus,
)
from nahtlos.model.nouns import Size
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyProgress,
    DiskBudget,
    SnapshotExport,
    SnapshotOffer,
    SnapshotSpec,
    VolumeFormat,
    VolumeSpec,
)


class VmmId(msgspec.Struct, frozen=True, order=True):
    server: ServerId
    epoch: int

    @property
    def unit(self) -> str:
        return f"vmm.{self.server}.{self.epoch}"


# --- supervisor --------------------------------------------------------------------------------------


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that outlives the agent."""

    name: str
    argv: tuple[str, ...]
    """`{fd:NAME}` in an argument becomes the number at which the stored fd NAME is inherited."""
    environment: dict[str, str] = {}
    fds: tuple[str, ...] = ()
    """Names of stored fds to inherit."""
    log: Path
    restart: bool = False
    """Start it again when it ends other than by `stop`."""
    nice: int = 0
    """Scheduling priority: what keeps others alive (agent, orchestrator) is below 0, so that busy guests
    cannot starve it."""
    leased: bool = False
    """It is started, and runs, only until the deadline of `Supervisor.arm`."""


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    pid: int | None
    """None once it has ended; an ended unit stays listed until `forget`."""
    exit_code: int | None = None
    restarts: int = 0


class Supervisor(Protocol):
    """Owns daemons, listening sockets and tap descriptors of one host."""

    async def start(self, unit: Unit) -> UnitStatus:
        """Starting a unit that runs already changes nothing."""
        ...

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        """SIGTERM, after `grace` seconds SIGKILL (at once if 0); returns when it has ended. Forgets it."""
        ...

    async def units(self) -> dict[str, UnitStatus]: ...

    async def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        """At `deadline` (by `clock`) leased units are killed, and from then on none is started until it is
        armed anew. None: there is no deadline until the host is started again. Before it was armed the
        deadline counts as past. `leased` says of units by name whether they need it from here on; what it
        does not name stays as it is."""
        ...

    def clock(self) -> float:
        """The host's clock since boot, in seconds, which counts on while it sleeps."""
        ...

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        """Hold a listening socket under `name`; returns its port (0 asks for any). Repeatable."""
        ...

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None: ...

    async def store_fd(self, name: str, fd: int) -> None:
        """Keep a duplicate of `fd` under `name`, replacing what was there."""
        ...

    async def fetch_fd(self, name: str) -> int | None:
        """A duplicate that the caller must close; None if there is none."""
        ...

    async def drop_fd(self, name: str) -> None: ...

    async def stored(self) -> frozenset[str]: ...


# --- hypervisor --------------------------------------------------------------------------------------

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


class VmmStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: VmmId
    state: RunState
    """RUNNING, PAUSED, INCOMING (still receiving or waiting to), STARTING; STOPPED if the guest has switched
    itself off (never resumed: it has to be ended); CRASHED if the process ended."""
    release: ReleaseId | None
    size: Size
    migrated: bool = False
    """This VMM has received a server completely (destination) and may be resumed."""
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
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class MigrationProgress(msgspec.Struct, frozen=True, kw_only=True):
    phase: MigrationPhase
    remaining: int = 0
    """Bytes; late in a pass this figure is stale (see `passes`)."""
    total: int = 0
    transferred: int = 0
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

    async def save(self, vmm: VmmId, sink: Sink) -> None:
        """Of a guest that stands still (`pause`): memory and devices go to `sink`, in pieces and in order;
        all of them have when this returns. Its guest may be let go on after that, or after a failure. Refused
        if the release would not; what `sink` raises is raised."""
        ...

    async def restore(self, server: ServerConfig, release: ReleaseId, pieces: AsyncIterator[bytes]) -> None:
        """Start a VMM by `server.epoch` that has what was saved, and stands still (PAUSED). Taps must exist.
        Refused if it does not take it; what `pieces` raises is raised. What is left then is for `kill`."""
        ...

    # moves: destination

    async def incoming_start(
        self, server: ServerConfig, epoch: int, release: ReleaseId, *, in_place: bool = False
    ) -> None:
        """Start a VMM that waits (`-incoming defer -S`), capabilities cleared and set. Repeatable.

        `in_place`: for the server that runs here by `server.epoch`. Its memory is shared, not copied, and its
        ports are those of `Network.replace_prepare`."""
        ...

    async def incoming_listen(self, vmm: VmmId, address: str) -> str:
        """Start listening for the stream (TLS, both sides proven); returns the URI for the source."""
        ...

    async def incoming_wait(self, vmm: VmmId, *, timeout: float) -> None:
        """Returns when everything has arrived. Refused if the stream failed; Unavailable on timeout."""
        ...

    async def resume(self, vmm: VmmId) -> None:
        """Let the guest run (again). Who calls this has made sure that no other copy can."""
        ...

    # moves: source

    async def migrate_start(
        self, vmm: VmmId, uri: str, *, peer: str, bandwidth: int, slow_down: bool = False
    ) -> None:
        """Begin pre-copy; it will not switch over by itself (switchover-ack). `peer` is the name the
        destination's certificate must prove. `slow_down`: `migrate_slow_down` may follow. Refused if it
        failed at once."""
        ...

    async def migrate_pace(self, vmm: VmmId, bandwidth: int) -> None:
        """Bytes a second a pre-copy that runs may use from now on. Without effect on one that has ended."""
        ...

    async def migrate_slow_down(self, vmm: VmmId) -> None:
        """From now on the guest gets less and less of its vCPUs while it writes faster than can be sent; it
        gets all of them back when the stream has ended, whichever way."""
        ...

    async def replace_send(self, vmm: VmmId, to: VmmId) -> None:
        """After `pause`: send everything but the memory to `to`, which was started in place. Refused if that
        failed at once; `incoming_wait` tells when it has arrived."""
        ...

    async def migrate_progress(self, vmm: VmmId) -> MigrationProgress: ...

    async def pause(self, vmm: VmmId) -> None:
        """Stop the guest's CPUs; the migration then completes."""
        ...

    async def migrate_cancel(self, vmm: VmmId) -> None:
        """Returns when the source is free for another migration. Repeatable; fine if none runs."""
        ...


# --- network -----------------------------------------------------------------------------------------


class NetworkCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    lossless_move: bool
    ct_transfer: bool
    strict_stateful: bool
    shaper: bool
    details: dict[str, str] = {}
    """What is used and what is missing on this kernel, in words, for `doctor`."""


class MoveRole(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class NetworkObservation(msgspec.Struct, frozen=True, kw_only=True):
    networks: tuple[str, ...]
    local_ports: tuple[PortId, ...]
    """Ports with a tap here."""
    reflecting: tuple[PortId, ...]
    counters: dict[str, dict[str, int]] = {}
    """Per port: rx_packets, tx_packets, tx_dropped (as the tap counts them)."""


class NetworkDesired(msgspec.Struct, frozen=True, kw_only=True):
    """What `reconcile` makes true. `pinned` ports take part in a move: their entries are left alone."""

    config: HostConfig
    pinned: frozenset[PortId] = frozenset()


class Network(Protocol):
    """Frames for a port go where its one FDB entry says. Learning is off everywhere."""

    async def capabilities(self) -> NetworkCapabilities: ...

    async def host_init(self) -> None:
        """Once per agent start: sysctls, tables. Repeatable."""
        ...

    async def reconcile(self, desired: NetworkDesired) -> tuple[str, ...]:
        """Make networks, FDB, neighbours, DHCP, uplinks and reflection as desired; what is right is not
        touched. Returns what was found different and put right. Does not create or delete taps."""
        ...

    async def observe(self) -> NetworkObservation: ...

    async def release(self) -> ReleaseId | None:
        """That every network function beside the kernel runs by (`HostConfig.network_release`), as the last
        reconcile left it; None: the host's own programs."""
        ...

    async def load_balancers(self) -> tuple[LoadBalancerStatus, ...]:
        """Those this host carries, as their health checks find the members. One that does not answer at
        once is left out."""
        ...

    async def port_create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        """A tap for `port`, its fd in the supervisor's store as `tap.<port>` (further queues: `tap.<port>/1`
        onwards). `deliver` says whether
        frames for it go to it from now on (False for the destination of a move: its FDB entry and
        flooding come with the switch). Repeatable."""
        ...

    async def port_delete(self, port: PortId) -> None: ...

    async def move_prepare(
        self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str, *, marked: bool = False
    ) -> None:
        """`vtep` is the other host's tunnel address. Source: gate on, the unused tunnel entry set.
        Destination: the same, towards the source, for an abort. Repeatable. `marked`: the source is to mark
        what its firewall has let in, the destination believes the mark and judges the rest itself. False
        where the other host's release knows no mark."""
        ...

    async def move_sacrifice(self, port: PortId) -> bool:
        """Destination, once its VMM waits: let it swallow one frame nobody misses. False if it did not
        within its deadline."""
        ...

    async def move_switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """Flip the one FDB entry: at the destination to its tap, at the source to the tunnel. Flooded frames
        change hands with it: the destination begins to keep its copies, then the source ends delivering."""
        ...

    async def move_drain(self, port: PortId, *, timeout: float) -> bool:
        """Source, after the switch: wait until the running guest has taken every frame from its tap."""
        ...

    async def move_revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        """Abort after the switch. Source: FDB back to the tap. Destination: frames parked in its tap
        go back through the tunnel; returns their number. Call at the source first."""
        ...

    async def move_state_begin(self, port: PortId) -> bytes:
        """Source, after `move_prepare`: what the firewall remembers of this port's connections, whole, in a
        form only drivers read; changes are noted from here on, until the move is settled or reverted. Empty
        for a port of which no firewall remembers anything, and where that cannot be carried (see
        `NetworkCapabilities.ct_transfer`). Called again, it begins anew."""
        ...

    async def move_state_changes(self, port: PortId) -> bytes:
        """Source: what has changed since the last call of this or of `move_state_begin`. Empty: nothing.
        What could not be noted in full is sent whole."""
        ...

    async def move_state_load(self, port: PortId, state: bytes) -> tuple[str, ...]:
        """Destination: take it up, over what may be there. What arrives twice or late is left out. Returns
        what could not be taken up, in words. Refused if this host cannot take up any, or not in this form;
        Unavailable if it has no room. `port_delete` forgets it again."""
        ...

    async def move_commit(self, port: PortConfig, network: NetworkConfig) -> None:
        """Source, once the destination owns the server: it alone knows all of the port's connections now, so
        what is passed on to it is judged there and no longer here. Repeatable; `move_settle` includes it."""
        ...

    async def move_settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """After the end. Destination: broadcasts reach the tap again. Source: the tap goes; its gate
        stays while the configuration says `reflect`."""
        ...

    # the server stays, its VMM is replaced

    async def replace_prepare(self, port: PortConfig) -> None:
        """Descriptors for the next VMM of this host, in the store as `spare.<port>` (further queues:
        `spare.<port>/1` onwards); nothing is delivered to them yet. Repeatable."""
        ...

    async def replace_join(self, port: PortConfig) -> bool:
        """Once the next VMM waits: it swallows one frame nobody misses (False if it did not within its
        deadline), and is ready for those that are to come."""
        ...

    async def replace_switch(self, port: PortConfig) -> None:
        """Frames go to the next VMM's queues from now on, and wait there until it runs."""
        ...

    async def replace_leave(self, port: PortConfig, *, timeout: float) -> bool:
        """Wait until the running guest has taken what is left in its queues; then nothing is put into them
        any more, and it may still send. False if it did not within `timeout` seconds: nothing has changed."""
        ...

    async def replace_revert(self, port: PortConfig) -> int:
        """The next VMM has ended or will never run: frames go to the old one again, also those its queues had
        kept. Returns their number. Repeatable, also if nothing was prepared."""
        ...

    async def replace_settle(self, port: PortConfig) -> None:
        """The old VMM has ended: the next one's descriptors are the port's `tap.<port>`. Repeatable."""
        ...

    # a router's way out goes to another host

    async def gateway_prepare(self, config: HostConfig, router: RouterId) -> None:
        """Destination: `config` is this host's, but with the gateway of `router` here. Everything of it is
        made, and nothing leads to it yet. It stays until a reconcile wants it, or `gateway_abandon`.
        Repeatable; NotFound while this host has none of the router's networks."""
        ...

    async def gateway_abandon(self, number: int) -> None:
        """What was prepared for router `number` goes with the next reconcile."""
        ...

    async def gateway_state_export(self, number: int) -> bytes:
        """What connection tracking remembers of the gateway of router `number`; only drivers read it."""
        ...

    async def gateway_state_import(self, number: int, state: bytes) -> int:
        """Take it up, over what may be there; returns how many connections. Repeatable. Refused in a form
        this host does not know, Unavailable if it has no room."""
        ...


# --- storage -----------------------------------------------------------------------------------------


class StorageDesired(msgspec.Struct, frozen=True, kw_only=True):
    """What `Storage.reconcile` makes true. What is not named is left alone."""

    volumes: tuple[VolumeSpec, ...] = ()
    removed: tuple[VolumeId, ...] = ()
    snapshots: tuple[SnapshotSpec, ...] = ()
    removed_snapshots: tuple[SnapshotId, ...] = ()
    exports: tuple[SnapshotExport, ...] = ()
    """Snapshots to be readable from outside; others are withdrawn."""
    release: ReleaseId | None = None
    """Of the storage daemon. None: whatever it runs."""
    budget: DiskBudget = DiskBudget()
    pinned: frozenset[VolumeId] = frozenset()
    """Volumes that take part in an operation here: neither created, nor served otherwise, nor resized."""


OnMoment = Callable[[], Awaitable[None]]
OnCopied = Callable[[int, int], None]
"""Bytes done, bytes in all. May be called in a thread."""


Speed = Callable[[], int]
"""Bytes a second that may be copied now; 0: no limit. Called in a thread."""


class SnapshotFetch(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots that come here by `operation`."""

    operation: OperationId
    volume: VolumeId
    source: VolumeEndpoint
    """The storage daemon that offers them."""


class BackupResult(msgspec.Struct, frozen=True, kw_only=True):
    base: BackupId | None
    """What it rests on; None: it is a full one."""
    stored_bytes: int
    why_full: str = ""
    """Why it is a full one although changes were asked for."""


class FileWritten(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    sha256: str


class Keyring(Protocol):
    async def key(self, key: KeyId) -> bytes:
        """Unavailable if who keeps it cannot be reached, NotFound if there is none."""
        ...


class RawVolume(Protocol):
    """A volume as an agent itself reads and writes it: never one that a server has."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """To every copy. At most 4 MiB at once."""
        ...

    async def flush(self) -> None:
        """What was written is durable on return."""
        ...

    async def read(self, offset: int, length: int) -> bytes: ...

    async def close(self) -> None: ...


class Storage(Protocol):
    """Volumes of this host. Every verb can be repeated; a daemon that dies and is started again by its
    supervisor serves what was served, and no acknowledged write is lost."""

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        """Create what is missing, from its image or snapshot or blank; serve everything by its epoch; enlarge
        what is to be larger; delete what is removed; run the wanted release. Returns what was put right."""
        ...

    async def observe(self) -> tuple[VolumeStatus, ...]: ...

    async def pool(self) -> PoolStatus | None:
        """Where this host keeps its volumes; None if it keeps none itself."""
        ...

    async def release(self) -> ReleaseId | None:
        """That the daemon runs by; None while there is none."""
        ...

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        """A volume of this or another host. Unavailable while it is not served."""
        ...

    # snapshots

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        """All at one moment. Those that exist are left as they are; all or none of the others are made."""
        ...

    async def snapshots(self) -> tuple[SnapshotStatus, ...]: ...

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        """The volume is as it was then. Conflict while a client has it open. All snapshots stay."""
        ...

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        """Readable by other hosts, layer by layer, until `end_offer` or until the daemon ends. Said again,
        it is an offer of its own. NotFound where one is not here, Unavailable while anything they rest on may
        still change."""
        ...

    async def end_offer(self, volume: VolumeId) -> None: ...

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        """What another host offers is here on return, all of it, as snapshots of the volume, whether that is
        here or not. Nothing that is here changes. Repeated after a crash it goes on where it was."""
        ...

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        """The snapshots this operation has brought here, and what it has begun to copy, are gone."""
        ...

    # relocation: source

    async def serve(self, volume: VolumeSpec) -> None:
        """Reachable at this host by `volume.export`, beside any other way to it: what is copied from here
        must be written through here. Nothing to do for what is served here anyway."""
        ...

    async def relocate_start(
        self,
        volume: VolumeSpec,
        target: VolumeEndpoint,
        *,
        bytes_per_second: int,
        changes: Changes | None = None,
    ) -> None:
        """Copy all of it to `target` while it is written; from READY on every write goes to both.
        `bytes_per_second`: 0 for no limit; may be called again with another one. `changes`, of the copy at
        `target`: only what was written there or here since is copied; Conflict if that is not known here."""
        ...

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress: ...

    async def relocate_complete(self, volume: VolumeId) -> None:
        """From its return on, and after any crash from its beginning on, this host passes everything on to
        the target and its own file counts for nothing. Refused unless READY."""
        ...

    async def relocate_cancel(self, volume: VolumeId) -> None:
        """The volume is this host's alone again. Conflict once `relocate_complete` has begun."""
        ...

    async def relocate_finish(self, volume: VolumeId) -> None:
        """No client comes here any more: withdraw it, delete the file. Refused unless it was completed."""
        ...

    # relocation and replication: destination

    async def receive(self, volume: VolumeSpec) -> None:
        """A blank file of its size, served for writing to hosts by `volume.epoch`. What an earlier attempt
        has left in it is no matter."""
        ...

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        """Instead of `receive`: what is here stays, as the base of a copy that only takes what differs, and
        is served for writing by `volume.epoch`. None: it is nothing to begin from."""
        ...

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        """From now on remember what is written (as long as the daemon lives), under this name."""
        ...

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        """All copies hold what was written before `step_begin` was answered by all of them: durable here on
        return. Refused if what was written since is not known."""
        ...

    # backups and files

    async def backup(
        self,
        volume: VolumeId,
        backup: BackupSpec,
        base: BackupSpec | None,
        *,
        bytes_per_second: int,
        on_copied: OnCopied,
        on_moment: OnMoment | None = None,
    ) -> BackupResult:
        """Whole at its target when this returns. What has changed since `base`, or everything if that is not
        known or none is named; never less. Repeated after a crash, it is made of the same changes. A guest
        never waits for a target. `on_moment` is awaited as soon as it is decided which moment the backup is
        of, before anything is copied; what it raises ends this."""
        ...

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        """It is not to be: the next one begins where this would have."""
        ...

    async def backup_delete(self, backup: BackupSpec) -> None:
        """It is not at its target any more; the volume need not be here. Another one of that name stays, and
        one that is not there is fine. What rests on it can be restored no more: nothing may."""
        ...

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        """Into `volume`, which was received by its epoch and is blank. Refused where a backup is missing, is
        not whole, or holds something else than was written."""
        ...

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        """`file` appears when it is complete. Conflict if there is one, unless this is said `again`: then it
        is what was written before."""
        ...

    # health

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        """Say of a copy that it was found wrong while it was served by `epoch` (`VolumeStatus.problem`),
        until it is received anew. An empty `problem`: it was found right."""
        ...

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        """SHA-256 of these bytes as they are on disk; zeros and holes are alike."""
        ...


class Drivers(msgspec.Struct, frozen=True, kw_only=True):
    """The physical layer of one host, as its agent holds it."""

    supervisor: Supervisor
    hypervisor: Hypervisor
    network: Network
    storage: Storage


class Crash(BaseException):
    """Raised by a simulated world to end an agent as kill -9 would: nothing may catch it."""
