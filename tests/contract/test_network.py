"""What every network driver must do, seen from outside it: where frames end up, and what `observe` says.

Each play runs on the native driver (real namespaces, real packets) and on the simulated one (virtual time).
A world knows how to send numbered frames from outside and how to be the guest at a tap; the plays know only
the verbs of `physical.ports.Network`.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from network_namespaces import TENANT, Cloud, Guest, Sender, Tally, missing_programs

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, Uplink
from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import HostId, PortId, SecurityGroupId, ServerId
from nahtlos.model.networking import Direction, SecurityGroupSpec, SecurityRule
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical.network.device_names import tracking_zone
from nahtlos.physical.network.native import NativeNetwork
from nahtlos.physical.network.netlink import attribute, nested
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import Entry, Table
from nahtlos.physical.ports import MoveRole, Network, NetworkDesired
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.faults import Life
from nahtlos.physical.sim.firewalls import Connection
from nahtlos.physical.sim.network import SimNetwork
from nahtlos.physical.sim.taps import Tap
from nahtlos.physical.sim.world import World as SimulatedWorld

A, B, EDGE = "host-1", "host-2", "edge-1"
ADDRESSES = {A: "10.99.0.11", B: "10.99.0.12", EDGE: "10.99.0.5"}
ROLES = {A: HostRole.COMPUTE, B: HostRole.COMPUTE, EDGE: HostRole.EDGE}
PORT, MAC, IP = PortId("server-10-port"), "52:54:00:4d:00:0a", "10.77.0.10"
HOLD = 0.2
ZONE = tracking_zone(TENANT.vni)
GROUP = SecurityGroupSpec(
    id=SecurityGroupId("web"),
    rules=tuple(SecurityRule(direction=direction) for direction in Direction),
)
T = TypeVar("T")


@dataclass
class Count:
    sent: int
    lost: int
    duplicated: int


class World(Protocol):
    """One server's port, `place`d on A, B or nowhere yet; an edge; a sender outside."""

    def on(self, host: str) -> Network:
        """The driver of a host, callable from the play."""
        ...

    def restart_agent(self, host: str) -> None: ...

    async def guest_waits(self, host: str) -> None:
        """A VMM holds the tap there and waits for the server: the next frame it takes is spoiled."""
        ...

    async def guest_runs(self, host: str) -> None: ...

    async def guest_stops(self) -> None: ...

    async def begin_traffic(self) -> None: ...

    async def end_traffic(self) -> Count: ...

    async def connect(self, host: str, number: int) -> None:
        """Connection `number` to the server has begun and was answered; `host`'s firewall has seen it."""
        ...

    async def hang_up(self, host: str, number: int) -> None:
        """It has ended and is forgotten there."""
        ...

    async def remembered(self, host: str) -> set[int]: ...


