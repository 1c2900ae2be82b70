"""The one contract between runtime and host, and between host and host.

Every message is a tagged struct; unknown fields are ignored, unknown messages are refused (`Failure` with
kind `refused`), so two neighbouring releases can talk. A message is carried in an `Envelope`.

    agent -> orchestrator   Hello, Report, Event, ReplicaLost, KeyRead          answers to commands
    orchestrator -> agent   Configure, BeginMove, BeginReplace, BeginVerify, BeginVolumeTask, BeginGateway,
                            Acknowledge, CancelOperation, ConsoleRead, ConsoleWrite, Ping
    agent -> agent          PeerHello, MovePrepare, MoveState, MoveSwitch, MoveCommit, MoveAbandon, …
                            VolumeReceive, VolumeAttach, …, GatewayPrepare, GatewayTake, … LeaseAsk
"""

import msgspec

from nahtlos.model.config import HostConfig, PortConfig, ServerConfig, VolumeAttachment
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId, PortId, ReleaseId, ServerId
from nahtlos.model.inventory import HostInventory
from nahtlos.model.nouns import HostRole
from nahtlos.wire.displays import (
    DisplayClose,
    DisplayData,
    DisplayOpen,
    DisplayOpened,
    DisplayRead,
    DisplayWrite,
)
from nahtlos.wire.gateways import (
    BeginGateway,
    GatewayAbandon,
    GatewayOutcome,
    GatewayPrepare,
    GatewayState,
    GatewayTake,
)
from nahtlos.wire.message import Decision as Decision
from nahtlos.wire.message import Message as Message
from nahtlos.wire.volumes import (
    BeginVolumeTask,
    GuestFreeze,
    GuestThaw,
    KeyData,
    KeyRead,
    ReplicaLost,
    ReplicasRecorded,
    SetCopySpeed,
    VolumeAttach,
    VolumeDigest,
    VolumeDigested,
    VolumeForget,
    VolumeFreeze,
    VolumeKeep,
    VolumeMark,
    VolumeOffer,
    VolumeOffered,
    VolumeOfferEnd,
    VolumeRanOn,
    VolumeReceive,
    VolumeRejoin,
    VolumeRejoined,
    VolumeSnapshot,
    VolumeSnapshotPrepare,
    VolumeStep,
    VolumeThaw,
)

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


# --- session -----------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First message of an agent. The host it claims must be the one its certificate names."""

    host: HostId
    role: HostRole
    protocol_min: int
    protocol_max: int
    agent_version: str
    capabilities: tuple[str, ...]
    """e.g. `move`, `verify`, `console`, `network:native:lossless`"""
    boot_id: str
    orchestrator_epoch: int
    """The highest orchestrator epoch this agent has obeyed."""


class Welcome(Message, frozen=True, kw_only=True):
    """Answer to Hello and PeerHello: the version both will speak."""

    protocol: int
    orchestrator_epoch: int = 0


class Done(Message, frozen=True, kw_only=True):
    """The command was accepted (and, where it is not an operation, carried out)."""


class Failure(Message, frozen=True, kw_only=True):
    error: ErrorRecord


class Ping(Message, frozen=True, kw_only=True):
    pass


# --- agent to orchestrator ---------------------------------------------------------------------------


class Report(Message, frozen=True, kw_only=True):
    """The host's inventory: after every change and at least every few seconds."""

    inventory: HostInventory


class Event(Message, frozen=True, kw_only=True):
    """Something worth a line in the log and on the operator's screen, as it happens."""

    host: HostId
    at: float
    kind: str
    """e.g. `move.step`, `server.crashed`, `drift`, `agent.restarted`"""
    subject: str
    text: str
    data: dict[str, str | int | float] = {}


# --- orchestrator to agent ---------------------------------------------------------------------------


class Configure(Message, frozen=True, kw_only=True):
    config: HostConfig


class MoveOrder(msgspec.Struct, frozen=True, kw_only=True):
    """All that both agents need to carry a move to its end without the orchestrator."""

    id: OperationId
    server: ServerConfig
    """As the source owns it; `server.epoch` is the source's epoch, the destination's is one more."""
    ports: tuple[PortConfig, ...]
    """The server's ports as they are at the source."""
    source: HostId
    destination: HostId
    source_address: str
    destination_address: str
    destination_peer_port: int
    precopy_deadline: float = 120.0
    """Seconds until a pre-copy that does not converge is given up (undone)."""
    bandwidth: int = 4 << 30
    """Bytes per second the move may use."""
    boost: int = 0
    """Bytes per second it may use if it would not end otherwise; 0: no more than `bandwidth`."""
    channels: int = 1
    """Connections its memory is sent by."""
    compressed: bool = False
    """Its memory is, if the destination can take that."""
    slow_down: bool = False
    """The server may be given less and less of its vCPUs until the pre-copy converges."""
    post_copy: bool = False
    """It is predicted to end by post-copy alone: once all was sent once, it is handed over, and the rest
    follows. Both hosts can, and the server's owner has permitted it."""

    @property
    def epoch(self) -> int:
        return self.server.epoch + 1


