"""Decisions about connections on their way: whose they are, what is made of them, what events sum up to."""

import errno
import os
import socket
import struct
from pathlib import Path

import pytest

from nahtlos.model.config import PortConfig
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId, PortId, ServerId
from nahtlos.model.networking import AddressPair
from nahtlos.physical.network.netlink import attribute, attributes, nested
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import Entry, Event, Rejected
from nahtlos.physical.network.tracking.part import ConnectionTracking, problems_with
from nahtlos.physical.network.tracking.state import (
    DELETE,
    PUT,
    Selector,
    State,
    Tracked,
    decode,
    encode,
    entry_of,
    put_record,
    summed_up,
)

SERVER, CLIENT = "10.9.0.2", "192.0.2.7"


def one_way(source: str, destination: str, sport: int = 4000, dport: int = 80, protocol: int = 6) -> bytes:
    wide = ":" in source
    family = socket.AF_INET6 if wide else socket.AF_INET
    kinds = (3, 4) if wide else (1, 2)
    ends = [socket.inet_pton(family, address) for address in (source, destination)]
    ports = [struct.pack("!H", port) for port in (sport, dport)]
    return nested(1, *map(attribute, kinds, ends)) + nested(
        2, attribute(1, bytes([protocol])), attribute(2, ports[0]), attribute(3, ports[1])
    )


def entry(
    source: str = CLIENT,
    destination: str = SERVER,
    *,
    reply: bytes | None = None,
    status: int = 0xE,
    timeout: int = 100,
    **more: bytes,
) -> Entry:
    values = {
        conntrack.TUPLE_ORIG: one_way(source, destination),
        conntrack.TUPLE_REPLY: reply or one_way(destination, source, 80, 4000),
        conntrack.STATUS: struct.pack("!I", status),
        conntrack.TIMEOUT: struct.pack("!I", timeout),
    }
    return Entry(2, values | {getattr(conntrack, name): value for name, value in more.items()})


def port(**more: object) -> PortConfig:
    given = {"id": PortId("p"), "server": ServerId("s"), "mac": "52:54:00:00:00:01", "ip": SERVER}
    return PortConfig(**{**given, "host": HostId("h"), "vtep": "10.99.0.11", **more})  # type: ignore[arg-type]


# --- whose they are ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "pairs", "source", "destination", "own"),
    [
        ((), (), CLIENT, SERVER, True),
        ((), (), SERVER, CLIENT, True),
        ((), (), CLIENT, "10.9.0.22", False),
        (("fd00::2",), (), "fd00::9", "fd00::2", True),
        (("fd00::2",), (), "fd00::9", "fd00::22", False),
        ((), ("10.50.0.0/16",), "10.50.3.4", CLIENT, True),
        ((), ("10.50.0.0/16",), "10.51.3.4", CLIENT, False),
        ((), ("fd00:50::/32",), "fd00:50:1::1", "fd00::1", True),
        ((), ("0.0.0.0/0",), "10.51.3.4", CLIENT, True),
        ((), ("0.0.0.0/0",), "fd00::1", "fd00::2", False),
    ],
)
def test_an_entry_is_a_ports_if_one_of_its_addresses_occurs(
    addresses: tuple[str, ...], pairs: tuple[str, ...], source: str, destination: str, own: bool
) -> None:
    wanted = port(addresses=addresses, allowed_pairs=tuple(AddressPair(cidr=c) for c in pairs))
    selector = Selector(Tracked.of(wanted, 7))
    assert selector.concerns(entry(source, destination)) is own


def test_a_translated_address_is_found_in_the_answers_tuple() -> None:
    translated = entry("10.1.1.1", "203.0.113.5", reply=one_way(SERVER, "10.1.1.1", 80, 4000))
    assert Selector(Tracked.of(port(), 7)).concerns(translated)


# --- what is asked of the other kernel -----------------------------------------------------------------


def asked(found: Entry, *, plain: bool = False) -> dict[int, bytes]:
    body = conntrack.put(found, 7, 300, plain=plain)
    assert body[0] == found.family
    return attributes(body[4:])


def test_only_what_may_be_set_of_the_status_is_and_a_short_time_is_made_longer() -> None:
    told = asked(entry(status=0xFFFF & ~0x30, timeout=5))
    assert told[conntrack.STATUS] == struct.pack("!I", 0xE)
    assert told[conntrack.TIMEOUT] == struct.pack("!I", 300)
    assert told[conntrack.ZONE] == struct.pack("!H", 7)
    assert asked(entry(timeout=432_000))[conntrack.TIMEOUT] == struct.pack("!I", 432_000)


def test_tcp_is_no_longer_judged_by_a_window_that_nobody_knows() -> None:
    flags = attribute(4, b"\x01\x00"), attribute(5, b"\x03\x00")
    told = asked(entry(PROTOINFO=nested(1, attribute(1, b"\x03"), *flags)))
    tcp = attributes(attributes(told[conntrack.PROTOINFO])[1])
    assert (tcp[1], tcp[4], tcp[5]) == (b"\x03", b"\x09\xff", b"\x0b\xff")


def test_other_protocols_are_told_as_they_are() -> None:
    sctp = nested(3, attribute(1, b"\x03"), attribute(2, b"\0\0\0\1"))
    assert asked(entry(PROTOINFO=sctp))[conntrack.PROTOINFO] == sctp


