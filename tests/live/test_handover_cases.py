"""The handover's hard cases on real namespaces and real packets: every frame is counted."""

import asyncio
import fcntl
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from handover_play import BROADCAST, MULTICAST, STREAM, A, B, C, Machine, Stage, count, counted
from handover_stream import OFFLOADS, TUNSETOFFLOAD, Stream, StreamMachine
from network_namespaces import missing_programs

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import packet

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
EVERYONE = "255.255.255.255"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, hosts=3)
    try:
        yield stage
    finally:
        await asyncio.to_thread(stage.close)


# --- flooded frames ----------------------------------------------------------------------------------


async def test_flooded_frames_reach_a_server_that_moves(stage: Stage) -> None:
    """From all hosts, before, during and after: none is missed, and only those between the two switches
    can come twice."""
    mover = stage.machine(10, A)
    others = [stage.machine(11, A), stage.machine(12, B), stage.machine(13, C)]
    await stage.opened(mover, *others)
    talkers = [
        stage.talk(m, number, mac, EVERYONE)
        for number, (m, mac) in enumerate(zip(others, (BROADCAST, MULTICAST, BROADCAST), strict=True))
    ]
    own = stage.talk(mover, 7, BROADCAST, EVERYONE, 0.001)
    window = 0.0
    for to in (B, C, A):
        move = stage.move(to, mover)
        await move.whole()
        window += move.window
        await asyncio.sleep(0.05)
    own.stop()
    for talker in talkers:
        talker.stop()
    await stage.silence()
    counts = [count(t, mover) for t in talkers]
    for found in counts:
        assert found.sent > 200
        assert found.lost == []
        assert len(found.duplicated) <= 500 * window + 3 * 3, (found, window)
    assert [n for n in mover.received if n >= 7 * STREAM] == [], "it never hears itself"
    heard = [count(own, other) for other in others]
    assert [(h.lost, h.duplicated) for h in heard] == [([], [])] * 3, "what it sends itself is sent once"


async def test_flooded_frames_survive_an_abort(stage: Stage) -> None:
    mover, here, there = stage.machine(10, A), stage.machine(11, A), stage.machine(12, C)
    bystander = stage.machine(13, B)
    await stage.opened(mover, here, there, bystander)
    talkers = [stage.talk(here, 1, BROADCAST, EVERYONE), stage.talk(there, 2, MULTICAST, EVERYONE)]
    direct = stage.talk(there, 3, mover.mac, mover.ip)
    move = stage.move(B, mover)
    await move.begin()
    await move.switch()
    await asyncio.sleep(0.2)
    began = time.monotonic()
    assert await move.give_up() > 150
    window = move.window + time.monotonic() - began
    await asyncio.sleep(0.05)
    for talker in talkers:
        talker.stop()
    direct.stop()
    await stage.silence()
    for talker in talkers:
        found = count(talker, mover)
        assert found.lost == []
        assert len(found.duplicated) <= 500 * window + 3
        nearby = count(talker, bystander)
        assert (nearby.lost, nearby.duplicated) == ([], []), "nobody else is sent anything again"
    found = count(direct, mover)
    assert (found.lost, found.duplicated) == ([], [])


def question(asking: Machine, wanted: str, number: int) -> bytes:
    """Who has `wanted`? `number` tells this question from others."""
    sender = bytes.fromhex(asking.mac.replace(":", ""))
    body = struct.pack("!HHBBH6s", 1, 0x0800, 6, 4, 1, sender) + socket.inet_aton(asking.ip)
    body += bytes(6) + socket.inet_aton(wanted)
    return bytes(10) + b"\xff" * 6 + sender + b"\x08\x06" + body + struct.pack("!Q10x", number)


def is_arp(frame: bytes, operation: int) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[21] == operation


