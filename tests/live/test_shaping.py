"""Bandwidth of ports with real frames: rates by count, changes while frames wait, drift, moves."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from benchmarks.bandwidth_site import LIMITED, PEER, TAP, Bridge, run
from network_namespaces import PROBE_PORT, Cloud, Guest, Tally, missing_programs

from nahtlos.lab import topology
from nahtlos.model.config import PortConfig
from nahtlos.model.ids import PortId
from nahtlos.model.networking import PortBandwidth, Rate
from nahtlos.physical.network.bandwidth import ports as shaping
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.ports import MoveRole

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
A, B = "host-1", "host-2"
MEGABIT = 1_000_000
FRAME = 50
"""Bytes of a probe's frame."""
SLOW = 200_000
"""bit/s: 500 of them a second."""


def both(rate: int) -> PortBandwidth:
    return PortBandwidth(ingress=Rate(bits_per_second=rate), egress=Rate(bits_per_second=rate))


def into(rate: int) -> PortBandwidth:
    return PortBandwidth(ingress=Rate(bits_per_second=rate))


class LimitedCloud(Cloud):
    """A cloud whose ports may have limits."""

    def __init__(self, folder: Path) -> None:
        self.bandwidth: dict[PortId, PortBandwidth] = {}
        super().__init__(folder)

    def port(self, guest: Guest) -> PortConfig:
        bandwidth = self.bandwidth.get(guest.port, PortBandwidth())
        return msgspec.structs.replace(super().port(guest), bandwidth=bandwidth)

    async def opened(self, bandwidth: PortBandwidth) -> Guest:
        guest = self.guest(10, A)
        self.bandwidth[guest.port] = bandwidth
        await self.reconcile_all()
        await self.boot(guest)
        return guest

    def tap(self, host: str) -> str:
        return next(name for name in self.hosts[host].links() if name.startswith("tp"))

    def shapers(self, host: str) -> list[str]:
        return [name for name in self.hosts[host].links() if name.startswith("ib")]

    def found(self, host: str) -> shaping.Found:
        def read() -> shaping.Found | None:
            with Netlink() as netlink:
                return shaping.observe_one(netlink, self.tap(host))

        found = topology.within(self.hosts[host].node.namespace, read)
        assert found is not None
        return found

    def queues(self, host: str) -> list[str]:
        """The kinds of all that may keep frames before the tap."""
        index = self.found(host).index
        with topology.within(self.hosts[host].node.namespace, Netlink) as netlink:
            return [q.kind for q in tc.read_qdiscs(netlink) if q.index == index and q.parent != tc.INGRESS]


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[LimitedCloud]:
    cloud = LimitedCloud(tmp_path)
    try:
        yield cloud
    finally:
        await asyncio.to_thread(cloud.close)


@pytest.fixture(scope="module")
def bridge() -> Iterator[Bridge]:
    with Bridge() as bridge:
        yield bridge


# --- rates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "megabits"), [("tcp", 50), ("udp", 5), ("udp", 50)])
def test_a_port_gets_its_rate_and_no_more_both_ways(bridge: Bridge, kind: str, megabits: int) -> None:
    bridge.limit(both(megabits * MEGABIT))
    offered = megabits * MEGABIT * 2
    for flow in (bridge.received(kind, offered), bridge.sent(kind, offered)):
        (arrivals,) = run([flow], 1.5)
        got = arrivals.frames(0.5, arrivals.ended - arrivals.began) / MEGABIT
        assert 0.85 * megabits < got < 1.15 * megabits, flow


def test_without_limits_nothing_is_in_the_way(bridge: Bridge) -> None:
    bridge.limit(both(5 * MEGABIT))
    bridge.limit(PortBandwidth())
    devices = topology.within(bridge.name("host"), socket.if_nameindex)
    assert [name for _, name in devices if name.startswith("ib")] == []
    with topology.within(bridge.name("host"), Netlink) as netlink:
        index = next(i for i, name in devices if name == TAP)
        qdiscs = tc.read_qdiscs(netlink)
    assert index not in tc.roots(qdiscs)
    assert index not in tc.ingresses(qdiscs)


