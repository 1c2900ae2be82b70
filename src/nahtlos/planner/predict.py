"""Dry run of a campaign."""

from collections.abc import Sequence

from nahtlos.model.blueprint import Blueprint, Forecast, Policy
from nahtlos.model.ids import HostId, ReleaseId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import Value


class MoveSample(Value, frozen=True, kw_only=True):
    """One measured move of the past."""

    memory_mib: int
    seconds: float
    gap_ms: float
    from_release: ReleaseId | None = None
    to_release: ReleaseId | None = None


def forecast(
    policy: Policy,
    inventory: Inventory,
    parent: Blueprint | None,
    to_release: ReleaseId,
    hosts: tuple[HostId, ...] | None = None,
    samples: Sequence[MoveSample] = (),
    verify_seconds: float | None = None,
) -> Forecast:
    """What a campaign to `to_release` would do. `hosts` None: every compute host."""
    raise NotImplementedError