class BeginMove(Message, frozen=True, kw_only=True):
    """Sent to the destination first, then to the source. Repeating it changes nothing."""

    order: MoveOrder


class ReplaceOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The server stays on `host`; a VMM of `release` takes it over."""

    id: OperationId
    host: HostId
    server: ServerConfig
    """As it is owned; `server.epoch` is the old VMM's, the new one's is one more."""
    ports: tuple[PortConfig, ...]
    release: ReleaseId

    @property
    def epoch(self) -> int:
        return self.server.epoch + 1


class BeginReplace(Message, frozen=True, kw_only=True):
    """Repeating it changes nothing."""

    order: ReplaceOrder


class BeginVerify(Message, frozen=True, kw_only=True):
    """Boot a probe under `release` (which must be the configured one) and report the outcome."""

    id: OperationId
    release: ReleaseId


class CancelOperation(Message, frozen=True, kw_only=True):
    """Undo the operation if its point of no return has not been reached; otherwise `Conflict`. To the
    destination of a move: its source is fenced, and will not be heard any more."""

    id: OperationId


class Acknowledge(Message, frozen=True, kw_only=True):
    """The runtime has recorded these ended operations; the agent may forget them."""

    ids: tuple[OperationId, ...]


class ConsoleRead(Message, frozen=True, kw_only=True):
    """Answered with ConsoleData, at once if there is something to say."""

    server: ServerId
    offset: int
    limit: int = 65536
    history: str = ""
    """To which `offset` belongs; empty: whichever there is."""
    wait: float = 0.0
    """Seconds to wait at most for something to say."""


class ConsoleData(Message, frozen=True, kw_only=True):
    data: bytes
    """What comes before `next_offset`. It begins after the offset that was asked for if what is between is
    not kept any more."""
    next_offset: int
    history: str = ""
    """Offsets count in this one: another one than was asked for has nothing to do with it. Empty: from an
    agent that counts for each VMM anew."""


class ConsoleWrite(Message, frozen=True, kw_only=True):
    server: ServerId
    data: bytes
    counted: bool = False
    """To be answered with ConsoleTaken; else, and by an older agent, with Done."""


class ConsoleTaken(Message, frozen=True, kw_only=True):
    taken: int
    """Bytes that the guest's serial port took. It takes no more now if these are not all."""


# --- agent to agent: one move ------------------------------------------------------------------------


class PeerHello(Message, frozen=True, kw_only=True):
    host: HostId
    protocol_min: int
    protocol_max: int


class MovePrepare(Message, frozen=True, kw_only=True):
    """Source to destination: get ready to receive. Refused unless the destination holds the same order."""

    id: OperationId
    server: ServerId
    epoch: int
    volumes: tuple[VolumeAttachment, ...] = ()
    """How the server reaches them. An order is worded anew each time it is given: what one of the two agents
    took up early may be older than the loss of a copy."""
    marks: bool = False
    """The source will mark what its firewall has let in, if the destination says that it believes that."""
    vcpus: int = 0
    """That the server has now, which the destination's machine must have, too; 0: as the order says."""
    post_copy: bool = False
    """Memory may follow after the server was handed over, if the destination says that it can."""
    channels: int = 1
    """By which its memory is to be sent, if the destination says so, too."""
    compressed: bool = False
    """Likewise."""


class MoveReady(Message, frozen=True, kw_only=True):
    """The destination's VMM waits at `uri`; its taps exist and have swallowed their sacrificial frames."""

    uri: str
    believes_marks: bool = False
    """What comes by the tunnel without the source's mark is judged here."""
    post_copy: bool = False
    """Memory may follow after the server was handed over."""
    why_no_post_copy: str = ""
    channels: int = 1
    """By which memory is taken."""
    compressed: bool = False
    """It is taken compressed."""


class MoveState(Message, frozen=True, kw_only=True):
    """Source to destination, during pre-copy: what the firewall remembers, by port, in order."""

    id: OperationId
    states: dict[PortId, bytes]


class MoveTurn(Message, frozen=True, kw_only=True):
    """Source to destination: may this move be switched at your host now? Asked again and again until it may,
    which also keeps its place in the line."""

    id: OperationId


class MoveTurnSaid(Message, frozen=True, kw_only=True):
    """Answer to MoveTurn. A turn that is given ends with the switch, or a few seconds after it was last
    asked for."""

    id: OperationId
    granted: bool
    ahead: int = 0
    """Others that wait before it: who is far back need not ask so often."""


class MoveTurnBack(Message, frozen=True, kw_only=True):
    """Source to destination: it is not switched after all, not now."""

    id: OperationId