@pytest.mark.parametrize("after", [both(50 * MEGABIT), both(1 * MEGABIT), PortBandwidth()], ids=str)
@pytest.mark.parametrize("way", ["received", "sent"])
def test_a_live_change_drops_nothing_that_waits(bridge: Bridge, way: str, after: PortBandwidth) -> None:
    """35 datagrams of 100 ms at the old rate: most of them still wait when the rate changes."""
    bridge.limit(both(4 * MEGABIT))
    nodes = (("peer", "limited", LIMITED), ("limited", "peer", PEER))
    source, target, address = nodes[way == "sent"]
    with _datagrams(bridge.name(target)) as receiver, _datagrams(bridge.name(source)) as sender:
        receiver.bind((address, PROBE_PORT))
        receiver.settimeout(0.2)
        for number in range(35):
            sender.sendto(struct.pack("!Q", number) + bytes(1464), (address, PROBE_PORT))
        bridge.limit(after)
        changed, got = time.monotonic(), list[int]()
        while len(got) < 35 and time.monotonic() < changed + 3:
            got.append(struct.unpack("!Q", receiver.recv(2000)[:8])[0])
    assert got == list(range(35))


def _datagrams(namespace: str) -> socket.socket:
    return topology.within(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))


# --- drift -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("tc qdisc del dev {tap} root", "limit of what server-10-port receives was missing"),
        ("tc class change dev {tap} classid 6e61:1 htb rate 7mbit", "receives was different"),
        (
            "tc qdisc replace dev {tap} root handle 1: tbf rate 1mbit burst 5k limit 9k",
            "receives was different",
        ),
        ("tc qdisc change dev {tap} parent 6e61:1 handle 6e62: bfifo limit 3000", "receives was different"),
        ("tc qdisc del dev {tap} ingress", "sends was"),
        ("tc filter del dev {tap} parent ffff:", "sends was"),
        ("ip link del {ifb}", "sends was"),
        ("ip link set {ifb} down", "sends was"),
        ("tc qdisc del dev {ifb} root", "sends was"),
    ],
)
async def test_what_was_changed_by_hand_is_put_right_and_said(
    cloud: LimitedCloud, command: str, words: str
) -> None:
    await cloud.opened(both(5 * MEGABIT))
    assert await cloud.reconcile(A) == ()
    (ifb,) = cloud.shapers(A)
    right = cloud.found(A)
    cloud.hosts[A].command(*command.format(tap=cloud.tap(A), ifb=ifb).split())
    found = await cloud.reconcile(A)
    assert len(found) == 1, found
    assert words in found[0]
    now = cloud.found(A)
    assert now.shaper is not None
    assert now.leads_to == now.shaper.index
    assert now.root is not None
    assert right.root is not None
    assert now.root.bucket == right.root.bucket
    assert await cloud.reconcile(A) == ()


