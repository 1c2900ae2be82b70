"""What becomes of servers when a host fails, and how one is known to have failed.

A host keeps a *lease* while a majority of its members (hosts, itself among them) has granted it lately. What
shall be restarted elsewhere runs only under a lease, so a host that has none runs none of it. Members that
were told to *deny* a host grant it nothing more; once so many deny it that the others are no majority, and
the lease has run out by every clock, the host is *fenced*. See docs/decisions/0014-host-failure.md.
"""

import math
from collections.abc import Collection, Iterable
from enum import StrEnum

from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.values import Value


class OnHostFailure(StrEnum):
    """What an owner wants for a server whose host fails, or is emptied."""

    RESTART = "restart"
    """It is started on another host. It runs only while its host has its lease."""
    EVACUATE_ONLY = "evacuate-only"
    """It waits for its host; it is moved away where that is planned."""
    LEAVE = "leave"
    """It waits for its host, and stays there also when the host is emptied."""


MEMBERS = 5
"""Of a host's lease, itself included: it is kept while any two of the others are away."""
FEWEST_MEMBERS = 3
"""With fewer, one host that fails would end the other's lease, too: then there are no leases."""
DRIFT = 0.01
"""By how much the rate of a host's clock may differ from that of time."""
STOP_SECONDS = 2.0
"""Within which a supervisor has ended what ran under a lease that ran out."""


def majority(members: int) -> int:
    return members // 2 + 1


class LeaseTerms(Value, frozen=True, kw_only=True):
    members: tuple[HostId, ...]
    """Sorted; the host itself is one of them."""
    seconds: float
    """It lasts so long from the moment at which a majority was asked, by the host's own clock."""


class Denial(Value, frozen=True, kw_only=True):
    """The host is granted nothing from here on. A later denial of the same host has a higher `term`."""

    host: HostId
    term: int
    seconds: float
    """By the clock of who denies: after so long every lease that was granted before has run out."""


class DenialStatus(Value, frozen=True, kw_only=True):
    """Of a member that denies, durably."""

    host: HostId
    term: int
    ripe: bool
    """It has lasted `Denial.seconds`."""


class Standing(Value, frozen=True, kw_only=True):
    """What a host says of its own lease and of others'. None of it: its agent knows no leases."""

    terms: LeaseTerms | None = None
    """That it keeps to. None: what shall be restarted runs here without a lease."""
    held: bool = False
    heard: tuple[HostId, ...] = ()
    """Hosts that have asked this one for a lease lately."""
    denials: tuple[DenialStatus, ...] = ()


class PassedOver(Value, frozen=True, kw_only=True):
    """The server is another host's by `epoch`: whatever there is here of an older one is not to run."""

    server: ServerId
    epoch: int


class AvailabilitySettings(Value, frozen=True, kw_only=True):
    lease_seconds: float = 20.0
    lost_seconds: float = 10.0
    """A host that has reported nothing for so long, while others have, may have failed."""
    power: dict[HostId, tuple[str, ...]] = {}
    """The command that switches a host off and returns 0 once it is; run by the orchestrator."""


class Off(Value, frozen=True, kw_only=True):
    """Somebody vouches for a host having no power."""

    by: str
    at: float = 0.0


def denial_seconds(terms: Iterable[LeaseTerms]) -> float:
    """How long a denial must last for a host that may keep to any of these."""
    longest = max((t.seconds for t in terms), default=0.0)
    return longest * (1 + DRIFT) / (1 - DRIFT) + STOP_SECONDS * (1 + DRIFT)


def cut_off(terms: LeaseTerms, denying: Collection[HostId]) -> bool:
    """Whether those members that do not deny are no majority any more."""
    return len(set(terms.members) - set(denying)) < majority(len(terms.members))


def lease_until(terms: LeaseTerms, granted: dict[HostId, float]) -> float:
    """By the clock the times of asking in `granted` are of; -inf without a majority. The host grants itself
    whatever it asks of others."""
    others = sorted((at for member, at in granted.items() if member in terms.members), reverse=True)
    needed = majority(len(terms.members)) - 1
    if needed > len(others):
        return -math.inf
    return others[needed - 1] + terms.seconds if needed else math.inf