@pytest.mark.parametrize(
    ("status", "reply", "kind", "address", "port_number"),
    [
        (0x10, one_way(SERVER, "203.0.113.9", 80, 61000), conntrack.NAT_SRC, "203.0.113.9", 61000),
        (0x20, one_way("10.9.0.77", CLIENT, 8080, 4000), conntrack.NAT_DST, "10.9.0.77", 8080),
    ],
)
def test_translation_is_asked_for_again(
    status: int, reply: bytes, kind: int, address: str, port_number: int
) -> None:
    """The kernel derives it from what the tuples would have been without it."""
    told = asked(entry(reply=reply, status=0xE | status))
    assert told[conntrack.TUPLE_REPLY] == one_way(SERVER, CLIENT, 80, 4000)
    span = attributes(told[kind])
    assert span[1] == span[2] == socket.inet_aton(address)
    assert attributes(span[3]) == dict.fromkeys((1, 2), struct.pack("!H", port_number))
    plain = asked(entry(reply=reply, status=0xE | status), plain=True)
    assert plain[conntrack.TUPLE_REPLY] == reply
    assert kind not in plain


def test_what_belongs_to_helpers_and_counters_is_left_out() -> None:
    raw = conntrack.put(entry(), 7, 0) + attribute(5, b"ftp") + attribute(9, bytes(16)) + attribute(12, b"id")
    found = conntrack.decoded(raw, 7)
    assert found is not None
    assert set(found.values) == {1, 2, 3, 7}
    assert conntrack.decoded(raw, 8) is None


# --- on the way --------------------------------------------------------------------------------------


def test_what_is_sent_arrives() -> None:
    few = State(began=1, number=2, whole=False, records=(put_record(entry()),))
    many = State(began=1, number=1, whole=True, records=few.records * 1000)
    for state in (few, many, State(began=1, number=1, whole=True)):
        data = encode(state)
        assert data, "a port whose connections are carried always has something to say"
        assert decode(data) == state
    assert len(encode(many)) < 50_000
    arrived = entry_of(decode(encode(few)).records[0])
    assert arrived == entry()


def test_records_of_tomorrow_are_left_out() -> None:
    unknown = (77, 2, attribute(99, b"x"))
    assert entry_of(unknown) is None
    kind, family, packed = put_record(entry())
    assert entry_of((kind, family, packed + attribute(99, b"x"))) == entry()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NLCT",
        b"NLCT\x02\x00",
        b"NLCT\x01\x04",
        b"XXXX\x01\x00\x90",
        b"NLCT\x01\x00junk",
        b"NLCT\x01\x01junk",
    ],
)
def test_what_is_not_understood_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        decode(data)


def test_damage_never_does_worse_than_to_be_refused() -> None:
    translated = entry(reply=one_way(SERVER, "203.0.113.9", 80, 61000), status=0x1E)
    records = (put_record(entry()), put_record(translated))
    state = encode(State(began=1, number=1, whole=True, records=records))
    for at in range(len(state)):
        for value in (0, 255, os.urandom(1)[0]):
            try:
                told = decode(state[:at] + bytes([value]) + state[at + 1 :])
            except Refused:
                continue
            for record in told.records:
                found = entry_of(record)
                if found is not None:
                    Selector(Tracked.of(port(), 7)).concerns(found)
                    conntrack.put(found, 7, 300)


# --- events ------------------------------------------------------------------------------------------


def event(kind: str, **more: bytes) -> Event:
    return Event(entry(**more), destroyed=kind == "end", born=kind == "new")


def test_events_of_one_connection_become_one_record() -> None:
    tcp = nested(1, attribute(1, b"\x03"))
    update = Event(Entry(2, {1: entry().values[1], conntrack.MARK: b"\0\0\0\1"}), destroyed=False)
    (record,) = summed_up([event("new", PROTOINFO=tcp), update])
    found = entry_of(record)
    assert found is not None
    assert found.values[conntrack.PROTOINFO] == tcp
    assert found.values[conntrack.MARK] == b"\0\0\0\1"


@pytest.mark.parametrize(
    ("kinds", "records"),
    [
        ([], []),
        (["new"], [PUT]),
        (["change", "change"], [PUT]),
        (["end"], [DELETE]),
        (["new", "change", "end"], [DELETE]),
        (["end", "new"], [DELETE, PUT]),
        (["end", "new", "end"], [DELETE]),
    ],
)
def test_what_events_sum_up_to(kinds: list[str], records: list[int]) -> None:
    assert [record[0] for record in summed_up(event(kind) for kind in kinds)] == records


# --- what could not be taken up ------------------------------------------------------------------------


def test_single_odd_entries_are_told_and_a_full_table_is_an_error() -> None:
    odd = [Rejected(0, errno.EEXIST), Rejected(4, errno.EINVAL), Rejected(5, errno.EEXIST)]
    (words,) = problems_with(odd, PortId("p"), 10)
    assert "3 of 10" in words and "EEXIST: 2, EINVAL: 1" in words
    assert problems_with([], PortId("p"), 10) == ()
    with pytest.raises(Unavailable, match="1 connections") as caught:
        problems_with([*odd, Rejected(6, errno.ENOMEM)], PortId("p"), 10)
    assert "nf_conntrack_max" in caught.value.remedy


async def test_a_kernel_without_it_says_so_and_carries_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nahtlos.physical.network.tracking.part.EVENTS", tmp_path / "absent")
    part = ConnectionTracking(tmp_path)
    assert (await part.capabilities())["connection tracking"].startswith("missing: ")
    await part.init()
    assert await part.begin(PortId("p")) == b""
