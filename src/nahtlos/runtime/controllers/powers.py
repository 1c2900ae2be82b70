"""How owners of servers ask for them to be stopped and booted anew (`cloud.Powers`)."""

from nahtlos.model.power import STOP_SECONDS
from nahtlos.model.values import Value


class StopRequest(Value, frozen=True, kw_only=True):
    hard: bool = False
    """The guest is not asked: its power is cut."""
    seconds: float = STOP_SECONDS
    """For which a guest that was asked is waited for before its power is cut."""