@dataclass
class Stage:
    """What the plays share: the world, and what the orchestrator would say."""

    world: World
    place: str = A
    generation: int = 0
    guarded: bool = False
    """The port is in a security group."""

    @property
    def port(self) -> PortConfig:
        return PortConfig(
            id=PORT,
            server=ServerId("server-10"),
            mac=MAC,
            ip=IP,
            host=HostId(self.place),
            vtep=ADDRESSES[self.place],
            security_groups=(GROUP.id,) if self.guarded else (),
        )

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(
            spec=TENANT, ports=(self.port,), gateway_vtep=ADDRESSES[EDGE], vteps=tuple(ADDRESSES.values())
        )

    async def configure(self, host: str, *, reflect: bool = False, pinned: bool = False) -> tuple[str, ...]:
        self.generation += 1
        config = HostConfig(
            host=HostId(host),
            generation=self.generation,
            release=None,
            networks=(self.network,),
            uplinks=(Uplink(network=TENANT.id, interface="out0"),) if host == EDGE else (),
            reflect=(PORT,) if reflect else (),
            security_groups=(GROUP,) if self.guarded else (),
        )
        held = frozenset({PORT} if pinned else ())
        return await self.world.on(host).reconcile(NetworkDesired(config=config, pinned=held))

    async def open(self) -> None:
        """The server runs on A and packets come in."""
        for host in ADDRESSES:
            await self.configure(host)
        await self.world.on(A).port_create(self.port, self.network, deliver=True)
        await self.world.guest_runs(A)
        for host in ADDRESSES:
            await self.configure(host)
        await self.world.begin_traffic()
        await asyncio.sleep(0.1)

    async def prepare(self) -> None:
        """Up to the switch, every step twice."""
        port, network = self.port, self.network
        for _ in range(2):
            await self.world.on(B).port_create(port, network, deliver=False)
            await self.world.on(B).move_prepare(port, network, MoveRole.DESTINATION, ADDRESSES[A])
        await self.world.guest_waits(B)
        assert await self.world.on(B).move_sacrifice(PORT)
        for _ in range(2):
            await self.world.on(A).move_prepare(port, network, MoveRole.SOURCE, ADDRESSES[B])

    async def switch(self) -> None:
        for _ in range(2):
            await self.world.on(B).move_switch(self.port, self.network, MoveRole.DESTINATION)
        for _ in range(2):
            await self.world.on(A).move_switch(self.port, self.network, MoveRole.SOURCE)
        assert await self.world.on(A).move_drain(PORT, timeout=1.0)
        await self.world.guest_stops()
        await asyncio.sleep(HOLD)

    async def carry(self, state: bytes) -> None:
        """Every step twice."""
        for _ in range(2):
            assert await self.world.on(B).move_state_load(PORT, state) == ()

    async def settle(self) -> None:
        await self.world.guest_runs(B)
        for _ in range(2):
            await self.world.on(B).move_settle(self.port, self.network, MoveRole.DESTINATION)
            await self.world.on(A).move_commit(self.port, self.network)
        await self.world.on(A).move_settle(self.port, self.network, MoveRole.SOURCE)
        self.place = B


def connection(number: int) -> Entry:
    """As a firewall remembers it: from a client of its own, answered."""
    client = socket.inet_aton(f"192.0.2.{number}")
    server = socket.inet_aton(IP)
    there, back = (
        nested(1, attribute(1, one), attribute(2, other))
        + nested(2, attribute(1, b"\x11"), attribute(2, b"\0\x50"), attribute(3, b"\0\x50"))
        for one, other in ((client, server), (server, client))
    )
    status = conntrack.CONFIRMED | conntrack.SEEN_REPLY | conntrack.ASSURED
    values = {conntrack.TUPLE_ORIG: there, conntrack.TUPLE_REPLY: back}
    values |= {conntrack.STATUS: status.to_bytes(4, "big"), conntrack.TIMEOUT: (90).to_bytes(4, "big")}
    return Entry(socket.AF_INET, values)


# --- worlds ------------------------------------------------------------------------------------------


class Called:
    """A driver in another thread's namespace, awaited from here."""

    def __init__(self, cloud: Cloud, host: str) -> None:
        self._cloud, self._host = cloud, host

    def __getattr__(self, verb: str) -> Callable[..., Awaitable[Any]]:
        def call(*args: Any, **kw: Any) -> Awaitable[Any]:
            def act(driver: NativeNetwork) -> Awaitable[Any]:
                return getattr(driver, verb)(*args, **kw)

            return self._cloud.hosts[self._host].call(act)

        return call


