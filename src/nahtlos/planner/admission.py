"""How many moves may run at once: in the whole cloud, from and to one host, and over one host's link.
Decides about one more; starts nothing.

Beside each other, pre-copies share the processors and the link of a host. Too many of them end later than one
after another, or never: each must get more than its server writes meanwhile.
"""

from collections.abc import Iterable

from nahtlos.model.blueprint import PlannedMove
from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.draft import Draft
from nahtlos.planner.estimate import ASSUMED_DIRTY_RATE, MIB

LEAST_BYTES = 16 * MIB
"""Bytes a second every move is reckoned with, however little its server writes."""
HEADROOM = 1.5
"""Of what a server writes: with less, a pre-copy takes long to come near its end."""


def running(draft: Draft) -> int:
    """Moves that use one of the slots. A stuck one does nothing, so it does not count."""
    return len(draft.moves) - len(draft.stuck)


def why_not_admitted(draft: Draft, server: ServerId, destination: HostId) -> str:
    """Why `server` cannot be sent to `destination` beside the moves that run; empty if it can."""
    source, policy = draft.servers[server].host, draft.policy
    if running(draft) >= policy.parallel_moves:
        return f"{running(draft)} of as many moves run"
    for host, moves, word in (
        (source, [m for m in _between_hosts(draft) if m.source == source], "from"),
        (destination, [m for m in _between_hosts(draft) if m.destination == destination], "to"),
    ):
        if len(moves) >= policy.parallel_moves_per_host:
            return f"{len(moves)} of as many moves {word} {host} run"
        if full := _why_full(draft, server, host, moves):
            return full
    return ""


def _between_hosts(draft: Draft) -> Iterable[PlannedMove]:
    return (m for m in draft.moves.values() if not m.in_place and m.id not in draft.stuck)


def _why_full(draft: Draft, server: ServerId, host: HostId, moves: list[PlannedMove]) -> str:
    """The first one is always let through: it would wait for ever otherwise."""
    link = draft.policy.move_bytes_per_second
    if not link or not moves:
        return ""
    taken = sum(needs(draft, move.server) for move in moves)
    if taken + needs(draft, server) <= link:
        return ""
    return f"of the {link // MIB} MiB/s moves get at {host}, those that run need {taken // MIB}"


def needs(draft: Draft, server: ServerId) -> int:
    """Bytes a second without which its pre-copy would not come to its end."""
    rate = draft.policy.experience.dirty_rates.get(server, ASSUMED_DIRTY_RATE)
    return max(int(rate * HEADROOM), LEAST_BYTES)
