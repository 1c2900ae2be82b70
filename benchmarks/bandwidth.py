"""`make bench-bandwidth`: how exactly ports and the underlay get the bandwidth that they were promised.

Rates are those of whole frames, as limits are meant; what TCP carries of them is shown beside. Everything is
measured at the receiving end, between two namespaces (see `benchmarks.bandwidth_site`): a port limited to 5,
50 and 500 Mbit/s in both directions under TCP and under UDP that offers a fifth more; how long a change of a
limit takes to be seen; and what moves, tenants and control get of a full underlay, alone and at once.
"""

import argparse
import sys
import time

from benchmarks import bandwidth_load as load
from benchmarks.bandwidth_site import Arrivals, Bridge, Cable, Flow, Running, run
from benchmarks.figures import Figures, Goal
from nahtlos.model.config import UnderlayShares
from nahtlos.model.networking import PortBandwidth, Rate
from nahtlos.physical.settings import MIGRATION_PORTS

MEGABIT = 1_000_000
"""bit/s"""
RATES = (5, 50, 500)
WARM_UP, QUICK_SECONDS, LONG_SECONDS = 1.0, 4.0, 10.0
SLOW_TIMES = 2
"""At 5 Mbit/s the few frames that TCP sends again at first are a larger part: so much longer is measured."""
OFFERED = 1.2
WITHIN = Goal(at_least=0.95, at_most=1.05, of_ratio=True)
SEEN_MS = Goal(at_most=200)
SEEN_BINS = 5
"""A new rate is seen once 50 ms together are within a tenth of it."""


def limited(megabits: int) -> PortBandwidth:
    rate = Rate(bits_per_second=megabits * MEGABIT)
    return PortBandwidth(ingress=rate, egress=rate)


# --- ports -------------------------------------------------------------------------------------------


def accuracy(figures: Figures, site: Bridge, seconds: float) -> None:
    for megabits in RATES:
        site.limit(limited(megabits))
        offered = int(megabits * MEGABIT * OFFERED)
        for kind in ("tcp", "udp"):
            for flow in (site.received(kind, offered), site.sent(kind, offered)):
                way = "received" if flow.target == site.name("limited") else "sent"
                (arrivals,) = run([flow], seconds * SLOW_TIMES if megabits == RATES[0] else seconds)
                add_accuracy(figures, f"{kind} {way}, limit {megabits} Mbit/s", arrivals, megabits)


def add_accuracy(figures: Figures, what: str, arrivals: Arrivals, megabits: int) -> None:
    until = arrivals.ended - arrivals.began
    frames = arrivals.frames(WARM_UP, until) / MEGABIT
    figures.add(what, frames, "Mbit/s", baseline=megabits, goal=WITHIN)
    if arrivals.kind == "tcp":
        payload = arrivals.payload(WARM_UP, until) / MEGABIT
        figures.add(f"of it payload: {what}", payload, "Mbit/s", baseline=megabits)


def live_changes(figures: Figures, site: Bridge) -> None:
    for before, after in ((5, 50), (50, 5)):
        for direction in ("received", "sent"):
            site.limit(limited(before))
            offered = int(max(before, after) * MEGABIT * OFFERED)
            flow = site.received("udp", offered) if direction == "received" else site.sent("udp", offered)
            running = Running([flow], 3.0)
            time.sleep(1.5)
            asked = time.monotonic()
            site.limit(limited(after))
            (arrivals,) = running.wait()
            waited = seen_after(arrivals, asked, after * MEGABIT)
            figures.add(f"{before} to {after} Mbit/s {direction}: asked to seen", waited, "ms", goal=SEEN_MS)


def seen_after(arrivals: Arrivals, asked: float, rate: int) -> float:
    """Milliseconds until the first 50 ms begin in which `rate` arrives; those 50 ms included."""
    first = int((asked - arrivals.began) / load.BIN)
    for start in range(first, len(arrivals.bins) - SEEN_BINS):
        got = arrivals.frames(start * load.BIN, (start + SEEN_BINS) * load.BIN)
        if 0.9 * rate <= got <= 1.1 * rate:
            return ((start + SEEN_BINS) * load.BIN + arrivals.began - asked) * 1000
    return float("inf")


# --- the underlay ------------------------------------------------------------------------------------


WHOLE = 100
"""Mbit/s"""
SHARES = UnderlayShares(bits_per_second=WHOLE * MEGABIT, control=10, moves=30, tenants=60)
PERCENT = {"control": SHARES.control, "moves": SHARES.moves, "tenants": SHARES.tenants}
AT_LEAST = Goal(at_least=0.9, of_ratio=True)
TOGETHER = (("moves", "tenants"), ("control", "moves", "tenants"))


def flow_of(site: Cable, name: str) -> Flow:
    """Tenants flood; the others send as fast as TCP goes."""
    match name:
        case "control":
            return site.flow("tcp", 7444)
        case "moves":
            return site.flow("tcp", MIGRATION_PORTS[0] + 8)
        case _:
            return site.flow("udp", 4789, int(WHOLE * MEGABIT * OFFERED))


def underlay(figures: Figures, site: Cable, seconds: float) -> None:
    site.share(SHARES)
    for names in (*((name,) for name in PERCENT), *TOGETHER):
        together = f" beside {len(names) - 1} other{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
        for name, arrivals in zip(names, run([flow_of(site, n) for n in names], seconds), strict=True):
            until = arrivals.ended - arrivals.began
            got = arrivals.frames(WARM_UP, until) / MEGABIT
            promised = WHOLE * PERCENT[name] / 100 if together else WHOLE
            figures.add(f"{name}{together or ' alone'}", got, "Mbit/s", baseline=promised, goal=AT_LEAST)


# --- all of it ---------------------------------------------------------------------------------------


def measure(figures: Figures, seconds: float) -> None:
    """Adds every figure of this benchmark; `seconds` for each flow."""
    with Bridge() as bridge:
        accuracy(figures, bridge, seconds)
        live_changes(figures, bridge)
    with Cable() as cable:
        underlay(figures, cable, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.bandwidth")
    parser.add_argument("--long", action="store_true", help=f"{LONG_SECONDS:g} s for each measurement")
    seconds = LONG_SECONDS if parser.parse_args().long else QUICK_SECONDS
    figures = Figures()
    measure(figures, seconds)
    return figures.finish("bandwidth", "Bandwidth received, against what was promised")


if __name__ == "__main__":
    sys.exit(main())
