"""What a blackout is made of, as far as it is known before it happens. Figures and pure functions.

    blackout = pause (stop, what is left to send, run) + what a process that was never used takes to answer

Planners predict by it, and the agents of a move keep a server's budget by it.
"""

from collections.abc import Mapping

COPY_PAUSE_MS = 11.0
"""Between hosts, without what is left to send."""
WAKE_MS = {"tcg": 55.0}
"""What a process that was never used takes to be as quick as before: emulation translates anew."""
OTHER_WAKE_MS = 5.0
HEARD_MS = 14.0
"""Of it, what hosts do not see: from the switch of the path to the stop, and from the guest's first frame
to a client's first answer."""
POST_COPY_PAUSE_MS = 360.0
"""By post-copy: devices, and the list of what is to be sent anew. This and the next are the worst of what was
measured (docs/decisions/0022), for a budget is rather not tried than not kept."""
POST_COPY_FIRST_BYTES = 128 << 20
"""What a server touches first of what follows it: it runs, and answers once that has come."""


HANDOVER_SECONDS = 0.02
"""From the sync of the dirty bitmap that a switch is decided by until the guest stands still: the path is led
elsewhere, and the guest takes what has come. It writes meanwhile."""


def wake_ms(accelerator: str) -> float:
    return WAKE_MS.get(accelerator, OTHER_WAKE_MS)


def first_pages_ms(link: float) -> float:
    """Of a post-copy: from when it runs until it has what it touches first; `link`: bytes a second."""
    return POST_COPY_FIRST_BYTES / link * 1000


def slowest_for_post_copy(budget_ms: int, accelerator: str) -> float:
    """Bytes a second of the link from which on a post-copy keeps the budget; 0: over any, infinity: over
    none."""
    if budget_ms <= 0:
        return 0.0
    left = budget_ms - POST_COPY_PAUSE_MS - wake_ms(accelerator)
    return POST_COPY_FIRST_BYTES * 1000 / left if left > 0 else float("inf")


def woke_ms(times: Mapping[str, float]) -> float | None:
    """By the times of an operation; None if its guest was not heard."""
    running, answered = times.get("running"), times.get("answered")
    if running is None or answered is None or answered < running:
        return None
    return (answered - running) * 1000 + HEARD_MS


def seconds_to_send(budget_ms: int, accelerator: str) -> float | None:
    """How long sending what is left may take, so that the whole keeps its budget; None: none was set."""
    if budget_ms <= 0:
        return None
    return max(0.0, (budget_ms - COPY_PAUSE_MS - wake_ms(accelerator)) / 1000)
