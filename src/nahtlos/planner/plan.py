"""The planner's table of contents."""

from nahtlos.model.blueprint import Blueprint, PlanReport, Policy
from nahtlos.model.inventory import Inventory


def plan(policy: Policy, inventory: Inventory, parent: Blueprint | None) -> tuple[Blueprint, PlanReport]:
    """The next blueprint, or `parent` itself if nothing changes."""
    raise NotImplementedError