class NativeWorld:
    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.guest, self.waiting = Guest(10), Guest(10)
        self.cloud.guests = {PortId("running"): self.guest, PortId("waiting"): self.waiting}
        self.sender: Sender | None = None

    def on(self, host: str) -> Any:
        return Called(self.cloud, host)

    def restart_agent(self, host: str) -> None:
        self.cloud.hosts[host].restart_agent()

    async def guest_waits(self, host: str) -> None:
        self.waiting.wait_at(self.cloud.fd(self.guest, host))

    async def guest_runs(self, host: str) -> None:
        self.waiting.stop()
        self.guest.run_at(self.cloud.fd(self.guest, host))

    async def guest_stops(self) -> None:
        self.guest.stop()

    async def begin_traffic(self) -> None:
        self.sender = self.cloud.sender(self.guest)

    async def end_traffic(self) -> Count:
        assert self.sender is not None
        await asyncio.sleep(0.1)
        sent = self.sender.stop()
        await asyncio.sleep(0.2)
        tally = Tally(sent, self.guest.received)
        return Count(sent, len(tally.lost), len(tally.duplicated))

    async def _at_table(self, host: str, act: Callable[[Table], T]) -> T:
        async def inside(_: NativeNetwork) -> T:
            with Table() as table:
                return act(table)

        return await self.cloud.hosts[host].call(inside)

    async def connect(self, host: str, number: int) -> None:
        body = conntrack.put(connection(number), ZONE, 0)
        assert await self._at_table(host, lambda table: table.put([body])) == []

    async def hang_up(self, host: str, number: int) -> None:
        body = conntrack.remove(connection(number).key, ZONE)
        assert await self._at_table(host, lambda table: table.delete([body])) == []

    async def remembered(self, host: str) -> set[int]:
        clients = {socket.inet_aton(f"192.0.2.{number}"): number for number in range(1, 255)}
        entries = await self._at_table(host, lambda table: table.dump(ZONE, lambda _: True))
        return {clients[a] for entry in entries for a in conntrack.addresses(entry) if a in clients}


@dataclass
class Attachment:
    """A VMM as a simulated tap sees it."""

    running: bool
    receiving: bool


class SimWorld:
    def __init__(self, folder: Path) -> None:
        self.world = SimulatedWorld(state_dir=folder)
        self.drivers: dict[str, SimNetwork] = {}
        self.connections: dict[int, Connection] = {}
        for host, address in ADDRESSES.items():
            self.world.add_host(HostId(host), address, role=ROLES[host], capacity=Size(), releases=())
            self.restart_agent(host)

    def on(self, host: str) -> Network:
        return self.drivers[host]

    def restart_agent(self, host: str) -> None:
        here = self.world.hosts[HostId(host)]
        self.drivers[host] = SimNetwork(self.world, here, Life(host))

    def _tap(self, host: str) -> Tap:
        return self.world.hosts[HostId(host)].board.taps[PORT]

    async def guest_waits(self, host: str) -> None:
        self._tap(host).vmm = Attachment(running=False, receiving=True)
        self._tap(host).absorb()

    async def guest_runs(self, host: str) -> None:
        self.world.paths.touch(MAC)
        self._tap(host).vmm = Attachment(running=True, receiving=False)
        self._tap(host).runs(self.world.now())

    async def guest_stops(self) -> None:
        self.world.paths.touch(MAC)
        self._tap(A).vmm = Attachment(running=False, receiving=False)

    async def begin_traffic(self) -> None:
        self.world.paths.open_flow(MAC, HostId(EDGE))

    async def end_traffic(self) -> Count:
        await asyncio.sleep(0.2)
        self.world.paths.touch(MAC, probe=False)
        await asyncio.sleep(0.1)
        flows = list(self.world.paths.flows.values())
        for host in ADDRESSES:
            for tap in self.world.hosts[HostId(host)].board.taps.values():
                tap.drain(self.world.now())
        sent = sum(f.sent for f in flows)
        delivered = sum(f.delivered for f in flows)
        return Count(sent, self.world.packets_lost(), max(0, delivered - sent))

    async def connect(self, host: str, number: int) -> None:
        firewalls = self.world.paths.firewalls
        self.connections[number] = firewalls.begin(HostId(EDGE))
        firewalls.see_first(HostId(host), MAC, self.connections[number])

    async def hang_up(self, host: str, number: int) -> None:
        self.world.paths.firewalls.see_end(HostId(host), MAC, self.connections[number])

    async def remembered(self, host: str) -> set[int]:
        numbers = {c.number: number for number, c in self.connections.items()}
        held = self.world.paths.firewalls.strangers(HostId(host), MAC)
        return {numbers[n] for n in held if n in numbers}


