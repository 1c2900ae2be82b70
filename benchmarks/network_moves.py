"""Handovers under load, counted: what is lost, doubled and out of order while servers change hosts.

Each round moves one server, or two that talk to each other at once; every server has 1,000 frames a second in
and as many out, IPv4 and IPv6, with a peer on every host (so on the source, on the destination and on third
ones), with the other moving server and with a client outside behind the edge. The steps are those of
the agents; the time in which a server runs nowhere is drawn from 50 to 500 ms.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from benchmarks import network_load as load
from benchmarks.network_hosts import GATEWAY_MAC, OUTSIDE6, Host, World, server_port
from nahtlos.lab import topology
from nahtlos.model.config import PortConfig
from nahtlos.model.ids import PortId

RATE = 1000
SENT_RATE = 1.1 * RATE
"""Somewhat more is sent: a sender may be kept from its turn."""
BLACKOUT_SECONDS = (0.05, 0.5)
MOVERS = 2
SETTLE_SECONDS = 0.5
DRAIN_SECONDS = 1.0
REST_SECONDS = 0.05
CLIENTS = {"ipv4": "outside", "ipv6": "outside6"}
"""The client outside, by family."""


class Leg(msgspec.Struct, frozen=True):
    """One server's part of a round."""

    server: str
    source: str
    destination: str
    blackout: float


def rounds(handovers: int, hosts: list[str], seed: int = 1) -> list[tuple[Leg, ...]]:
    """At least `handovers` legs, the same for the same `seed`: in a quarter of the rounds both servers move
    at once, and every other of those has them swap hosts where they can."""
    chance = random.Random(seed)
    at = {f"mover-{n}": hosts[n % len(hosts)] for n in range(MOVERS)}
    planned: list[tuple[Leg, ...]] = []
    while sum(map(len, planned)) < handovers:
        movers = list(at) if chance.random() < 0.25 else [chance.choice(list(at))]
        swap = len(movers) == MOVERS and len(set(at.values())) == MOVERS and chance.random() < 0.5
        before, legs = dict(at), list[Leg]()
        for mover in movers:
            other = next(before[m] for m in at if m != mover)
            to = other if swap else chance.choice([h for h in hosts if h != before[mover]])
            legs.append(Leg(mover, before[mover], to, chance.uniform(*BLACKOUT_SECONDS)))
            at[mover] = to
        planned.append(tuple(legs))
    return planned


@dataclass
class Outcome:
    """What all streams of a run came to."""

    handovers: int = 0
    switch_ms: list[float] = field(default_factory=list[float])
    """Of each handover: from before the switch until the source's ring was empty."""
    stood: Counter[str] = field(default_factory=Counter[str])
    """Seconds in which each server ran nowhere on purpose."""
    counts: load.Counts = field(
        default_factory=lambda: load.Counts(streams={}, strays=0, spoiled=0, seconds=0.0)
    )
    kinds: dict[int, str] = field(default_factory=dict[int, str])

    def total(self, what: str, *kinds: str) -> int:
        """Of all streams, or of those whose kind contains every one of `kinds`."""
        return sum(
            getattr(count, what)
            for number, count in self.counts.streams.items()
            if all(kind in self.kinds[number].split() for kind in kinds)
        )

    @property
    def least_in(self) -> float:
        """Frames a second into the least loaded mover, whether it ran or not."""
        return min(self.total("sent", f"to-mover-{n}") for n in range(MOVERS)) / self.counts.seconds

    @property
    def least_out(self) -> float:
        """Frames a second out of the least busy mover while it ran."""
        return min(
            self.total("sent", f"from-mover-{n}") / (self.counts.seconds - self.stood[f"mover-{n}"])
            for n in range(MOVERS)
        )

    def losses(self) -> list[str]:
        """Streams of which something was lost or doubled, in words."""
        return [
            f"{self.kinds[n]}: of {c.sent} lost {c.lost} {list(c.first_lost)} doubled {c.duplicated}"
            for n, c in sorted(self.counts.streams.items())
            if c.lost or c.duplicated
        ]


