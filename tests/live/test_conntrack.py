"""Connections carried from one kernel table to another: real sockets, real entries, a strict firewall.

A router between a client and a server is replaced by another that has never seen them: `carried` is what the
driver's part does in a move, with two namespaces as the two hosts. Both let in only what they remember.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from network_namespaces import missing_programs

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, NetworkId, PortId, SecurityGroupId, ServerId
from nahtlos.model.networking import NetworkSpec
from nahtlos.physical.network.device_names import tracking_zone
from nahtlos.physical.network.netlink import attribute, attributes, nested
from nahtlos.physical.network.parts import LocalPort
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import Entry, Listener, Table
from nahtlos.physical.network.tracking.part import HOLD_SECONDS, ConnectionTracking
from nahtlos.physical.network.tracking.state import decode
from nahtlos.physical.ports import MoveRole

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
T = TypeVar("T")
VNI = 4711
ZONE = tracking_zone(VNI)
SERVER, SERVER6 = "10.9.0.2", "fd00:9::2"
CLIENT, CLIENT6 = "10.8.0.2", "fd00:8::2"
ESTABLISHED, SYN_SENT = 3, 1
_numbers = itertools.count(1)

SPEC = NetworkSpec(
    id=NetworkId("tenant"),
    vni=VNI,
    cidr="10.9.0.0/24",
    gateway_ip="10.9.0.1",
    gateway_mac="02:00:00:4d:00:01",
    gateway_host=HostId("edge-1"),
    dhcp_ip="10.9.0.3",
)


def port_of(name: str, *addresses: str, groups: tuple[str, ...] = ("web",)) -> LocalPort:
    port = PortConfig(
        id=PortId(name),
        server=ServerId(name),
        mac="52:54:00:4d:00:0a",
        ip=addresses[0],
        addresses=addresses[1:],
        host=HostId("host-1"),
        vtep="10.99.0.11",
        security_groups=tuple(map(SecurityGroupId, groups)),
    )
    return LocalPort(port, NetworkConfig(spec=SPEC, ports=(port,), gateway_vtep="", vteps=()), "tp0")


CONFIG = HostConfig(host=HostId("host-1"), generation=1, release=None)
PORT = port_of("server", SERVER, SERVER6)
ID = PORT.port.id


class Place:
    """A namespace, and the part of the driver that would run there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.namespace = f"nlt-ct{os.getpid() % 100000}-{name}{next(_numbers)}"
        self.folder = folder / name
        try:
            command("ip", "netns", "add", self.namespace)
            command("ip", "-n", self.namespace, "link", "set", "lo", "up")
        except BaseException:
            subprocess.run(
                ["ip", "netns", "del", self.namespace], capture_output=True, timeout=60, check=False
            )
            raise
        self.part = ConnectionTracking(self.folder)

    def within(self, act: Callable[[], T]) -> T:
        return topology.within(self.namespace, act)

    def call(self, act: Callable[[ConnectionTracking], "asyncio.Future[T]"]) -> T:
        """A verb of the part, in a loop inside the namespace."""

        async def run() -> T:
            return await act(self.part)

        return self.within(lambda: asyncio.run(run()))

    def restart_agent(self, *, event_buffer: int = conntrack.EVENT_BUFFER) -> None:
        self.part.close()
        self.part = ConnectionTracking(self.folder, event_buffer=event_buffer)

    def table(self) -> Table:
        return self.within(Table)

    def entries(self, zone: int = ZONE) -> dict[conntrack.Key, Entry]:
        with self.table() as table:
            return {entry.key: entry for entry in table.dump(zone, lambda _: True)}

    def hold(self, entries: list[Entry], zone: int = ZONE) -> None:
        with self.table() as table:
            assert table.put([conntrack.put(entry, zone, 0) for entry in entries]) == []

    def end(self) -> None:
        self.part.close()
        command("ip", "netns", "del", self.namespace)


def command(*argv: str, text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[[str], Place]]:
    made: list[Place] = []

    def make(name: str) -> Place:
        made.append(Place(tmp_path, name))
        return made[-1]

    yield make
    for place in made:
        place.end()


