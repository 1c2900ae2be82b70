"""What a server's owner permits of its being carried elsewhere: whether it can be granted. Pure."""

from nahtlos.model.errors import Refused

LONGEST_BUDGET_MS = 600_000
HIGHEST_PRIORITY = 100


def checked_budget(milliseconds: int | None) -> int:
    """0 if none is set."""
    if milliseconds is None:
        return 0
    if not 1 <= milliseconds <= LONGEST_BUDGET_MS:
        raise Refused(
            f"{milliseconds} ms is no blackout budget",
            field="blackout_budget_ms",
            remedy=f"give 1 to {LONGEST_BUDGET_MS} milliseconds, or leave it out for none",
        )
    return milliseconds


def checked_priority(priority: int) -> int:
    if not -HIGHEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise Refused(
            f"a restart priority of {priority}",
            field="restart_priority",
            remedy=f"give {-HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}; the highest is restarted first",
        )
    return priority
