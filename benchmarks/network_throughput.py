"""Throughput and latency between servers on two hosts, as a share of a bare veth pair in the same run.

A server here is a namespace whose veth takes the place of its tap: same name, same bridge, same port flags,
same forwarding entry and same rules. So what is measured is all that lies between taps (bridge, filter,
tunnel, underlay, the switch, and back), and not how fast a process can copy frames.

The baseline is a bare pair that connects two namespaces directly: one cable, no bridge, one pass through the
kernel's backlog. Between servers on two hosts there are four cables and the lab's switch. What these cost
without nahtlos is measured, too: the same cables with a plain bridge on each host and in the switch, without
tunnel and rules. All have the same MTU. Bulk is one TCP connection; latency is a datagram sent from one
process and returned by another, median. All are measured by turns; shares are medians of the rounds.
"""

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Figures, Goal
from benchmarks.network_hosts import Host, World, run, server_port
from nahtlos.model.config import PortConfig
from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, SecurityGroupSpec, SecurityRule
from nahtlos.physical.network import device_names

ROUNDS, LONG_ROUNDS = 5, 15
SECONDS = 1.5
ASKED = 3000
PORT = 5201
PREFIX = 16
OPEN_GOAL, STRICT_GOAL = Goal(at_least=0.85, of_ratio=True), Goal(at_least=0.75, of_ratio=True)
STRICT = SecurityGroupSpec(
    id=SecurityGroupId("measured"),
    rules=tuple(
        SecurityRule(
            direction=direction, protocol=protocol, port_min=PORT, port_max=PORT, remote_cidr="10.64.0.0/16"
        )
        for direction in Direction
        for protocol in ("tcp", "udp")
    ),
)
"""Stateful: the connection's first packet is judged by these, all others because they belong to it."""


@dataclass(frozen=True)
class Pair:
    """Two servers that reach each other, in namespaces."""

    name: str
    asking: str
    answering: str
    address: str


@dataclass
class Seen:
    megabits: list[float] = field(default_factory=list[float])
    microseconds: list[float] = field(default_factory=list[float])


async def measure(figures: Figures, rounds: int = ROUNDS) -> None:
    """Servers with groups are in a cloud of their own: what a bridge does for them it does for all."""
    with contextlib.ExitStack() as stack:
        opened = await _cloud(stack, "open", ())
        strict = await _cloud(stack, "strict", (STRICT,))
        _check_strict(strict)
        pairs = [stack.enter_context(_bare()), stack.enter_context(_cables()), opened, strict]
        seen = {pair.name: Seen() for pair in pairs}
        for _ in range(rounds):
            for pair in pairs:
                seen[pair.name].megabits.append(bulk(pair))
                seen[pair.name].microseconds.append(latency(pair))
    _report(figures, seen, "cables", "by bridges alone", None)
    _report(figures, seen, "open", "without groups", OPEN_GOAL)
    _report(figures, seen, "strict", "with stateful groups", STRICT_GOAL)


async def _cloud(stack: contextlib.ExitStack, name: str, groups: tuple[SecurityGroupSpec, ...]) -> Pair:
    world = stack.enter_context(World(2, name=f"nlt-{name}"))
    _unfiltered(world.topology.switch.namespace)
    world.groups = groups
    ports = [server_port(n, tuple(g.id for g in groups)) for n in (1, 2)]
    for port, host in zip(ports, world.compute, strict=True):
        world.place(port, host.name)
    await world.init()
    return await _plugged(stack, world, name, ports)


def _check_strict(pair: Pair) -> None:
    """That there is a firewall in the path: what no rule allows does not pass."""
    command = _command(pair.asking, "send", pair.address, str(PORT + 1), "0.1")
    try:
        run(*command, seconds=2.0)
    except subprocess.TimeoutExpired:
        return
    except RuntimeError as error:
        raise RuntimeError("a port that no rule allows answers") from error
    raise RuntimeError("a port that no rule allows is open")


def _report(figures: Figures, seen: dict[str, Seen], name: str, words: str, goal: Goal | None) -> None:
    """The value is the bare one times the median share, so that value / baseline is that share."""
    for what, unit, of in (
        ("throughput", "Mbit/s", lambda s: s.megabits),
        ("round trips a second", "1/s", lambda s: [1e6 / t for t in s.microseconds]),
    ):
        bare, measured = of(seen["bare"]), of(seen[name])
        share = statistics.median(m / b for m, b in zip(measured, bare, strict=True))
        figures.add(
            f"{what} between hosts {words}",
            share * statistics.median(bare),
            unit,
            baseline=statistics.median(bare),
            goal=goal,
            samples=len(bare),
        )


# --- the pairs -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _namespace(name: str) -> Generator[str]:
    run("ip", "netns", "add", name)
    try:
        run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        yield name
    finally:
        run("ip", "netns", "delete", name)


