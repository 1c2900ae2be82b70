"""The campaign: which host is emptied next, switched, verified, taken back."""

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.ids import HostId


def upgraded_hosts(policy: Policy, blueprint: Blueprint) -> tuple[HostId, ...]:
    """Hosts of the policy's campaign that run its release and are in service."""
    raise NotImplementedError


def campaign_over(policy: Policy, blueprint: Blueprint) -> bool:
    """Whether the policy's campaign has come to its end: all upgraded, or a cancellation carried out."""
    raise NotImplementedError
