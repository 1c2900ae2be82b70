"""`make bench-network`: what the native network driver promises, counted and measured.

Hosts are network namespaces with the real driver in each; servers are taps, or namespaces in their place, and
can be stopped, moved and started as by a hypervisor. Every comparison is measured in the same run. What each
figure is made of stands in the module that measures it.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable

from benchmarks import bandwidth, network_scale, network_tcp, network_throughput
from benchmarks import network_moves as moves
from benchmarks.figures import Figures, Goal
from benchmarks.network_hosts import World, missing_programs
from benchmarks.network_learning import Learning
from nahtlos.lab import topology

HANDOVERS, LONG_HANDOVERS = 30, 200
COMPARED, LONG_COMPARED = 6, 20
NONE = Goal(at_most=0)
LOAD = Goal(at_least=moves.RATE)
LEARNING_LAB = "nlt-learning"
DIRECTIONS = {
    "within the network, IPv4": ("inside", "ipv4"),
    "within the network, IPv6": ("inside", "ipv6"),
    "from outside, IPv4": ("from-outside",),
    "to outside, IPv4": ("to-outside",),
    "from outside, IPv6": ("from-outside6",),
    "to outside, IPv6": ("to-outside6",),
}


async def measure_moves(figures: Figures, *, long: bool) -> None:
    """Half of the handovers between two hosts, half among three; then a learning bridge."""
    for hosts in (2, 3):
        with World(hosts) as world:
            names = [host.name for host in world.compute]
            plan = moves.rounds((LONG_HANDOVERS if long else HANDOVERS) // 2, names, seed=hosts)
            outcome = await moves.run(moves.Gate(world), world.topology.client, names, plan)
        _report(figures, outcome, f"{hosts} hosts")
    outcome = await _learning(LONG_COMPARED if long else COMPARED)
    figures.add(
        "lost in a handover by learning bridges and announcements",
        outcome.total("lost") / outcome.handovers,
        "frames",
        samples=outcome.handovers,
    )
    figures.add("doubled by the same", outcome.total("duplicated"), "frames", samples=outcome.handovers)


def _report(figures: Figures, outcome: moves.Outcome, where: str) -> None:
    count = outcome.handovers
    for words in outcome.losses():
        print(words, file=sys.stderr)
    figures.add(f"into the least loaded server, {where}", outcome.least_in, "frames/s", goal=LOAD)
    figures.add(f"out of the least busy, while it ran, {where}", outcome.least_out, "frames/s", goal=LOAD)
    for direction, kinds in DIRECTIONS.items():
        for what in ("lost", "duplicated"):
            figures.add(
                f"{what} of {outcome.total('sent', *kinds)} {direction}, {where}",
                outcome.total(what, *kinds),
                "frames",
                goal=NONE,
                samples=count,
            )
    figures.add(f"out of order, {where}", outcome.total("reordered"), "frames", samples=count)
    figures.add(
        f"taken by a waiting VMM or a wrong server, {where}",
        outcome.counts.spoiled + outcome.counts.strays,
        "frames",
        goal=NONE,
        samples=count,
    )
    figures.add(
        f"switch until the source's ring was empty, median, {where}",
        statistics.median(outcome.switch_ms),
        "ms",
        samples=count,
    )


async def _learning(handovers: int) -> moves.Outcome:
    topology.destroy(LEARNING_LAB)
    cables = topology.create(LEARNING_LAB, 3)
    way = Learning(cables)
    try:
        names = [node.name for node in cables.hosts]
        return await moves.run(way, cables.client, names, moves.rounds(handovers, names), ipv6_outside=False)
    finally:
        way.close()
        topology.destroy(LEARNING_LAB)


async def measure_throughput(figures: Figures, *, long: bool) -> None:
    rounds = network_throughput.LONG_ROUNDS if long else network_throughput.ROUNDS
    await network_throughput.measure(figures, rounds)


async def measure_scale(figures: Figures, *, long: bool) -> None:
    await network_scale.measure(figures)


async def measure_bandwidth(figures: Figures, *, long: bool) -> None:
    seconds = bandwidth.LONG_SECONDS if long else bandwidth.QUICK_SECONDS
    await asyncio.to_thread(bandwidth.measure, figures, seconds)


SUBJECTS: dict[str, Callable[..., Awaitable[None]]] = {
    "moves": measure_moves,
    "tcp": network_tcp.measure,
    "throughput": measure_throughput,
    "scale": measure_scale,
    "bandwidth": measure_bandwidth,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help=f"{LONG_HANDOVERS} handovers")
    parser.add_argument(
        "--only", choices=sorted(SUBJECTS), action="append", help="may be given several times"
    )
    arguments = parser.parse_args()
    missing = missing_programs()
    if missing:
        print(f"cannot be measured here: {missing}", file=sys.stderr)
        return 2
    figures = Figures()
    for name, measure in SUBJECTS.items():
        if arguments.only is None or name in arguments.only:
            print(f"measuring {name}", file=sys.stderr)
            asyncio.run(measure(figures, long=arguments.long))
    return figures.finish("network", "the virtual network")


if __name__ == "__main__":
    sys.exit(main())
