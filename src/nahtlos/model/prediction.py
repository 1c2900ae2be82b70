"""What carrying a running server over costs, as predicted, and what was learned of it. Values only."""

from enum import StrEnum

from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.values import Value


class Means(StrEnum):
    """How a running server is carried to another hypervisor process."""

    IN_PLACE = "in-place"
    PRE_COPY = "pre-copy"
    SLOWED = "pre-copy, slowed"
    """Its vCPUs get less and less until it converges: with its owner's consent only."""
    POST_COPY = "post-copy"
    """It runs at its new host first, and what it lacks of its memory follows: likewise."""


class Workload(Value, frozen=True, kw_only=True):
    """What of a server decides how hard it is to carry."""

    memory_mib: int
    dirty_rate: int | None = None
    """Bytes of memory it touches anew in a second, as measured; None: it never was."""
    devices: int = 2
    blackout_budget_ms: int = 0
    """Agents switch it only where its budget is kept; 0: none was set."""
    server: ServerId = ServerId("")
    """Whose it is, if anybody's: how its memory was copied before says most of how it will be."""


class Estimate(Value, frozen=True, kw_only=True):
    means: Means
    blackout_ms: float
    """As a client sees it: the pause, and what a cold process takes to answer."""
    blackout_ms_max: float
    pause_ms: float
    """Of the blackout what agents can measure: from the stop to the run."""
    brownout_seconds: float
    """Before it, with the server slower than usual."""
    seconds: float
    """From the order to the end."""
    converges: bool = True
    """Whether the pre-copy is predicted to come to its end before its deadline."""
    refused: str = ""
    """Why it is not to be had; empty if it is."""


class Sample(Value, frozen=True, kw_only=True):
    """One that was carried over, as measured."""

    means: Means = Means.PRE_COPY
    server: ServerId = ServerId("")
    memory_mib: int
    devices: int = 2
    seconds: float
    pause_ms: float
    from_release: ReleaseId | None = None
    to_release: ReleaseId | None = None
    dirty_rate: int | None = None
    link: int = 0
    """Bytes a second that were sent; 0: not measured, or too little was sent to say."""
    wake_ms: float | None = None
    """`blackout.woke_ms`; None: its guest does not talk all the time, or nobody listened."""
    brownout_seconds: float | None = None
    """Of `seconds`, the pre-copy; None: it was not told apart."""
    blackout_budget_ms: int = 0


class Calibration(Value, frozen=True, kw_only=True):
    """By how much the model is off: measured over predicted, the median."""

    means: Means
    from_release: ReleaseId | None = None
    to_release: ReleaseId | None = None
    """None in both: of all pairs together."""
    pause: float
    seconds: float
    samples: int
    brownout: float = 1.0
    fixed_seconds: float | None = None
    """What a move takes beside the copying, whatever it carries; with it `seconds` is not used. None: too
    little was measured of it."""


class Experience(Value, frozen=True, kw_only=True):
    """What is known of this cloud beyond the model."""

    dirty_rates: dict[ServerId, int] = {}
    link: int = 0
    """Bytes a second a move gets; 0: the model's own figure."""
    wake_ms: float | None = None
    """What a process that was never used took to answer, lately; None: the model's own figure."""
    calibrations: tuple[Calibration, ...] = ()
    brownouts: dict[ServerId, float] = {}
    """As `Calibration.brownout`, of a server's own last pre-copies."""
    parallel: int = 0
    """Moves at once, if not as many as policy says: a dry run decides on more of them in a step."""
