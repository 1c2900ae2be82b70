"""The network benchmark's own arithmetic: plans of handovers, frames, and counts that can fail."""

import socket
import struct

from benchmarks import network_load as load
from benchmarks import network_moves as moves
from benchmarks.network_hosts import server_port
from benchmarks.network_learning import announcement
from benchmarks.network_scale import batches

HOSTS = ["host-1", "host-2", "host-3"]


def test_a_plan_is_the_same_again_and_every_leg_begins_where_the_last_ended() -> None:
    plan = moves.rounds(200, HOSTS)
    assert plan == moves.rounds(200, HOSTS)
    assert plan != moves.rounds(200, HOSTS, seed=2)
    at = {"mover-0": "host-1", "mover-1": "host-2"}
    for round_ in plan:
        assert all(leg.source == at[leg.server] != leg.destination for leg in round_)
        at |= {leg.server: leg.destination for leg in round_}
    legs = [leg for round_ in plan for leg in round_]
    assert len(legs) >= 200
    assert {(leg.source, leg.destination) for leg in legs} == {(a, b) for a in HOSTS for b in HOSTS if a != b}
    assert min(leg.blackout for leg in legs) >= 0.05
    assert max(leg.blackout for leg in legs) <= 0.5


def test_some_rounds_move_both_and_some_of_those_swap() -> None:
    both = [round_ for round_ in moves.rounds(200, HOSTS) if len(round_) == 2]
    assert len(both) > 10
    assert any(a.destination == b.source and b.destination == a.source for a, b in both)


def test_every_server_is_sent_to_and_sends_in_both_families_from_everywhere() -> None:
    ports, places = moves.members(HOSTS)
    assert {places[f"peer-{host}"] for host in HOSTS} == set(HOSTS)
    streams, flows, kinds = moves.traffic(ports, {"ipv4": "203.0.113.10", "ipv6": "fd00:203::10"})
    for mover in ("mover-0", "mover-1"):
        out = sum(flow.rate for flow in flows if flow.sender == mover)
        sent_to = {s.number for s in streams if s.receiver == mover}
        into = sum(f.rate for f in flows if f.sender not in ports or f.sender.startswith("peer")) / 2
        assert min(out, into) >= moves.RATE
        seen = {kinds[n] for n in sent_to}
        for peer in (f"peer-{host}" for host in HOSTS):
            assert {f"inside {f} from-{peer} to-{mover}" for f in ("ipv4", "ipv6")} <= seen
        assert {f"outside ipv4 from-outside to-{mover}", f"outside ipv6 from-outside6 to-{mover}"} <= seen


def test_a_frame_carries_its_number_and_a_checksum_that_is_right_for_all() -> None:
    mover, peer = server_port(1), server_port(2)
    for source, target, start, size in (
        (mover.ip, peer.ip, load.V4_PAYLOAD, 4),
        (mover.addresses[0], peer.addresses[0], load.V6_PAYLOAD, 16),
    ):
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        head = bytes.fromhex(load.head(7, (mover.mac, source), (peer.mac, target)))
        assert len(head) == start
        for number in (0, 1, 0xFFFF, 123456789012):
            frame = head + load.payload(7, number)
            assert load.numbered_frame(frame, 0) == (7, number)
            datagram = frame[start - 8 :]
            pseudo = socket.inet_pton(family, source) + socket.inet_pton(family, target)
            assert load.internet_checksum(pseudo + struct.pack("!II", len(datagram), 17) + datagram) == 0
    assert load.numbered_frame(b"\xff" * 100, 0) is None


def test_what_is_lost_doubled_and_out_of_order_is_counted() -> None:
    count = load.tally(6, [0, 2, 1, 4, 4])
    assert (count.sent, count.lost, count.duplicated, count.reordered) == (6, 2, 1, 1)
    assert count.first_lost == (3, 5)
    assert load.tally(3, [0, 1, 2]) == load.Count(sent=3, lost=0, duplicated=0, reordered=0)


def test_an_announcement_is_as_long_as_a_frame_must_be() -> None:
    for reverse in (True, False):
        frame = announcement("52:54:00:00:00:01", "10.0.0.1", reverse=reverse)
        assert len(frame) == 60
        assert frame[:6] == b"\xff" * 6


def test_the_floor_does_for_every_port_what_the_driver_has_to() -> None:
    placed = [server_port(n) for n in (1, 2, 3)]
    devices, entries, neighbours = batches(placed, "br100", "vx100", local=True)
    assert len(devices) == len(entries) == len(neighbours) == 6
    devices, entries, _ = batches(placed, "br100", "vx100", local=False)
    assert (devices, len(entries)) == ([], 6)
