"""Numbered frames to and from servers that may be stopped, moved and started, counted exactly.

Runs as a process of its own (`python -m benchmarks.network_load FD`), so that the load takes no turn from the
drivers under test. It is given descriptors of taps and sockets, and is told when a server runs and where; a
server that does not run neither sends nor takes. One loop, no threads: what it counts is what happened.

Every frame of a stream carries its number and that number inverted, so that checksums are the same for all.
"""

import array
import asyncio
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import pairwise
from typing import Self

import msgspec

from nahtlos.physical.network import tap

PORT = 9998
MAGIC = 0x6E6C
PAYLOAD = struct.Struct("!HHQQ")
INVERTED = (1 << 64) - 1
V4_PAYLOAD, V6_PAYLOAD = 42, 62
TICK_SECONDS = 0.001
BACKLOG_SECONDS = 0.05
"""A sender that was kept from its turn makes up for this much; the rest was never sent."""
ANSWER_SECONDS = 20.0
BATCH = 64


# --- messages ------------------------------------------------------------------------------------------


class Stream(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From one server (or the outside) to another. `head` is what precedes the payload on a tap, as hex;
    empty: the payload goes to `address` by the sender's socket."""

    number: int
    sender: str
    receiver: str
    head: str = ""
    address: str = ""


class Flow(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """`sender` sends `rate` frames a second, by turns over `streams`."""

    sender: str
    streams: tuple[int, ...]
    rate: float


class Run(msgspec.Struct, frozen=True, tag=True):
    """The server runs at the descriptor that comes with this."""

    server: str


class Wait(msgspec.Struct, frozen=True, tag=True):
    """A VMM that waits for the server opens the descriptor that comes with this: the next frame is taken
    and lost."""

    server: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    server: str


class Outside(msgspec.Struct, frozen=True, tag=True):
    """A UDP socket of a client outside, in the descriptor that comes with this."""

    name: str


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Every flow sends, while its sender runs."""


class Halt(msgspec.Struct, frozen=True, tag=True):
    """Nothing is sent any more; what is under way is still counted."""


class Report(msgspec.Struct, frozen=True, tag=True):
    pass


Message = Stream | Flow | Run | Wait | Stop | Outside | Begin | Halt | Report


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one stream."""

    sent: int
    lost: int
    duplicated: int
    reordered: int
    first_lost: tuple[int, ...] = ()


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    streams: dict[int, Count]
    strays: int
    """Frames of a stream that reached somebody else."""
    spoiled: int
    """Frames of a stream that a waiting VMM took."""
    seconds: float
    """Between `Begin` and `Halt`."""


def tally(sent: int, received: Iterable[int]) -> Count:
    numbers = list(received)
    seen = Counter(numbers)
    lost = sorted(set(range(sent)) - set(seen))
    return Count(
        sent=sent,
        lost=len(lost),
        duplicated=sum(times - 1 for times in seen.values()),
        reordered=sum(1 for a, b in pairwise(numbers) if b < a),
        first_lost=tuple(lost[:20]),
    )


# --- frames --------------------------------------------------------------------------------------------


def head(number: int, source: tuple[str, str], target: tuple[str, str]) -> str:
    """Ethernet, IP and UDP headers of stream `number` between (MAC, address) and (MAC, address), as hex."""
    macs = bytes.fromhex(target[0].replace(":", "") + source[0].replace(":", ""))
    sender, receiver = ip_address(source[1]), ip_address(target[1])
    length = 8 + PAYLOAD.size
    udp = struct.pack("!HHHH", PORT, PORT, length, 0)
    pseudo = sender.packed + receiver.packed + struct.pack("!II", length, 17)
    checksum = internet_checksum(pseudo + udp + payload(number, 0)) or 0xFFFF
    udp = udp[:6] + struct.pack("!H", checksum)
    if sender.version == 6:
        ip = struct.pack("!IHBB", 6 << 28, length, 17, 64) + sender.packed + receiver.packed
        return (macs + b"\x86\xdd" + ip + udp).hex()
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + sender.packed + receiver.packed
    ip = ip[:10] + struct.pack("!H", internet_checksum(ip)) + ip[12:]
    return (macs + b"\x08\x00" + ip + udp).hex()


def payload(number: int, sequence: int) -> bytes:
    return PAYLOAD.pack(MAGIC, number, sequence, INVERTED ^ sequence)


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def numbered(frame: bytes, offset: int) -> tuple[int, int] | None:
    """Stream and number of what begins at `offset` of `frame`; None if it is no frame of a stream."""
    if len(frame) < offset + PAYLOAD.size:
        return None
    magic, stream, sequence, inverted = PAYLOAD.unpack_from(frame, offset)
    return (stream, sequence) if magic == MAGIC and inverted == INVERTED ^ sequence else None


def numbered_frame(frame: bytes, start: int) -> tuple[int, int] | None:
    """The same of an Ethernet frame that begins at `start`."""
    kind = frame[start + 12 : start + 14]
    if kind == b"\x08\x00":
        return numbered(frame, start + V4_PAYLOAD)
    return numbered(frame, start + V6_PAYLOAD) if kind == b"\x86\xdd" else None


# --- the process ---------------------------------------------------------------------------------------


@dataclass
class _Sending:
    flow: Flow
    due: float = 0.0
    turn: int = 0


@dataclass
class _Place:
    """Where a server is plugged in now."""

    server: str
    fd: int
    header: int
    """Bytes before each frame; -1: a socket of the outside."""
    waits: bool = False
    socket: "socket.socket | None" = None
    """Of the outside."""


@dataclass
class _Load:
    control: socket.socket
    streams: dict[int, Stream] = field(default_factory=dict[int, Stream])
    heads: dict[int, bytes] = field(default_factory=dict[int, bytes])
    sent: dict[int, int] = field(default_factory=dict[int, int])
    received: dict[int, "array.array[int]"] = field(default_factory=dict[int, "array.array[int]"])
    flows: list[_Sending] = field(default_factory=list[_Sending])
    running: dict[str, _Place] = field(default_factory=dict[str, _Place])
    places: dict[int, _Place] = field(default_factory=dict[int, _Place])
    strays: int = 0
    spoiled: int = 0
    began: float = 0.0
    ended: float = 0.0
    sending: bool = False

    def serve(self) -> None:
        self.poll = select.epoll()
        self.poll.register(self.control.fileno(), select.EPOLLIN)
        while True:
            for fd, _ in self.poll.poll(TICK_SECONDS):
                if fd == self.control.fileno():
                    if not self._obey():
                        return
                elif fd in self.places:
                    self._take(self.places[fd])
            if self.sending:
                self._send(time.monotonic())

    def _obey(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 1)
        if not data:
            return False
        message: Message = msgspec.json.decode(data, type=Message)
        answer = b"{}"
        match message:
            case Stream():
                self.streams[message.number] = message
                self.heads[message.number] = bytes(10) + bytes.fromhex(message.head)
                self.sent[message.number], self.received[message.number] = 0, array.array("Q")
            case Flow():
                self.flows.append(_Sending(message))
            case Run():
                self._leave(message.server)
                self._enter(_Place(message.server, fds[0], tap.header_size(fds[0])))
            case Wait():
                self._enter(_Place(message.server, fds[0], tap.header_size(fds[0]), waits=True))
            case Outside():
                outside = socket.socket(fileno=fds[0])
                self._enter(_Place(message.name, fds[0], -1, socket=outside))
            case Stop():
                self._leave(message.server)
            case Begin():
                self.began, self.sending = time.monotonic(), True
                for sending in self.flows:
                    sending.due = self.began
            case Halt():
                self.ended, self.sending = time.monotonic(), False
            case Report():
                answer = msgspec.json.encode(self._counts())
        self.control.send(answer)
        return True

    def _enter(self, place: _Place) -> None:
        os.set_blocking(place.fd, False)
        self.places[place.fd] = place
        if not place.waits:
            self.running[place.server] = place
            now = time.monotonic()
            for sending in self.flows:
                if sending.flow.sender == place.server:
                    sending.due = now  # its time stood still while it did not run
        self.poll.register(place.fd, select.EPOLLIN)

    def _leave(self, server: str) -> None:
        place = self.running.pop(server, None)
        for gone in [p for p in self.places.values() if p is place or (p.server == server and p.waits)]:
            self._unplug(gone)

    def _unplug(self, place: _Place) -> None:
        self.poll.unregister(place.fd)
        del self.places[place.fd]
        os.close(place.fd)

    def _take(self, place: _Place) -> None:
        for _ in range(BATCH):
            try:
                frame = os.read(place.fd, 1 << 16)
            except (BlockingIOError, OSError):
                return
            found = numbered(frame, 0) if place.header < 0 else numbered_frame(frame, place.header)
            if place.waits:
                self.spoiled += found is not None
                self._unplug(place)
                return
            if found is None or found[0] not in self.streams:
                continue
            if self.streams[found[0]].receiver == place.server:
                self.received[found[0]].append(found[1])
            else:
                self.strays += 1

    def _send(self, now: float) -> None:
        for sending in self.flows:
            place = self.running.get(sending.flow.sender)
            if place is None:
                continue
            sending.due = max(sending.due, now - BACKLOG_SECONDS)
            while sending.due <= now:
                self._emit(place, sending.flow.streams[sending.turn % len(sending.flow.streams)])
                sending.turn += 1
                sending.due += 1 / sending.flow.rate

    def _emit(self, place: _Place, number: int) -> None:
        sequence = self.sent[number]
        data = payload(number, sequence)
        if place.socket is None:
            os.write(place.fd, self.heads[number] + data)
        else:
            place.socket.sendto(data, (self.streams[number].address, PORT))
        self.sent[number] = sequence + 1

    def _counts(self) -> Counts:
        return Counts(
            streams={n: tally(self.sent[n], self.received[n]) for n in self.streams},
            strays=self.strays,
            spoiled=self.spoiled,
            seconds=self.ended - self.began,
        )


# --- the handle of who measures --------------------------------------------------------------------------


class Load:
    """The process, from outside."""

    def __init__(self, module: str = "benchmarks.network_load") -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(its.fileno())],
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        mine.settimeout(ANSWER_SECONDS)
        self._control = mine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def tell(self, message: Message, *fds: int) -> bytes:
        """Returns when it has been done."""
        return await asyncio.to_thread(self.tell_now, message, *fds)

    def tell_now(self, message: Message, *fds: int) -> bytes:
        socket.send_fds(self._control, [msgspec.json.encode(message)], fds)
        answer = self._control.recv(1 << 18)
        if not answer:
            raise RuntimeError("the load has ended before its time")
        return answer

    async def counts(self) -> Counts:
        return msgspec.json.decode(await self.tell(Report()), type=Counts)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control_socket:
        _Load(control_socket).serve()