@pytest.fixture
def pair(places: Callable[[str], Place]) -> tuple[Place, Place]:
    """Source and destination, the move of PORT prepared at both."""
    source, destination = places("a"), places("b")
    for place, role in ((source, MoveRole.SOURCE), (destination, MoveRole.DESTINATION)):
        place.call(lambda p: p.init())
        prepared(place, role)
    return source, destination


def prepared(place: Place, role: MoveRole) -> None:
    place.call(lambda p: p.move_prepared(PORT, role))


def begun(place: Place) -> bytes:
    return place.call(lambda p: p.begin(ID))


def changed(place: Place) -> bytes:
    return place.call(lambda p: p.changes(ID))


def loaded(place: Place, state: bytes) -> tuple[str, ...]:
    return place.call(lambda p: p.load(ID, state))


# --- entries without packets -------------------------------------------------------------------------


def ends(one: str, other: str, sport: int, dport: int, protocol: int) -> bytes:
    family = socket.AF_INET6 if ":" in one else socket.AF_INET
    first, second = (3, 4) if ":" in one else (1, 2)
    return nested(
        1,
        attribute(first, socket.inet_pton(family, one)),
        attribute(second, socket.inet_pton(family, other)),
    ) + nested(
        2,
        attribute(1, bytes([protocol])),
        attribute(2, struct.pack("!H", sport)),
        attribute(3, struct.pack("!H", dport)),
    )


def entry(
    number: int,
    *,
    remote: str = CLIENT,
    local: str = SERVER,
    state: int = ESTABLISHED,
    answered: bool = True,
    protocol: int = 6,
    timeout: int = 60,
) -> Entry:
    """Connection `number` from `remote` to `local`, as its firewall would remember it."""
    status = conntrack.CONFIRMED | ((conntrack.SEEN_REPLY | conntrack.ASSURED) if answered else 0)
    sport = 1024 + number
    values = {
        conntrack.TUPLE_ORIG: ends(remote, local, sport, 80, protocol),
        conntrack.TUPLE_REPLY: ends(local, remote, 80, sport, protocol),
        conntrack.STATUS: struct.pack("!I", status),
        conntrack.TIMEOUT: struct.pack("!I", timeout),
    }
    if protocol == 6:
        flags = attribute(4, b"\x03\x00"), attribute(5, b"\x03\x00")
        values[conntrack.PROTOINFO] = nested(1, attribute(1, bytes([state])), *flags)
    return Entry(socket.AF_INET6 if ":" in local else socket.AF_INET, values)


def tcp_state(found: Entry) -> int:
    return attributes(attributes(found.values[conntrack.PROTOINFO])[1])[1][0]


def seconds_left(found: Entry) -> int:
    return int.from_bytes(found.values[conntrack.TIMEOUT], "big")


def status(found: Entry) -> int:
    return int.from_bytes(found.values[conntrack.STATUS], "big")