@contextlib.contextmanager
def _bare() -> Iterator[Pair]:
    with _namespace("nl-nlt-bare-a") as near, _namespace("nl-nlt-bare-b") as far:
        run(
            "ip",
            "-n",
            near,
            "link",
            "add",
            "eth0",
            "index",
            "100",
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            far,
        )
        for name, address in ((near, "10.65.0.1/24"), (far, "10.65.0.2/24")):
            run("ip", "-n", name, "address", "add", address, "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
        yield Pair("bare", near, far, "10.65.0.2")


@contextlib.contextmanager
def _cables() -> Generator[Pair]:
    """Two servers, two hosts and a switch, connected as in a lab: bridges and nothing else."""
    with contextlib.ExitStack() as stack:
        near, here, switch, there, far = (
            stack.enter_context(_namespace(f"nl-nlt-cable-{name}")) for name in "abcde"
        )
        for number, (one, device, other, end) in enumerate(
            (
                (near, "eth0", here, "tap"),
                (here, "eth0", switch, "p1"),
                (switch, "p2", there, "eth0"),
                (there, "tap", far, "eth0"),
            )
        ):
            pair = f"{device} index {100 + 10 * number} type veth peer {end} netns {other}"
            run("ip", "-n", one, "link", "add", *pair.split())
            for space, name in ((one, device), (other, end)):
                run("ip", "-n", space, "link", "set", name, "up")
        for space, ports in ((here, ("tap", "eth0")), (switch, ("p1", "p2")), (there, ("eth0", "tap"))):
            _unfiltered(space)
            kind = ("type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            run("ip", "-n", space, "link", "add", "bridge0", *kind)
            run("ip", "-n", space, "link", "set", "bridge0", "up")
            for name in ports:
                run("ip", "-n", space, "link", "set", name, "master", "bridge0")
        for space, address in ((near, "10.66.0.1/24"), (far, "10.66.0.2/24")):
            run("ip", "-n", space, "address", "add", address, "dev", "eth0")
        yield Pair("cables", near, far, "10.66.0.2")


def _unfiltered(space: str) -> None:
    """Its bridges hand no packet to the firewall of the namespace, as a switch would not."""
    for family in ("ip", "ip6"):
        path = Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}tables")
        if path.exists():
            run("nsenter", f"--net=/run/netns/{space}", "sysctl", "-qw", f"net.bridge.{path.name}=0")


async def _plugged(stack: contextlib.ExitStack, world: World, name: str, ports: Sequence[PortConfig]) -> Pair:
    """One server per host; the first asks the second."""
    spaces: list[str] = []
    for port in ports:
        placed = world.port(port.id)
        await world.create(port.id, placed.host, deliver=True)
    await world.reconcile()
    for port in ports:
        placed = world.port(port.id)
        space = stack.enter_context(_namespace(f"nl-{world.lab}-{port.server}"))
        _replace_tap(world.hosts[placed.host], placed, space)
        spaces.append(space)
    return Pair(name, *spaces, ports[1].ip)


def _replace_tap(host: Host, port: PortConfig, space: str) -> None:
    """A veth in place of the tap, as like it as can be."""
    tap, mtu = device_names.tap_name(port.id), 1500
    bridge = device_names.bridge_name(100)
    far = f"far{os.getpid() % 10000}"
    lines = [
        f"link delete {tap}",
        f"link add {tap} mtu {mtu} type veth peer {far} mtu {mtu}",
        f"link set {far} netns {space} name eth0 address {port.mac}",
        f"link set {tap} master {bridge} up",
    ]
    host.command("ip", "-batch", "-", text="\n".join(lines))
    flags = f"link set dev {tap} learning off flood off mcast_flood on bcast_flood on neigh_suppress off"
    entries = [flags, f"fdb replace {port.mac} dev {tap} master static"]
    host.command("bridge", "-batch", "-", text="\n".join(entries))
    run("ip", "-n", space, "address", "add", f"{port.ip}/{PREFIX}", "dev", "eth0")
    run("ip", "-n", space, "link", "set", "eth0", "up")


# --- measuring -------------------------------------------------------------------------------------------


def _command(space: str, *arguments: str) -> list[str]:
    return [
        "nsenter",
        f"--net=/run/netns/{space}",
        sys.executable,
        "-m",
        "benchmarks.network_stream",
        *arguments,
    ]


@contextlib.contextmanager
def _serving(pair: Pair, what: str) -> "Generator[subprocess.Popen[str]]":
    command = _command(pair.answering, what, pair.address, str(PORT))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{pair.name}: nobody listens")
            yield process
        finally:
            process.kill()


def bulk(pair: Pair) -> float:
    """Mbit/s of one TCP connection, as received."""
    with _serving(pair, "receive") as receiver:
        run(*_command(pair.asking, "send", pair.address, str(PORT), str(SECONDS)), seconds=60)
        out, _ = receiver.communicate(timeout=30)
    count, seconds = out.split()
    return int(count) * 8 / float(seconds) / 1e6


def latency(pair: Pair) -> float:
    """Microseconds of a round trip."""
    with _serving(pair, "answer"):
        return float(run(*_command(pair.asking, "ask", pair.address, str(PORT), str(ASKED)), seconds=60))