async def test_questions_for_its_address_are_answered_throughout(stage: Stage) -> None:
    """At once by the bridge where it is not, by itself where it runs; one that is asked on the destination
    before it runs there waits in its ring."""
    mover = stage.machine(10, A)
    asking = {host: stage.machine(n, host) for n, host in ((11, A), (12, B), (13, C))}
    await stage.opened(mover, *asking.values())
    move = stage.move(B, mover)
    steps = (move.begin, move.switch_destination, move.switch_source, move.drain, move.stop, move.finish)
    asked, later = 0, set[int]()
    for step in steps:
        await step()
        for host, machine in asking.items():
            asked += 1
            machine.others.clear()
            assert machine.say(question(machine, mover.ip, asked))
            if host == B and step not in (move.begin, move.finish):
                later.add(asked)
                continue
            deadline = time.monotonic() + 1
            while not answered(machine, mover) and asked not in heard(mover):
                assert time.monotonic() < deadline, (step.__name__, host)
                await asyncio.sleep(0.005)
    await stage.silence()
    assert len(later) == 4
    assert later <= heard(mover)


def answered(machine: Machine, mover: Machine) -> bool:
    return any(is_arp(f, 2) and f[22:28].hex(":") == mover.mac for f in machine.others)


def heard(mover: Machine) -> set[int]:
    """Numbers of the questions that came to it."""
    return {struct.unpack_from("!Q", f, 42)[0] for f in mover.others if is_arp(f, 1)}


# --- many at once ------------------------------------------------------------------------------------


async def test_all_ports_of_a_server_move_together(stage: Stage) -> None:
    """Three ports on two networks; addresses of one network say nothing in the other."""
    ports = [stage.machine(10, A), stage.machine(20, A), stage.machine(10, A, second=True)]
    near, far = stage.machine(12, B), stage.machine(13, C, second=True)
    await stage.opened(*ports, near, far)
    talkers = [stage.talk(near, 1, ports[0].mac, ports[0].ip), stage.talk(near, 2, ports[1].mac, ports[1].ip)]
    talkers.append(stage.talk(far, 3, ports[2].mac, ports[2].ip))
    outside = stage.sender(ports[0])
    for to in (B, A):
        await stage.move(to, *ports).whole()
        assert await stage.reconcile(to) == ()
    sent = outside.stop()
    for talker in talkers:
        talker.stop()
    await stage.silence()
    for talker, port in zip(talkers, ports, strict=True):
        found = count(talker, port)
        assert found.sent > 100
        assert (found.lost, found.duplicated) == ([], [])
    found = counted(sent, [n for n in ports[0].received if n < STREAM])
    assert (found.lost, found.duplicated, found.reordered) == ([], [], 0)


async def test_two_servers_that_talk_to_each_other_swap_hosts(stage: Stage) -> None:
    one, other = stage.machine(10, A), stage.machine(11, B)
    await stage.opened(one, other)
    talkers = [
        (stage.talk(one, 1, other.mac, other.ip, 0.001), other),
        (stage.talk(other, 2, one.mac, one.ip, 0.001), one),
    ]
    senders = [(stage.sender(one), one), (stage.sender(other), other)]
    for _ in range(2):
        forth, back = stage.move(stage.places[other.port], one), stage.move(stage.places[one.port], other)
        for act in ("begin", "switch_destination", "switch_source"):
            await asyncio.gather(getattr(forth, act)(), getattr(back, act)())
        assert await forth.drain() and await back.drain()
        await forth.stop()
        await back.stop()
        await asyncio.sleep(0.1)
        await asyncio.gather(forth.finish(), back.finish())
        await asyncio.sleep(0.1)
    for talker, _ in talkers:
        talker.stop()
    totals = [(sender.stop(), receiver) for sender, receiver in senders]
    await stage.silence()
    for talker, receiver in talkers:
        found = count(talker, receiver)
        assert found.sent > 200
        assert (found.lost, found.duplicated) == ([], []), found
    for sent, receiver in totals:
        found = counted(sent, receiver.received)
        assert (found.lost, found.duplicated) == ([], []), found