async def test_what_is_right_is_not_touched_and_a_change_is_no_drift(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(both(5 * MEGABIT))
    driver = cloud.hosts[A].driver
    await cloud.reconcile(A)
    writes = driver.writes
    assert await cloud.reconcile(A) == ()
    port, network = cloud.port(guest), cloud.network
    await cloud.hosts[A].call(lambda d: d.port_create(port, network, deliver=True))
    assert driver.writes == writes

    cloud.bandwidth[guest.port] = into(20 * MEGABIT)
    assert await cloud.reconcile(A) == ()
    found = cloud.found(A)
    assert found.root is not None
    assert found.root.bucket is not None
    assert found.root.bucket.rate == 20 * MEGABIT // 8
    assert cloud.shapers(A) == []
    cloud.bandwidth.clear()
    assert await cloud.reconcile(A) == ()
    assert (cloud.found(A).root, cloud.found(A).ingress) == (None, False)
    cloud.hosts[A].command("tc", "qdisc", "replace", "dev", cloud.tap(A), "root", "handle", "7:", "htb")
    assert "was not asked for: removed" in (await cloud.reconcile(A))[0]
    assert cloud.found(A).root is None


async def test_nothing_is_kept_before_a_tap_without_limits(cloud: LimitedCloud) -> None:
    """For each of a tap's 256 possible queues the kernel would set up a queue of its own: 98 MB."""
    guest = await cloud.opened(PortBandwidth())
    assert cloud.queues(A) == ["noqueue"]
    cloud.bandwidth[guest.port] = into(20 * MEGABIT)
    await cloud.reconcile(A)
    assert cloud.queues(A) == ["htb", "bfifo"]
    cloud.bandwidth.clear()
    await cloud.reconcile(A)
    assert cloud.queues(A) == ["noqueue"]


async def test_a_restarted_agent_finds_shapers_and_removes_those_without_a_port(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(both(5 * MEGABIT))
    cloud.hosts[A].restart_agent()
    assert await cloud.reconcile(A) == ()
    cloud.hosts[A].command("ip", "link", "add", "ib0123456789ab", "type", "ifb")
    cloud.hosts[A].command("ip", "link", "set", "ib0123456789ab", "alias", "nahtlos/shaper/gone-port")
    assert await cloud.reconcile(A) == ()
    assert len(cloud.shapers(A)) == 1
    guest.stop()
    await cloud.hosts[A].call(lambda d: d.port_delete(guest.port))
    assert cloud.shapers(A) == []


async def test_the_kernel_can_shape_and_the_driver_says_with_what(cloud: LimitedCloud) -> None:
    found = await cloud.hosts[A].call(lambda d: d.capabilities())
    assert found.shaper
    assert found.details["bandwidth of ports"].startswith("used: htb")
    assert found.details["shares of the underlay"].startswith("used")


# --- moves -------------------------------------------------------------------------------------------


async def moved(cloud: LimitedCloud, guest: Guest, to: str, hold: float = 0.2) -> None:
    source = cloud.places[guest.port]
    await cloud.begin_move(guest, to)
    await cloud.verb(to, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(source, guest, "move_switch", MoveRole.SOURCE)
    assert await cloud.hosts[source].call(lambda d: d.move_drain(guest.port, timeout=1.0))
    guest.stop()
    await asyncio.sleep(hold)
    guest.run_at(cloud.fd(guest, to))
    await cloud.verb(to, guest, "move_settle", MoveRole.DESTINATION)
    await cloud.verb(source, guest, "move_settle", MoveRole.SOURCE)
    cloud.places[guest.port] = to


async def arrived(guest: Guest, sent: int) -> None:
    """As many as were sent, or nothing more comes."""
    deadline = time.monotonic() + 3
    while len(guest.received) < sent and time.monotonic() < deadline:
        await asyncio.sleep(0.05)


async def rate_of(guest: Guest, seconds: float = 1.0) -> float:
    before, began = len(guest.received), time.monotonic()
    await asyncio.sleep(seconds)
    return (len(guest.received) - before) * FRAME * 8 / (time.monotonic() - began)


async def test_a_move_below_the_limit_loses_nothing(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(both(5 * MEGABIT))
    sender = cloud.sender(guest)
    await asyncio.sleep(0.2)
    await moved(cloud, guest, B)
    await asyncio.sleep(0.2)
    sent = sender.stop()
    await arrived(guest, sent)
    tally = Tally(sent, guest.received)
    assert (tally.lost, tally.duplicated, tally.reordered) == ([], [], 0)
    assert cloud.shapers(A) == []
    assert len(cloud.shapers(B)) == 1


async def test_the_rate_is_kept_across_a_move(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(both(SLOW))
    sender = cloud.sender(guest)
    await asyncio.sleep(0.5)
    assert 0.85 * SLOW < await rate_of(guest) < 1.15 * SLOW
    await moved(cloud, guest, B)
    await asyncio.sleep(0.5)
    assert 0.85 * SLOW < await rate_of(guest) < 1.15 * SLOW
    sender.stop()
    assert len(set(guest.received)) == len(guest.received)


async def burst(cloud: LimitedCloud, guest: Guest) -> int:
    """At once: most of them wait in the shaper, which takes 1.2 s for so many and holds more."""
    sent = await asyncio.to_thread(cloud.sender(guest, 0.0, frames=600).ended)
    await asyncio.sleep(0.02)
    return sent


async def test_draining_lets_go_of_what_waits_in_the_shaper(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(both(SLOW))
    await cloud.begin_move(guest, B)
    sent = await burst(cloud, guest)
    came = len(guest.received)
    assert came < sent - 200, "the burst of this rate is 120 frames"
    drained = await cloud.hosts[A].call(lambda d: d.move_drain(guest.port, timeout=0.3))
    assert drained, "at that rate it would take longer"
    await arrived(guest, sent)
    assert guest.received == list(range(sent))
    await cloud.verb(A, guest, "move_revert", MoveRole.SOURCE)
    found = cloud.found(A)
    assert found.root is not None
    assert found.root.bucket == shaping.bucket(Rate(bits_per_second=SLOW), cloud.network.spec.mtu)
    assert await cloud.reconcile(A) == ()


async def test_a_revert_returns_what_waits_in_the_shaper_of_the_destination(cloud: LimitedCloud) -> None:
    guest = await cloud.opened(into(SLOW))
    await cloud.begin_move(guest, B)
    await cloud.verb(B, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(A, guest, "move_switch", MoveRole.SOURCE)
    assert await cloud.hosts[A].call(lambda d: d.move_drain(guest.port, timeout=1.0))
    guest.stop()
    sent = await burst(cloud, guest)
    await cloud.verb(A, guest, "move_revert", MoveRole.SOURCE)
    guest.run_at(cloud.fd(guest, A))
    returned = await cloud.verb(B, guest, "move_revert", MoveRole.DESTINATION)
    assert returned == sent
    await arrived(guest, sent)
    assert sorted(guest.received) == list(range(sent))
