"""A sender and a receiver of TCP or UDP, each a process of its own, that only count.

    python -m benchmarks.bandwidth_load receive tcp|udp ADDRESS PORT SECONDS
    python -m benchmarks.bandwidth_load send    tcp|udp ADDRESS PORT SECONDS [BITS_PER_SECOND]

The receiver says `ready`, then what it got as JSON: bytes of payload in each hundredth of a second. UDP is
sent at the given rate, many datagrams to a call where the rate needs it; TCP as fast as it goes.
"""

import json
import socket
import struct
import sys
import time

BIN = 0.01
TCP_PAYLOAD, UDP_PAYLOAD, FRAME = 1448, 1472, 1514
"""Bytes in a full frame of 1500: payload (TCP with timestamps), and all of it."""
CHUNK = 1 << 16
TURN = 0.002
MANY, MOST_DATAGRAMS = 100_000_000, 40
"""From this rate on so many at most are sent in one piece that is cut later."""
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
CONNECTED_WITHIN = 5.0


def receive(kind: str, address: str, port: int, seconds: float) -> dict[str, object]:
    with socket.socket(socket.AF_INET, _type(kind)) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((address, port))
        if kind == "tcp":
            opened.listen(1)
        else:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            opened.setsockopt(SOL_UDP, UDP_GRO, 1)
        print("ready", flush=True)
        if kind == "udp":
            return _count(opened, seconds)
        opened.settimeout(CONNECTED_WITHIN)
        connection, _ = opened.accept()
        with connection:
            return _count(connection, seconds)


def _count(source: socket.socket, seconds: float) -> dict[str, object]:
    began = time.monotonic()
    bins = [0] * (int(seconds / BIN) + 1)
    source.settimeout(0.2)
    buffer = bytearray(CHUNK * 4)
    while (now := time.monotonic()) < began + seconds:
        try:
            got = source.recv_into(buffer)
        except TimeoutError:
            continue
        now = time.monotonic()
        if not got:
            break
        bins[min(len(bins) - 1, int((now - began) / BIN))] += got
    return {"began": began, "ended": min(now, began + seconds), "bins": bins}


def send(kind: str, address: str, port: int, seconds: float, rate: int) -> None:
    with socket.socket(socket.AF_INET, _type(kind)) as opened:
        opened.settimeout(CONNECTED_WITHIN)
        opened.connect((address, port))
        until = time.monotonic() + seconds
        if kind == "udp":
            _send_datagrams(opened, until, rate)
        else:
            _send_stream(opened, until)


def _send_stream(opened: socket.socket, until: float) -> None:
    opened.settimeout(0.5)
    data = bytes(CHUNK)
    while time.monotonic() < until:
        try:
            opened.send(data)
        except TimeoutError:
            continue
        except ConnectionError:
            return


def _send_datagrams(opened: socket.socket, until: float, rate: int) -> None:
    """In turns of 2 ms, each as many as are due."""
    opened.setblocking(True)
    per_second = rate / 8 / FRAME
    began, sent = time.monotonic(), 0
    while (now := time.monotonic()) < until:
        due = int((now - began) * per_second) - sent
        while due > 0:
            several = min(due, MOST_DATAGRAMS if rate > MANY else 1)
            _send_several(opened, several)
            sent += several
            due -= several
        time.sleep(TURN)


def _send_several(opened: socket.socket, several: int) -> None:
    segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", UDP_PAYLOAD))]
    try:
        opened.sendmsg([bytes(UDP_PAYLOAD * several)], segment)
    except (ConnectionRefusedError, BlockingIOError):
        return  # nobody listens any more


def _type(kind: str) -> socket.SocketKind:
    return socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM


def main(arguments: list[str]) -> None:
    act, kind, address, port, seconds, *rate = arguments
    if act == "receive":
        print(json.dumps(receive(kind, address, int(port), float(seconds))), flush=True)
    else:
        send(kind, address, int(port), float(seconds), int(rate[0]) if rate else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