@pytest.mark.parametrize("route", [(B, C), (B, A), (B, C, A, B)])
async def test_a_server_moves_again_at_once(stage: Stage, route: tuple[str, ...]) -> None:
    """Nobody has been told of its new place meanwhile: every host of its way still passes frames on."""
    mover = stage.machine(10, A)
    others = [stage.machine(11, A), stage.machine(12, B), stage.machine(13, C)]
    await stage.opened(mover, *others)
    talkers = [stage.talk(m, n, mover.mac, mover.ip) for n, m in enumerate(others, 1)]
    answers = [stage.talk(mover, n, m.mac, m.ip) for n, m in enumerate(others, 5)]
    outside = stage.sender(mover)
    for to in route:
        await stage.move(to, mover).whole(hold=0.05)
    assert await stage.reconcile_all() == dict.fromkeys(stage.hosts, ())
    await asyncio.sleep(0.05)
    for passing in stage.reflect.values():
        passing.clear()
    assert await stage.reconcile_all() == dict.fromkeys(stage.hosts, ())
    sent = outside.stop()
    for talker in (*talkers, *answers):
        talker.stop()
    await stage.silence()
    found = [count(t, mover) for t in talkers] + [count(t, m) for t, m in zip(answers, others, strict=True)]
    found.append(counted(sent, mover.received))
    assert [(f.lost, f.duplicated) for f in found] == [([], [])] * len(found)
    assert sum(f.reordered for f in found) <= 0.01 * sum(f.sent for f in found)


# --- several queues ----------------------------------------------------------------------------------


async def test_a_server_with_several_queues(stage: Stage) -> None:
    mover = stage.machine(10, A, queues=3)
    others = [stage.machine(n, C) for n in range(20, 28)]
    await stage.opened(mover, *others)
    talkers = [stage.talk(m, n, mover.mac, mover.ip, 0.004) for n, m in enumerate(others)]
    await stage.move(B, mover).whole()
    await asyncio.sleep(0.1)
    back = stage.move(A, mover)
    await back.begin()
    for host in (A, B):
        stage.hosts[host].restart_agent()
    await back.switch()
    await asyncio.sleep(0.1)
    assert await back.give_up() > 50
    for talker in talkers:
        talker.stop()
    await stage.silence()
    assert [(c.lost, c.duplicated) for c in (count(t, mover) for t in talkers)] == [([], [])] * 8
    assert len(mover.by_queue) > 1, "the kernel spread them"
    stored = set(stage.hosts[A].supervisor.fds)
    assert not [name for name in stored if name.startswith(f"tap.{mover.port}")], "all queues were let go"


async def test_draining_waits_for_every_queue(stage: Stage) -> None:
    mover = stage.machine(10, A, queues=3)
    others = [stage.machine(n, C) for n in range(20, 28)]
    await stage.opened(mover, *others)
    mover.stop()
    for machine in others:
        machine.say(machine.frame_to(mover.mac, mover.ip, 1))
    await stage.silence()
    mover.run_on(stage.fds(mover, A)[:1])
    await stage.silence()
    move = stage.move(B, mover)
    assert mover.received and len(mover.received) < 8, "one queue is read, another is not"
    assert not await move.drain(0.05)
    mover.run_on(stage.fds(mover, A))
    assert await move.drain()
    assert mover.received == [1] * 8


# --- full rings --------------------------------------------------------------------------------------


async def test_a_guest_that_takes_nothing_stays_where_it_is(stage: Stage) -> None:
    """Its ring is full when it should move: the drain says so, and the undo brings everything back."""
    mover, other = stage.machine(10, A), stage.machine(12, C)
    await stage.opened(mover, other)
    mover.stop()
    for number in range(300):
        other.say(other.frame_to(mover.mac, mover.ip, number))
    await stage.silence()
    move = stage.move(B, mover)
    await move.begin()
    await move.switch_destination()
    await move.switch_source()
    for number in range(300, 500):
        other.say(other.frame_to(mover.mac, mover.ip, number))
    assert not await move.drain(0.1)
    await move.revert_source()
    assert await move.revert_destination() == 200
    await move.clear_destination()
    await move.resume_at_source()
    await stage.silence()
    assert mover.received == list(range(500)), "not one lost, and in order"
    assert await stage.reconcile_all() == dict.fromkeys(stage.hosts, ())