class Way(Protocol):
    """A way to move servers between hosts."""

    async def open(self, ports: dict[str, PortConfig], places: dict[str, str]) -> dict[str, int]:
        """Plug everybody in; returns the descriptor of each."""
        ...

    async def move(self, leg: Leg, load_: load.Load) -> float:
        """One handover; returns how long the switch took, in ms."""
        ...

    async def settle(self) -> None:
        """After each round: what the orchestrator tells all hosts."""
        ...


class Gate:
    """nahtlos' own: the driver's verbs in the order of the agents."""

    def __init__(self, world: World, *, transfer: bool = True) -> None:
        """Without `transfer` nothing of what a firewall remembers goes along."""
        self._world = world
        self._transfer = transfer
        self._ids: dict[str, PortId] = {}

    async def open(self, ports: dict[str, PortConfig], places: dict[str, str]) -> dict[str, int]:
        self._ids = {name: port.id for name, port in ports.items()}
        for name, port in ports.items():
            self._world.place(port, places[name])
        await self._world.init()
        fds = {n: await self._world.create(p.id, places[n], deliver=True) for n, p in ports.items()}
        await self._world.reconcile()
        return fds

    async def move(self, leg: Leg, load_: load.Load) -> float:
        world, port = self._world, self._ids[leg.server]
        source, destination = world.hosts[leg.source], world.hosts[leg.destination]
        fd = await world.create(port, leg.destination, deliver=False)
        await world.prepare(port, leg.source, leg.destination)
        await load_.tell(load.Wait(leg.server + " (waiting)"), fd)
        if not await destination.call(lambda d: d.move_sacrifice(port)):
            raise RuntimeError(f"nobody took the sacrificial frame of {leg.server}")
        if self._transfer:
            await self._load_state(leg, await source.call(lambda d: d.move_state_begin(port)))
        began = time.monotonic()
        await self._carry_changes(leg, source)
        await world.switch(port, leg.source, leg.destination)
        if not await source.call(lambda d: d.move_drain(port, timeout=DRAIN_SECONDS)):
            raise RuntimeError(f"the ring of {leg.server} does not become empty")
        took = (time.monotonic() - began) * 1000
        await load_.tell(load.Stop(leg.server))
        await self._carry_changes(leg, source)
        await asyncio.sleep(leg.blackout)
        await load_.tell(load.Run(leg.server), fd)
        await world.settle(port, leg.source, leg.destination)
        return took

    async def _carry_changes(self, leg: Leg, source: Host) -> None:
        port = self._ids[leg.server]
        if self._transfer:
            await self._load_state(leg, await source.call(lambda d: d.move_state_changes(port)))

    async def _load_state(self, leg: Leg, state: bytes) -> None:
        port = self._ids[leg.server]
        if state:
            await self._world.hosts[leg.destination].call(lambda d: d.move_state_load(port, state))

    async def settle(self) -> None:
        await self._world.reconcile()
        for reflected in self._world.reflect.values():
            reflected.clear()
        await self._world.reconcile()


# --- streams ---------------------------------------------------------------------------------------------


def members(hosts: list[str]) -> tuple[dict[str, PortConfig], dict[str, str]]:
    """Ports by name, and the host of each: the movers, and a peer on every host."""
    names = [f"mover-{n}" for n in range(MOVERS)] + [f"peer-{h}" for h in hosts]
    ports = {name: server_port(number + 1) for number, name in enumerate(names)}
    places = {f"mover-{n}": hosts[n % len(hosts)] for n in range(MOVERS)}
    return ports, places | {f"peer-{h}": h for h in hosts}