Play = Callable[[Stage], Awaitable[None]]
Perform = Callable[[Play], None]


@pytest.fixture(
    params=[
        pytest.param(
            "native",
            marks=[
                pytest.mark.live,
                pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
            ],
        ),
        "simulated",
    ]
)
def perform(request: pytest.FixtureRequest, tmp_path: Path) -> Perform:
    """Runs a play in a world."""

    async def natively(play: Play) -> None:
        cloud = Cloud(tmp_path)
        try:
            await play(Stage(NativeWorld(cloud)))
        finally:
            await asyncio.to_thread(cloud.close)

    async def simulated(play: Play) -> None:
        await play(Stage(SimWorld(tmp_path)))

    if request.param == "native":
        return lambda play: asyncio.run(natively(play))
    return lambda play: run_virtual(simulated(play), seed=1, limit_seconds=60)


# --- plays -------------------------------------------------------------------------------------------


def test_frames_reach_a_server_where_it_is(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        count = await stage.world.end_traffic()
        assert count.sent > 5
        assert (count.lost, count.duplicated) == (0, 0)
        seen = await stage.world.on(A).observe()
        assert seen.local_ports == (PORT,)
        assert seen.reflecting == ()
        assert seen.counters[PORT]["tx_packets"] >= 5
        assert seen.counters[PORT]["tx_dropped"] == 0
        assert (await stage.world.on(B).observe()).local_ports == ()
        assert await stage.world.on(A).frames_from(PORT) >= seen.counters[PORT]["rx_packets"]
        with pytest.raises(NotFound):
            await stage.world.on(B).frames_from(PORT)

    perform(play)


def test_a_handover_loses_and_doubles_nothing(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        await stage.prepare()
        await stage.switch()
        await stage.settle()
        assert (await stage.world.on(A).observe()).local_ports == ()
        assert (await stage.world.on(B).observe()).local_ports == (PORT,)
        for host in (B, A, EDGE):
            await stage.configure(host, reflect=host == A)
        await asyncio.sleep(0.05)
        await stage.configure(A)
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)

    perform(play)


def test_a_handover_survives_new_agents_between_all_steps(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        def renew() -> None:
            for host in ADDRESSES:
                stage.world.restart_agent(host)

        await stage.open()
        renew()
        await stage.prepare()
        renew()
        await stage.switch()
        renew()
        await stage.settle()
        renew()
        for host in (B, A, EDGE):
            await stage.configure(host, reflect=host == A)
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)

    perform(play)


def test_what_moves_is_left_alone(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        await stage.prepare()
        for host in (A, B):
            assert await stage.configure(host, pinned=True) == ()
        await stage.switch()
        for host in (A, B):
            assert await stage.configure(host, pinned=True) == ()
        await stage.settle()
        for host in (A, B):
            await stage.configure(host, reflect=host == A)
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)

    perform(play)


def test_an_abort_after_the_switch_loses_nothing(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        await stage.prepare()
        await stage.switch()
        port, network = stage.port, stage.network
        for _ in range(2):
            assert await stage.world.on(A).move_revert(port, network, MoveRole.SOURCE) == 0
        await stage.world.guest_runs(A)
        assert await stage.world.on(B).move_revert(port, network, MoveRole.DESTINATION) > 0
        assert await stage.world.on(B).move_revert(port, network, MoveRole.DESTINATION) == 0
        for _ in range(2):
            await stage.world.on(B).port_delete(PORT)
        for host in ADDRESSES:
            await stage.configure(host)
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)
        assert (await stage.world.on(A).observe()).local_ports == (PORT,)

    perform(play)


def test_an_abort_before_the_switch_is_not_noticed(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        await stage.prepare()
        await stage.world.on(B).port_delete(PORT)
        for host in ADDRESSES:
            await stage.configure(host)
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)

    perform(play)


def test_reconciling_again_finds_nothing(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        for host in ADDRESSES:
            assert await stage.configure(host) == ()
        await stage.world.end_traffic()

    perform(play)


def test_deleting_what_is_not_there_is_fine(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.world.on(A).port_delete(PORT)

    perform(play)


def test_a_lossless_move_is_promised(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        for _ in range(2):
            await stage.world.on(A).host_init()
        assert (await stage.world.on(A).capabilities()).lossless_move

    perform(play)


# --- what a firewall remembers -------------------------------------------------------------------------


async def guarded(stage: Stage) -> None:
    """A server in a security group runs on A, and two connections to it; its move is prepared."""
    stage.guarded = True
    for host in ADDRESSES:
        await stage.world.on(host).host_init()
    await stage.open()
    for number in (1, 2):
        await stage.world.connect(A, number)
    await stage.prepare()


def test_connections_are_carried_whole_and_then_what_changed(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await guarded(stage)
        a = stage.world.on(A)
        await stage.carry(await a.move_state_begin(PORT))
        assert await stage.world.remembered(B) == {1, 2}
        await stage.world.connect(A, 3)
        await stage.world.hang_up(A, 1)
        await stage.carry(await a.move_state_changes(PORT))
        assert await stage.world.remembered(B) == {2, 3}
        await stage.switch()
        await stage.world.connect(A, 4)
        await stage.carry(await a.move_state_changes(PORT))
        assert await stage.world.remembered(B) == {2, 3, 4}
        await stage.settle()
        assert await stage.world.remembered(B) == {2, 3, 4}
        assert await stage.world.remembered(A) == set(), "nobody is let in by what is remembered of others"
        count = await stage.world.end_traffic()
        assert (count.lost, count.duplicated) == (0, 0)

    perform(play)


def test_connections_are_carried_by_agents_that_were_started_in_between(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await guarded(stage)
        await stage.carry(await stage.world.on(A).move_state_begin(PORT))
        stage.world.restart_agent(A)
        stage.world.restart_agent(B)
        await stage.world.hang_up(A, 1)
        await stage.world.connect(A, 3)
        await stage.carry(await stage.world.on(A).move_state_changes(PORT))
        assert await stage.world.remembered(B) == {2, 3}
        await stage.world.end_traffic()

    perform(play)


def test_beginning_again_begins_anew(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await guarded(stage)
        a = stage.world.on(A)
        await stage.carry(await a.move_state_begin(PORT))
        await stage.world.hang_up(A, 2)
        await stage.carry(await a.move_state_begin(PORT))
        assert await stage.world.remembered(B) == {1}
        await stage.world.end_traffic()

    perform(play)


def test_a_source_that_was_restarted_has_no_path_to_lead_back(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        for host in ADDRESSES:
            await stage.configure(host)
        for _ in range(2):
            assert await stage.world.on(A).move_revert(stage.port, stage.network, MoveRole.SOURCE) == 0

    perform(play)


def test_the_destination_of_an_abandoned_move_forgets(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await guarded(stage)
        port, network = stage.port, stage.network
        await stage.carry(await stage.world.on(A).move_state_begin(PORT))
        await stage.switch()
        await stage.world.on(A).move_revert(port, network, MoveRole.SOURCE)
        await stage.world.guest_runs(A)
        await stage.world.on(B).move_revert(port, network, MoveRole.DESTINATION)
        for _ in range(2):
            await stage.world.on(B).port_delete(PORT)
        assert await stage.world.remembered(B) == set()
        assert await stage.world.remembered(A) == {1, 2}
        await stage.world.end_traffic()

    perform(play)


def test_of_a_port_without_groups_nothing_is_carried(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await stage.open()
        await stage.prepare()
        assert await stage.world.on(A).move_state_begin(PORT) == b""
        assert await stage.world.on(A).move_state_changes(PORT) == b""
        await stage.world.end_traffic()

    perform(play)


def test_a_form_that_is_not_known_is_refused(perform: Perform) -> None:
    async def play(stage: Stage) -> None:
        await guarded(stage)
        with pytest.raises(Refused):
            await stage.world.on(B).move_state_load(PORT, b"of tomorrow")
        assert (await stage.world.on(A).capabilities()).ct_transfer
        await stage.world.end_traffic()

    perform(play)
