"""What operators ask and are told about hosts that fail.

`fence` is an assertion: this host has no power. Nothing can check it; so it is refused for a host that
speaks, and counts only until the host is heard of again.
"""

from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.availability import LeaseTerms
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.values import Value


class AvailabilityChange(Value, frozen=True, kw_only=True):
    """What is left out stays as it is."""

    lease_seconds: float | UnsetType = UNSET
    lost_seconds: float | UnsetType = UNSET


class PowerChange(Value, frozen=True, kw_only=True):
    command: tuple[str, ...]
    """Switches the host off, and returns 0 once it is; run by the orchestrator. Empty: there is none."""


class HostStanding(Value, frozen=True, kw_only=True):
    """A host as far as its failing is concerned."""

    host: HostId
    state: str
    """`up`, `lost`, `cut off`, `denied`, `fenced`, `back`"""
    why: str = ""
    lease: LeaseTerms | None = None
    """As it is told. None: it runs without."""
    lease_held: bool = False
    """As it last said."""
    passed_over: dict[ServerId, int] = {}
    """Servers that were restarted elsewhere and of which it has not heard yet, with their epoch."""
    power: bool = False
    """A command is known that switches it off."""


class AvailabilityView(Value, frozen=True, kw_only=True):
    lease_seconds: float
    lost_seconds: float
    hosts: tuple[HostStanding, ...]


class AvailabilityApi(Protocol):
    async def view(self) -> AvailabilityView: ...
    async def change(self, change: AvailabilityChange) -> AvailabilityView: ...
    async def set_power(self, host: HostId, change: PowerChange) -> AvailabilityView: ...
    async def fence(self, host: HostId) -> AvailabilityView:
        """Conflict while the host is connected."""
        ...
