"""What a blackout is made of, as far as it is known before it happens. Figures and pure functions.

    blackout = pause (stop, what is left to send, run) + what a process that was never used takes to answer

Planners predict by it, and the agents of a move keep a server's budget by it.
"""

COPY_PAUSE_MS = 11.0
"""Between hosts, without what is left to send."""
WAKE_MS = {"tcg": 43.0}
"""What a process that was never used takes to be as quick as before: emulation translates anew."""
OTHER_WAKE_MS = 5.0


def wake_ms(accelerator: str) -> float:
    return WAKE_MS.get(accelerator, OTHER_WAKE_MS)


def seconds_to_send(budget_ms: int, accelerator: str) -> float | None:
    """How long sending what is left may take, so that the whole keeps its budget; None: none was set."""
    if budget_ms <= 0:
        return None
    return max(0.0, (budget_ms - COPY_PAUSE_MS - wake_ms(accelerator)) / 1000)