def test_all_of_a_port_and_nothing_else_is_carried(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    own = [entry(1), entry(2, protocol=17), entry(3, local=SERVER6, remote=CLIENT6)]
    own.append(entry(4, remote=SERVER, local=CLIENT))  # opened by the server
    source.hold([*own, entry(5, local="10.9.0.77")])
    source.hold([entry(6)], zone=ZONE + 1)
    assert loaded(destination, begun(source)) == ()
    there = destination.entries()
    assert set(there) == {e.key for e in own}
    for found in there.values():
        assert status(found) == conntrack.CONFIRMED | conntrack.SEEN_REPLY | conntrack.ASSURED
        assert HOLD_SECONDS - 5 <= seconds_left(found) <= HOLD_SECONDS
    tcp = attributes(attributes(there[own[0].key].values[conntrack.PROTOINFO])[1])
    assert tcp[1][0] == ESTABLISHED
    assert tcp[4][0] & conntrack.BE_LIBERAL and tcp[5][0] & conntrack.BE_LIBERAL
    assert destination.entries(ZONE + 1) == {}


def test_what_changes_after_the_beginning_follows(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    source.hold([entry(1), entry(2)])
    loaded(destination, begun(source))
    assert changed(source) == b"", "nothing has happened"
    source.hold([entry(3), entry(4, local="10.9.0.77")])
    with source.table() as table:
        assert table.delete([conntrack.remove(entry(1).key, ZONE)]) == []
    state = changed(source)
    assert not decode(state).whole
    assert len(decode(state).records) == 2
    loaded(destination, state)
    assert set(destination.entries()) == {entry(2).key, entry(3).key}
    assert changed(source) == b""


def test_an_entry_that_saw_one_side_only_learns_of_the_other(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    destination.hold([entry(1, state=SYN_SENT, answered=False)])
    source.hold([entry(1)])
    assert loaded(destination, begun(source)) == ()
    (found,) = destination.entries().values()
    assert tcp_state(found) == ESTABLISHED
    assert status(found) & conntrack.ASSURED


def test_what_the_destination_believed_falsely_is_replaced(pair: tuple[Place, Place]) -> None:
    """Left over from an earlier stay: answered there, new at the source; or gone at the source."""
    source, destination = pair
    destination.hold([entry(1), entry(2)])
    source.hold([entry(1, state=SYN_SENT, answered=False)])
    assert loaded(destination, begun(source)) == ()
    (found,) = destination.entries().values()
    assert found.key == entry(1).key
    assert tcp_state(found) == SYN_SENT
    assert not status(found) & conntrack.SEEN_REPLY


def test_what_comes_twice_or_late_does_no_harm(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    source.hold([entry(1)])
    first = begun(source)
    loaded(destination, first)
    source.hold([entry(2)])
    second = changed(source)
    source.hold([entry(3)])
    third = changed(source)
    loaded(destination, second)
    for late in (second, first):
        assert loaded(destination, late) == ()
    loaded(destination, third)
    assert set(destination.entries()) == {entry(n).key for n in (1, 2, 3)}
    source.hold([entry(4)])
    changed(source)
    source.hold([entry(5)])
    with pytest.raises(Refused, match="missing"):
        loaded(destination, changed(source))


def test_an_agent_that_was_started_meanwhile_sends_all_again(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    source.hold([entry(1), entry(2)])
    loaded(destination, begun(source))
    source.restart_agent()
    with source.table() as table:
        table.delete([conntrack.remove(entry(1).key, ZONE)])
    source.hold([entry(3)])
    state = changed(source)
    assert decode(state).whole
    destination.restart_agent()
    loaded(destination, state)
    assert set(destination.entries()) == {entry(2).key, entry(3).key}


def test_when_events_are_lost_all_is_sent_again(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    source.restart_agent(event_buffer=4096)
    source.hold([entry(1)])
    loaded(destination, begun(source))
    source.hold([entry(n) for n in range(2, 300)])
    state = changed(source)
    assert decode(state).whole
    assert loaded(destination, state) == ()
    assert set(destination.entries()) == {entry(n).key for n in range(1, 300)}
    source.hold([entry(300)])
    assert not decode(changed(source)).whole, "from there on changes are enough again"


def test_a_port_without_groups_costs_nothing(places: Callable[[str], Place]) -> None:
    source = places("a")
    source.call(lambda p: p.init())
    open_port = port_of("server", SERVER, groups=())
    source.call(lambda p: p.move_prepared(open_port, MoveRole.SOURCE))
    source.hold([entry(1)])
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - descriptors, not files
    assert begun(source) == b""
    assert changed(source) == b""
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert not (source.folder / "connections.json").exists()


def test_an_odd_entry_is_told_and_the_others_are_taken(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    source.hold([entry(1), entry(2)])
    clash = entry(9, remote="10.8.0.99")
    values = {**clash.values, conntrack.TUPLE_REPLY: entry(2).values[conntrack.TUPLE_REPLY]}
    destination.hold([Entry(clash.family, values)], zone=ZONE)
    neighbour = port_of("other", "10.8.0.99")
    destination.call(lambda p: p.port_created(neighbour))
    words = loaded(destination, begun(source))
    assert len(words) == 1
    assert words[0].startswith("1 of 2") and "EEXIST" in words[0]
    assert entry(1).key in destination.entries()


def test_the_form_of_another_release_is_refused(pair: tuple[Place, Place]) -> None:
    source, destination = pair
    state = begun(source)
    for other in (b"NLCT\x02" + state[5:], b"NLCT\x01\x80" + state[6:], b"else" + state[4:], state[:5]):
        with pytest.raises(Refused) as caught:
            loaded(destination, other)
        assert "upgrade" in caught.value.remedy
    with pytest.raises(Refused, match="damaged"):
        loaded(destination, state[:-1])


def test_a_port_that_is_gone_leaves_only_what_is_others(pair: tuple[Place, Place]) -> None:
    """Moved away, or the destination of a move that was abandoned: also by an agent that was started just
    then and does not know yet who else is here."""
    source, destination = pair
    neighbour = port_of("other", "10.9.0.50")
    shared = entry(1, remote="10.9.0.50")
    for place in pair:
        place.call(lambda p: p.reconcile(CONFIG, {ID: PORT, neighbour.port.id: neighbour}))
    source.hold([shared, entry(2), entry(3, local="10.9.0.50")])
    loaded(destination, begun(source))
    assert set(destination.entries()) == {shared.key, entry(2).key}
    destination.call(lambda p: p.port_deleted(ID, "tp0"))
    assert set(destination.entries()) == {shared.key}
    source.restart_agent()
    source.call(lambda p: p.port_deleted(ID, "tp0"))
    assert len(source.entries()) == 3, "who else is here is not known yet"
    source.restart_agent()
    source.call(lambda p: p.reconcile(CONFIG, {neighbour.port.id: neighbour}))
    assert set(source.entries()) == {shared.key, entry(3, local="10.9.0.50").key}


def test_events_are_turned_on_and_drift_is_told(places: Callable[[str], Place]) -> None:
    host = places("a")
    assert host.call(lambda p: p.capabilities())["connection tracking"].startswith("used")
    host.call(lambda p: p.init())
    setting = "net.netfilter.nf_conntrack_events"
    assert command("ip", "netns", "exec", host.namespace, "sysctl", "-n", setting).strip() == "1"
    command("ip", "netns", "exec", host.namespace, "sysctl", "-qw", f"{setting}=0")
    assert host.call(lambda p: p.reconcile(CONFIG, {})) == (), "no port here needs it"
    (words,) = host.call(lambda p: p.reconcile(CONFIG, {ID: PORT}))
    assert setting in words
    assert host.call(lambda p: p.reconcile(CONFIG, {ID: PORT})) == ()


def test_listeners_hear_of_their_zone_only(places: Callable[[str], Place]) -> None:
    host = places("a")
    host.call(lambda p: p.init())
    listeners = [host.within(lambda z=zone: Listener(z)) for zone in (ZONE, ZONE + 1)]
    host.hold([entry(1)])
    heard = [listener.read() for listener in listeners]
    assert [len(events) for events in heard if events is not None] == [1, 0]
    for listener in listeners:
        listener.close()


# --- real connections --------------------------------------------------------------------------------

STRICT = """
table inet strict {{
  chain zone {{
    type filter hook prerouting priority raw; policy accept;
    ct zone set {zone}
  }}
  chain pass {{
    type filter hook forward priority 0; policy drop;
    ct state established accept
    {opening}
    counter
  }}
}}
"""
OPENING = "tcp dport 80 tcp flags & (syn | ack) == syn ct state new accept\n    udp dport 80 accept"


class Crossing:
    """A client and a server, and two ways between them: by A, which lets connections begin, and by B, which
    lets in only what it remembers. Both ends have one address each, whichever way is used."""

    def __init__(self, make: Callable[[str], Place]) -> None:
        self.client, self.server, self.a, self.b = (make(name) for name in ("client", "server", "a", "b"))
        for place, address, address6 in ((self.client, CLIENT, CLIENT6), (self.server, SERVER, SERVER6)):
            ip(place, "addr", "add", f"{address}/32", "dev", "lo")
            ip(place, "addr", "add", f"{address6}/128", "dev", "lo", "nodad")
        for number, (router, opening) in enumerate(((self.a, OPENING), (self.b, ""))):
            for name in ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"):
                sysctl(router, name)
            sysctl(router, "net.netfilter.nf_conntrack_tcp_loose=0")
            self._link(self.client, router, number)
            self._link(self.server, router, number + 2)
            rules = STRICT.format(zone=ZONE, opening=opening)
            command("ip", "netns", "exec", router.namespace, "nft", "-f", "-", text=rules)
            router.call(lambda p: p.init())
        prepared(self.a, MoveRole.SOURCE)
        prepared(self.b, MoveRole.DESTINATION)
        self.lead_by(0)

    def _link(self, end: Place, router: Place, number: int) -> None:
        """Neighbours are told, so that no frame waits for (or is lost by) finding them."""
        here, there = f"up{number % 2}", f"down{number}"
        ip(end, "link", "add", here, "type", "veth", "peer", "name", there, "netns", router.namespace)
        for place, name, last in ((end, here, 2), (router, there, 1)):
            ip(place, "link", "set", name, "address", f"02:00:00:00:{number:02x}:{last:02x}")
            ip(place, "addr", "add", f"192.168.{number}.{last}/30", "dev", name)
            ip(place, "addr", "add", f"fd00:aa:{number}::{last}/64", "dev", name, "nodad")
            ip(place, "link", "set", name, "up")
            sysctl(place, f"net.ipv4.conf.{name}.rp_filter=0")
            for address in (f"192.168.{number}.{3 - last}", f"fd00:aa:{number}::{3 - last}"):
                there_mac = f"02:00:00:00:{number:02x}:{3 - last:02x}"
                ip(place, "neigh", "replace", address, "lladdr", there_mac, "dev", name)
        sysctl(end, "net.ipv4.conf.all.rp_filter=0")
        address, address6 = (CLIENT, CLIENT6) if end is self.client else (SERVER, SERVER6)
        ip(router, "route", "add", address, "via", f"192.168.{number}.2")
        ip(router, "-6", "route", "add", address6, "via", f"fd00:aa:{number}::2")

    def lead_by(self, way: int) -> None:
        for end, first, own, other in (
            (self.client, 0, (CLIENT, CLIENT6), (SERVER, SERVER6)),
            (self.server, 2, (SERVER, SERVER6), (CLIENT, CLIENT6)),
        ):
            number = first + way
            ip(end, "route", "replace", other[0], "via", f"192.168.{number}.1", "src", own[0])
            via = ("via", f"fd00:aa:{number}::1", "src", own[1])
            ip(end, "-6", "route", "replace", other[1], *via)

    def connected(self, address: str) -> tuple[socket.socket, socket.socket]:
        """Both ends of a TCP connection that the client has opened."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = self.server.within(lambda: socket.create_server((address, 80), family=family))
        with listening:
            near = self.client.within(lambda: socket.create_connection((address, 80), timeout=5))
            far, _ = listening.accept()
        for one in (near, far):
            one.settimeout(5)
        return near, far

    def refuses(self, address: str) -> bool:
        """A connection cannot begin by the way that is used now."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = self.server.within(lambda: socket.create_server((address, 80), family=family))
        with listening, contextlib.suppress(TimeoutError):
            self.client.within(lambda: socket.create_connection((address, 80), timeout=0.3)).close()
            return False
        return True


def ip(place: Place, *argv: str) -> None:
    command("ip", "-n", place.namespace, *argv)


def sysctl(place: Place, setting: str) -> None:
    command("ip", "netns", "exec", place.namespace, "sysctl", "-qw", setting)


def talk(one: socket.socket, other: socket.socket, size: int = 100_000) -> None:
    """Both ways, checked byte for byte."""
    for sender, receiver in ((one, other), (other, one)):
        sent, data = 0, os.urandom(size)
        received = bytearray()
        while len(received) < size:
            sent += sender.send(data[sent : sent + 16_000]) if sent < size else 0
            received += receiver.recv(1 << 17)
        assert bytes(received) == data


def retransmitted(one: socket.socket) -> int:
    return struct.unpack_from("I", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]


@pytest.mark.parametrize("address", [SERVER, SERVER6])
def test_a_connection_goes_on_through_a_firewall_that_never_saw_it_begin(
    places: Callable[[str], Place], address: str
) -> None:
    crossing = Crossing(places)
    near, far = crossing.connected(address)
    with near, far:
        talk(near, far)
        loaded(crossing.b, begun(crossing.a))
        later_near, later_far = crossing.connected(address)  # after the dump: known by an event only
        with later_near, later_far:
            loaded(crossing.b, changed(crossing.a))
            crossing.lead_by(1)
            for pair in ((near, far), (later_near, later_far)):
                talk(*pair)
                talk(*pair)
                assert [retransmitted(one) for one in pair] == [0, 0]
            assert crossing.refuses(address)


def test_without_its_entry_a_connection_is_dead(places: Callable[[str], Place]) -> None:
    """The firewall of these tests is as strict as they say."""
    crossing = Crossing(places)
    near, far = crossing.connected(SERVER)
    with near, far:
        talk(near, far)
        loaded(crossing.b, begun(crossing.a))
        crossing.b.call(lambda p: p.reconcile(CONFIG, {}))
        crossing.b.call(lambda p: p.port_deleted(ID, "tp0"))
        crossing.lead_by(1)
        far.settimeout(0.7)
        near.send(b"lost")
        with pytest.raises(TimeoutError):
            far.recv(100)


def test_a_connection_that_ends_is_forgotten_in_both_places(places: Callable[[str], Place]) -> None:
    crossing = Crossing(places)
    near, far = crossing.connected(SERVER)
    loaded(crossing.b, begun(crossing.a))
    sysctl(crossing.a, "net.netfilter.nf_conntrack_tcp_timeout_close=1")
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()  # by a reset
    far.close()
    deadline = time.monotonic() + 10
    while crossing.a.entries() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert crossing.a.entries() == {}
    loaded(crossing.b, changed(crossing.a))
    assert crossing.b.entries() == {}


def test_datagrams_are_answered_through_the_new_firewall(places: Callable[[str], Place]) -> None:
    crossing = Crossing(places)
    near = crossing.client.within(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    far = crossing.server.within(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with near, far:
        near.settimeout(5)
        far.settimeout(5)
        far.bind((SERVER, 80))
        near.connect((SERVER, 80))
        near.send(b"one")
        answered_to = far.recvfrom(100)[1]
        far.sendto(b"two", answered_to)
        assert near.recv(100) == b"two"
        loaded(crossing.b, begun(crossing.a))
        crossing.lead_by(1)
        far.sendto(b"three", answered_to)
        assert near.recv(100) == b"three"
        near.send(b"four")
        assert far.recv(100) == b"four"


# --- figures -----------------------------------------------------------------------------------------


def test_ten_thousand_connections(
    pair: tuple[Place, Place], record_property: Callable[[str, object], None]
) -> None:
    """What is in a hurry does not look at the whole table."""
    source, destination = pair
    held = [entry(n % 60_000, remote=f"10.{n // 200 % 200}.1.2") for n in range(10_000)]
    source.hold(held)
    figures: dict[str, float] = {}

    def timed(what: str, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return act()
        finally:
            figures[what] = round(1000 * (time.perf_counter() - began), 2)
            record_property(what, figures[what])

    state = timed("begin 10000 ms", lambda: begun(source))
    assert timed("load 10000 ms", lambda: loaded(destination, state)) == ()
    assert len(destination.entries()) == 10_000

    async def spent(act: Callable[[], "asyncio.Future[bytes]"]) -> tuple[float, bytes]:
        began = time.perf_counter()
        answer = await act()
        return 1000 * (time.perf_counter() - began), answer

    quiet = min(source.call(lambda p: spent(lambda: p.changes(ID)))[0] for _ in range(5))
    few: list[float] = []
    for n in range(5):
        source.hold([entry(60_000 + n)])
        milliseconds, changes = source.call(lambda p: spent(lambda: p.changes(ID)))
        few.append(milliseconds)
        assert not decode(changes).whole
        loaded(destination, changes)
    figures |= {"changes, none ms": round(quiet, 3), "changes, one ms": round(min(few), 3)}
    figures["bytes each"] = round(len(state) / 10_000, 1)
    print(figures)
    assert len(destination.entries()) == 10_005
    assert min(few) < figures["begin 10000 ms"] / 50
