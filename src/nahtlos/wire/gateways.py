"""What two agents are ordered to do when a router's way out goes from one host to another, and say to each
other about it. See `wire.messages`.
"""

import msgspec

from nahtlos.model.config import RouterConfig
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId, RouterId
from nahtlos.wire.message import Decision, Message
from nahtlos.wire.volumes import PeerAddress


class GatewayOrder(msgspec.Struct, frozen=True, kw_only=True):
    """All that both agents need to carry the way out of `router` to its new place by themselves."""

    id: OperationId
    router: RouterConfig
    """As the destination shall have it: its gateway is there, by the epoch after the move."""
    source: PeerAddress
    destination: PeerAddress

    @property
    def id_of_router(self) -> RouterId:
        return self.router.spec.id

    @property
    def number(self) -> int:
        return self.router.spec.number

    @property
    def epoch(self) -> int:
        return self.router.gateway_epoch

    @property
    def hosts(self) -> tuple[HostId, HostId]:
        return self.source.host, self.destination.host


class BeginGateway(Message, frozen=True, kw_only=True):
    """Sent to the destination first, then to the source. Repeating it changes nothing."""

    order: GatewayOrder


class GatewayPrepare(Message, frozen=True, kw_only=True):
    """Source to destination: make everything but what leads to it. Refused unless it holds the same order."""

    id: OperationId


class GatewayState(Message, frozen=True, kw_only=True):
    """Source to destination, before it takes and after, until every host knows the new place: what connection
    tracking remembers of the gateway, whole, in a form only drivers read."""

    id: OperationId
    state: bytes


class GatewayTake(Message, frozen=True, kw_only=True):
    """Source to destination: be the way out. Answered once that is durable and done."""

    id: OperationId
    state: bytes


class GatewayAbandon(Message, frozen=True, kw_only=True):
    """Source to destination: give it up if you can. The answer is final either way."""

    id: OperationId


class GatewayOutcome(Message, frozen=True, kw_only=True):
    """Answer to GatewayTake and GatewayAbandon."""

    id: OperationId
    decision: Decision
    error: ErrorRecord | None = None