class MoveSwitch(Message, frozen=True, kw_only=True):
    """Source to destination, before the source flips its own path: deliver to your taps from now on."""

    id: OperationId
    states: dict[PortId, bytes] = {}
    """Changes to what `MoveState` sent; loaded before anything is delivered."""


class MoveCommit(Message, frozen=True, kw_only=True):
    """Source to destination: I have stopped for good and will not resume unless you abandon.
    Answered when the destination owns the server durably and runs it."""

    id: OperationId
    states: dict[PortId, bytes] = {}
    """The last changes to what `MoveState` sent; loaded before the guest runs."""
    post_copy: bool = False
    """Memory follows, so the server can run nowhere but at the destination: it is given up only if its VMM
    there has ended."""


class MoveAbandon(Message, frozen=True, kw_only=True):
    """Source to destination: give it up if you can. The answer is final either way."""

    id: OperationId


class MoveOutcome(Message, frozen=True, kw_only=True):
    """Answer to MoveCommit and MoveAbandon, and to the question below."""

    id: OperationId
    decision: Decision
    running_since: float | None = None
    error: ErrorRecord | None = None


class MoveQuery(Message, frozen=True, kw_only=True):
    id: OperationId


class MoveRecover(Message, frozen=True, kw_only=True):
    """Source to destination, after the commit, once the stream has broken before all memory had followed:
    wait for it anew. Refused if it is not missed any more, whatever the reason: the source may then end."""

    id: OperationId


class MoveRecovers(Message, frozen=True, kw_only=True):
    """Answer to MoveRecover: the destination's VMM waits at `uri`."""

    id: OperationId
    uri: str


class MoveReturnFrames(Message, frozen=True, kw_only=True):
    """Source to destination after an abandoned move: pass the frames you parked back to me, then forget
    the ports."""

    id: OperationId


class MoveConsole(Message, frozen=True, kw_only=True):
    """Source to destination, after the commit: what the server's console has said until then."""

    id: OperationId
    history: str
    end: int
    """Offset at which what it says at the destination begins."""
    data: bytes
    """What comes before `end`."""


class MoveFinished(Message, frozen=True, kw_only=True):
    """Source to destination: my copy is gone; your journal of this move may end."""

    id: OperationId


class LeaseAsk(Message, frozen=True, kw_only=True):
    """Host to a member of its lease: grant it to me, from the moment at which I asked. Refused while the
    member was told to deny it, and by one that does not know the host."""

    seconds: float
    """That it would last."""


class LeaseGranted(Message, frozen=True, kw_only=True):
    pass


ToAgent = (
    Configure
    | BeginMove
    | BeginReplace
    | BeginVerify
    | BeginVolumeTask
    | BeginGateway
    | CancelOperation
    | SetCopySpeed
    | Acknowledge
    | ConsoleRead
    | ConsoleWrite
    | DisplayOpen
    | DisplayRead
    | DisplayWrite
    | DisplayClose
    | Ping
)
ToOrchestrator = Hello | Report | Event | ReplicaLost | KeyRead | Ping
ToPeer = (
    PeerHello
    | MovePrepare
    | MoveState
    | MoveTurn
    | MoveTurnBack
    | MoveSwitch
    | MoveCommit
    | MoveAbandon
    | MoveQuery
    | MoveRecover
    | MoveReturnFrames
    | MoveConsole
    | MoveFinished
    | VolumeReceive
    | VolumeAttach
    | VolumeForget
    | VolumeKeep
    | VolumeFreeze
    | VolumeThaw
    | GuestFreeze
    | GuestThaw
    | VolumeSnapshot
    | VolumeSnapshotPrepare
    | VolumeDigest
    | VolumeMark
    | VolumeRejoin
    | VolumeRanOn
    | VolumeStep
    | VolumeOffer
    | VolumeOfferEnd
    | GatewayPrepare
    | GatewayState
    | GatewayTake
    | GatewayAbandon
    | LeaseAsk
    | Ping
)
Answer = (
    Welcome
    | Done
    | Failure
    | ConsoleData
    | ConsoleTaken
    | DisplayOpened
    | DisplayData
    | MoveReady
    | MoveTurnSaid
    | MoveOutcome
    | MoveRecovers
    | GatewayOutcome
    | ReplicasRecorded
    | KeyData
    | VolumeDigested
    | VolumeRejoined
    | VolumeOffered
    | LeaseGranted
)
AnyMessage = ToAgent | ToOrchestrator | ToPeer | Answer


class Envelope(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """`id` numbers the sender's messages from 1; an answer carries the id it answers in `reply_to`.
    `epoch` is the orchestrator's (0 in what agents send): an agent refuses one lower than it has seen."""

    id: int
    reply_to: int | None
    epoch: int
    body: msgspec.Raw
