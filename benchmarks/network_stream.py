"""One end of a measured connection, as a process inside a namespace.

python -m benchmarks.network_stream receive ADDRESS PORT          prints bytes and seconds, then ends
python -m benchmarks.network_stream send ADDRESS PORT SECONDS     as fast as it can; prints TCP's retransmits
python -m benchmarks.network_stream answer ADDRESS PORT           returns every datagram, until it is killed
python -m benchmarks.network_stream ask ADDRESS PORT COUNT        prints the median round trip in microseconds
"""

import select
import socket
import statistics
import struct
import sys
import time

CHUNK = 1 << 18
WARM_SECONDS = 0.3
SILENCE_SECONDS = 20.0
TOTAL_RETRANSMITS = 100
"""Offset of tcpi_total_retrans in struct tcp_info."""


def receive(address: str, port: int) -> str:
    """What arrives after a warm-up."""
    buffer = bytearray(CHUNK)
    with socket.create_server((address, port), family=_family(address)) as listening:
        listening.settimeout(SILENCE_SECONDS)
        print("ready", flush=True)
        connection, _ = listening.accept()
    with connection:
        connection.settimeout(SILENCE_SECONDS)
        begun = time.monotonic() + WARM_SECONDS
        count, first, last = 0, 0.0, 0.0
        while size := connection.recv_into(buffer):
            now = time.monotonic()
            if now < begun:
                continue
            if not first:
                first = now
            else:
                count += size
            last = now
    return f"{count} {last - first}"


def send(address: str, port: int, seconds: float) -> str:
    data = bytes(CHUNK)
    with socket.create_connection((address, port), SILENCE_SECONDS) as connection:
        deadline = time.monotonic() + WARM_SECONDS + seconds
        while time.monotonic() < deadline:
            connection.sendall(data)
        return str(retransmits(connection))


def flow(address: str, port: int) -> str:
    data = bytes(CHUNK)
    with socket.create_connection((address, port), SILENCE_SECONDS) as connection:
        while not select.select([sys.stdin], [], [], 0)[0]:
            connection.sendall(data)
        return str(retransmits(connection))


def retransmits(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("I", info, TOTAL_RETRANSMITS)[0])


def answer(address: str, port: int) -> str:
    with socket.socket(_family(address), socket.SOCK_DGRAM) as answering:
        answering.bind((address, port))
        print("ready", flush=True)
        while True:
            data, asker = answering.recvfrom(2048)
            answering.sendto(data, asker)


def ask(address: str, port: int, count: int) -> str:
    times: list[float] = []
    with socket.socket(_family(address), socket.SOCK_DGRAM) as asking:
        asking.settimeout(SILENCE_SECONDS)
        asking.connect((address, port))
        for number in range(count):
            began = time.perf_counter()
            asking.send(struct.pack("!Q", number))
            asking.recv(2048)
            times.append(time.perf_counter() - began)
    return str(statistics.median(times) * 1e6)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    what, where, number, *rest = sys.argv[1:]
    match what:
        case "receive":
            print(receive(where, int(number)))
        case "send":
            print(send(where, int(number), float(rest[0])))
        case "flow":
            print(flow(where, int(number)))
        case "answer":
            print(answer(where, int(number)))
        case "ask":
            print(ask(where, int(number), int(rest[0])))
        case _:
            sys.exit(f"unknown: {what}")