async def test_a_ring_that_overflows_is_counted_and_told(stage: Stage) -> None:
    mover, other = stage.machine(10, A), stage.machine(12, B)
    await stage.opened(mover, other)
    move = stage.move(B, mover)
    await move.begin()
    await move.switch()
    for number in range(10_300):
        other.say(other.frame_to(mover.mac, mover.ip, number))
    await stage.silence()
    await move.finish()
    await stage.silence()
    lost = 10_300 - len(mover.received)
    assert 300 <= lost < 320, "what the ring holds is not lost"
    told = f"{lost} frames for port {mover.port} were dropped while it moved: its ring holds 10000"
    assert await stage.reconcile(B) == (told,)
    assert await stage.reconcile(B) == ()
    seen = await stage.hosts[B].call(lambda d: d.observe())
    assert seen.counters[mover.port]["tx_dropped"] == lost


async def test_what_comes_after_the_stop_is_passed_on(stage: Stage) -> None:
    """A frame that was held up on the old host, or a switch that never came there: late, and not lost."""
    mover, other = stage.machine(10, A), stage.machine(11, A)
    await stage.opened(mover, other)
    move = stage.move(B, mover)
    await move.begin()
    await move.switch_destination()
    await move.stop()
    for number in range(20):
        other.say(other.frame_to(mover.mac, mover.ip, number))
    await move.resume()
    await move.settle_destination()
    await move.switch_source()
    await move.settle_source()
    await stage.silence()
    assert mover.received == list(range(20))
    assert await stage.reconcile(A) == (
        f"20 frames for port {mover.port} came after its server had stopped: passed on",
    )


async def test_a_port_without_a_tap_is_named(stage: Stage) -> None:
    mover = stage.machine(10, A)
    await stage.opened(mover)
    with pytest.raises(Unavailable, match=mover.port):
        await stage.hosts[B].call(lambda d: d.move_drain(mover.port, timeout=0.1))


# --- long frames -------------------------------------------------------------------------------------


@pytest.fixture
async def streams(stage: Stage) -> AsyncIterator[list[StreamMachine]]:
    """Where to put machines with a TCP stack, so that they are removed."""
    machines: list[StreamMachine] = []
    try:
        yield machines
    finally:
        for machine in machines:
            await asyncio.to_thread(machine.remove)


async def streaming(stage: Stage, streams: list[StreamMachine]) -> tuple[StreamMachine, list[Stream]]:
    """The one that moves, connections from and to a peer on a third host that are busy."""
    for number, host in ((10, A), (11, C)):
        streams.append(stage.add(StreamMachine(number, stage.mtu), host))
    mover, peer = streams
    await stage.opened(mover, peer)
    both = [
        await asyncio.to_thread(Stream, peer, mover, 7001),
        await asyncio.to_thread(Stream, mover, peer, 7002),
    ]
    await asyncio.sleep(0.3)
    return mover, both


@pytest.mark.parametrize("mtu", [1500, 8000])
async def test_bulk_streams_of_long_segments_survive(
    stage: Stage, streams: list[StreamMachine], mtu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, and nearly there and back again: every byte arrives. A handover makes neither side send anything
    again but for a probe of its timers; an abort turns the order round, which TCP may take for a loss."""
    if mtu != stage.mtu:
        stage.widen(mtu)
    returned: list[int] = []
    send = packet._send

    def noted(sending: socket.socket, parts: list[bytes | memoryview]) -> None:
        returned.append(sum(len(p) for p in parts))
        send(sending, parts)

    monkeypatch.setattr(packet, "_send", noted)
    mover, both = await streaming(stage, streams)
    before = sum(stream.again for stream in both)
    await stage.move(B, mover).whole(hold=0.1)
    await asyncio.sleep(0.3)
    assert mover.largest > 2 * mtu, "segments were left whole"
    moved = sum(stream.again for stream in both)
    back = stage.move(A, mover)
    await back.begin()
    for fd in stage.fds(mover, A):
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
    await back.switch()
    await asyncio.sleep(0.1)
    assert await back.give_up() == len(returned) > 0
    await asyncio.sleep(0.3)
    assert max(returned) > 2 * mtu, "and returned whole"
    aborted = sum([await asyncio.to_thread(stream.finish) for stream in both])
    volume = sum(stream.sent for stream in both)
    assert volume > 20 << 20
    print(
        f"mtu {mtu}: {volume >> 20} MiB; segments sent again before {before}, by the move {moved - before}, "
        f"by the abort {aborted - moved}; {len(returned)} frames returned, up to {max(returned)} bytes"
    )
    assert moved - before <= 4, "one probe for each direction and timer"