def traffic(
    ports: dict[str, PortConfig], client: dict[str, str]
) -> tuple[list[load.Stream], list[load.Flow], dict[int, str]]:
    """Streams and flows of the whole load, and what kind each stream is of, in words. `client`: its addresses
    by family."""
    streams: list[load.Stream] = []
    kinds: dict[int, str] = {}
    flows: list[load.Flow] = []
    movers = [name for name in ports if name.startswith("mover")]

    def add(sender: str, receiver: str, family: str) -> int:
        number = len(streams) + 1
        inside = not {sender, receiver} & set(CLIENTS.values())
        streams.append(_stream(number, sender, receiver, family, ports, client))
        kinds[number] = f"{'inside' if inside else 'outside'} {family} from-{sender} to-{receiver}"
        return number

    for mover in movers:
        partners = [name for name in ports if name != mover]
        out = [add(mover, p, f) for p in partners for f in CLIENTS]
        out += [add(mover, CLIENTS[f], f) for f in client]
        flows.append(load.Flow(sender=mover, streams=tuple(out), rate=SENT_RATE))
        peers = [name for name in partners if name not in movers]
        share = SENT_RATE / (len(peers) + 1)
        for peer in peers:
            into = tuple(add(peer, mover, family) for family in CLIENTS)
            flows.append(load.Flow(sender=peer, streams=into, rate=share))
        for family in client:
            outside = CLIENTS[family]
            into = (add(outside, mover, family),)
            flows.append(load.Flow(sender=outside, streams=into, rate=share / len(client)))
    return streams, flows, kinds


def _stream(
    number: int, sender: str, receiver: str, family: str, ports: dict[str, PortConfig], client: dict[str, str]
) -> load.Stream:
    def which(port: PortConfig) -> str:
        return port.ip if family == "ipv4" else port.addresses[0]

    if sender == CLIENTS[family]:
        return load.Stream(number=number, sender=sender, receiver=receiver, address=which(ports[receiver]))
    source = ports[sender]
    if receiver == CLIENTS[family]:
        pair = (source.mac, which(source)), (GATEWAY_MAC, client[family])
    else:
        target = ports[receiver]
        pair = (source.mac, which(source)), (target.mac, which(target))
    return load.Stream(number=number, sender=sender, receiver=receiver, head=load.head(number, *pair))


# --- a run -----------------------------------------------------------------------------------------------


async def run(
    way: Way,
    client: topology.Node,
    hosts: list[str],
    plan: list[tuple[Leg, ...]],
    *,
    ipv6_outside: bool = True,
) -> Outcome:
    """All rounds of `plan` under load."""
    ports, places = members(hosts)
    reached = {"ipv4": client.address, **({"ipv6": OUTSIDE6[client.name]} if ipv6_outside else {})}
    streams, flows, kinds = traffic(ports, reached)
    outcome = Outcome(kinds=kinds)
    with load.Load() as process, contextlib.ExitStack() as stack:
        for message in (*streams, *flows):
            await process.tell(message)
        for family in reached:
            outside = stack.enter_context(topology.within(client.namespace, _CLIENT_SOCKETS[family]))
            await process.tell(load.Outside(CLIENTS[family]), outside.fileno())
        for name, fd in (await way.open(ports, places)).items():
            await process.tell(load.Run(name), fd)
        await process.tell(load.Begin())
        await asyncio.sleep(SETTLE_SECONDS)
        for round_ in plan:
            took = await asyncio.gather(*(way.move(leg, process) for leg in round_))
            outcome.switch_ms += took
            outcome.handovers += len(round_)
            outcome.stood.update({leg.server: leg.blackout for leg in round_})
            await way.settle()
            await asyncio.sleep(REST_SECONDS)
        await process.tell(load.Halt())
        await asyncio.sleep(SETTLE_SECONDS)
        outcome.counts = await process.counts()
    return outcome


def _client_socket(family: socket.AddressFamily, address: str) -> socket.socket:
    outside = socket.socket(family, socket.SOCK_DGRAM)
    outside.bind((address, load.PORT))
    return outside


_CLIENT_SOCKETS = {
    "ipv4": lambda: _client_socket(socket.AF_INET, "0.0.0.0"),
    "ipv6": lambda: _client_socket(socket.AF_INET6, OUTSIDE6[topology.CLIENT]),
}
