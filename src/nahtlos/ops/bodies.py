"""What travels over the operator API besides the structs of `model` and `runtime.controllers.cloud`.

Apart from `ops.api`, so that a client need not load a web server.
"""

from typing import Annotated

import msgspec

from nahtlos.model.blueprint import HostIntent, Strategy
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, ReleaseId
from nahtlos.model.nouns import Component, HostRole

STREAM_KEEPALIVE = 10.0
"""Seconds of silence after which an event stream says that it is still there."""
NEWEST = "newest"
"""Stands for a campaign's id."""


class IntentChange(msgspec.Struct, frozen=True, kw_only=True):
    intent: HostIntent


class JoinTokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    host: HostId
    role: HostRole = HostRole.COMPUTE
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=7 * 86400)] = 3600


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    token: str


class ReleaseRegistration(msgspec.Struct, frozen=True, kw_only=True):
    release: ReleaseId


class MoveRequest(msgspec.Struct, frozen=True, kw_only=True):
    to: HostId | None = None


class ReplaceRequest(msgspec.Struct, frozen=True, kw_only=True):
    by: ReleaseId | None = None


class ReserveChange(msgspec.Struct, frozen=True, kw_only=True):
    hosts: int


class ConsolePart(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes are base64 in JSON."""

    data: bytes
    next_offset: int


class ConsoleInput(msgspec.Struct, frozen=True, kw_only=True):
    data: bytes


class OperatorName(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class OperatorCredential(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator elsewhere needs. Goes to root over the unix socket, once; it is not kept."""

    name: str
    token: str
    ca_pem: str

    def __repr__(self) -> str:
        return f"OperatorCredential(name={self.name})"


class UpgradeRequest(msgspec.Struct, frozen=True, kw_only=True):
    to: ReleaseId
    hosts: tuple[HostId, ...] | None = None
    """None: all hosts that have the component."""
    component: Component = Component.HYPERVISOR
    strategy: Strategy = Strategy.AUTO
    no_way_back: bool = False


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorRecord
