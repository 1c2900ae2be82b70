"""Where new servers go."""

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import ServerSpec, Size, Value


class NoRoom(Value, frozen=True, kw_only=True):
    """Why a server cannot be placed as asked."""

    host: HostId | None
    reason: str
    lacks: Size
    """By how much the host lacks (zero if room is not what it lacks)."""
    fits_on: tuple[HostId, ...]
    remedy: str


def room_for(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, spec: ServerSpec, host: HostId | None
) -> NoRoom | None:
    """None if `spec` can be placed now on `host` (None: on any)."""
    raise NotImplementedError
