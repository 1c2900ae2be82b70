"""What a host knows of the inside of a server: what the agent in the guest says. Values only."""

from nahtlos.model.values import Value


class GuestStatus(Value, frozen=True, kw_only=True):
    """As the guest told it: nothing here is certain."""

    answers: bool = False
    version: str = ""
    """Of its agent."""
    system: str = ""
    kernel: str = ""
    addresses: tuple[str, ...] = ()
    """With the interface before each, without those that only the guest itself can use."""
    frozen: bool = False
    """Its file systems, by its agent."""
    why: str = ""
    """Why it does not answer."""
    heard_at: float = 0.0
    """Wall clock of its host, seconds; 0: never."""
    clock_set_by: float = 0.0
    """Seconds its clock was behind when it was last set here; 0: it was not."""
