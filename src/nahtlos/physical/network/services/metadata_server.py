"""Tells servers of one network about themselves: HTTP at 169.254.169.254 and fe80::a9fe:a9fe, port 80; and
advertises their IPv6 routers.

A program of its own that outlives the agent, run inside the namespace of a network's services. It knows the
network from one file, read again when it is another one, and who asks from the sender's address, which a
server cannot forge; from an IPv6 address it has not been told of by the MAC that the kernel spoke to. Uses
nothing but Python's own library, to be small and quick to start. Never writes, and answers GET only.

    python -m nahtlos.physical.network.services.metadata_server FILE ADDRESS...
"""

import json
import os
import selectors
import socket
import struct
import sys
import time

from nahtlos.physical.network.services.advertiser import Advertiser
from nahtlos.physical.network.services.metadata_pages import Record, page, pages

PORT = 80
DEADLINE = 5.0
LOOK_SECONDS = 2.0
"""How often the file is looked at though nobody asks."""
LARGEST_REQUEST = 8192
CONNECTIONS = 256
INTERFACE = "eth0"


# --- who asks ----------------------------------------------------------------------------------------


class Directory:
    """The network's servers by address and by MAC, and its routers, as the file has them now."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._by_address: dict[str, tuple[Record, Record]] = {}
        self._by_mac: dict[str, tuple[Record, Record]] = {}
        self.routers: list[Record] = []

    def refresh(self) -> None:
        state = os.stat(self._path)  # noqa: PTH116 - pathlib would add to what this process takes
        if (state.st_ino, state.st_mtime_ns) == self._seen:
            return
        with open(self._path, encoding="utf-8") as file:  # noqa: PTH123
            content = json.load(file)
        here = [(r, n) for r in content["servers"] for n in r["nics"] if n["network"] == content["network"]]
        self._by_address = {a.split("/")[0]: (r, n) for r, n in here for a in n["addresses"]}
        self._by_mac = {n["mac"]: (r, n) for r, n in here}
        self.routers = content["routers"]
        self._seen = (state.st_ino, state.st_mtime_ns)

    def find(self, address: str) -> tuple[Record, Record] | None:
        self.refresh()
        known = self._by_address.get(address)
        if known is None and ":" in address:
            known = self._by_mac.get(neighbour_mac(address))
        return known


def neighbour_mac(address: str) -> str:
    """MAC of a neighbour the kernel has just spoken to (IPv6); empty if it knows none."""
    destination = socket.inet_pton(socket.AF_INET6, address)
    index = socket.if_nametoindex(INTERFACE)
    body = struct.pack("BxxxiHBB", socket.AF_INET6, index, 0, 0, 0) + struct.pack("HH", 20, 1) + destination
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(1.0)
        netlink.send(struct.pack("IHHII", 16 + len(body), 30, 1, 1, 0) + body)  # RTM_GETNEIGH, of this one
        answer = netlink.recv(4096)
    length, kind = struct.unpack_from("IH", answer)
    offset = 28
    while kind == 28 and offset + 4 <= length:
        size, name = struct.unpack_from("HH", answer, offset)
        if name == 2:
            return answer[offset + 4 : offset + size].hex(":")
        offset += (max(size, 4) + 3) & ~3
    return ""


# --- HTTP --------------------------------------------------------------------------------------------


class Connection:
    """One question and its answer."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket, self.peer = sock, peer
        self.deadline = time.monotonic() + DEADLINE
        self.request, self.answer = b"", b""

    def take(self, directory: Directory) -> bool:
        """Reads on. Whether there is an answer now."""
        data = self.socket.recv(LARGEST_REQUEST)
        self.request += data
        if not data or len(self.request) > LARGEST_REQUEST:
            raise ConnectionError("it ends without a question")
        if b"\r\n\r\n" in self.request:
            self.answer = answer(directory, self.request, self.peer)
        return bool(self.answer)

    def give(self) -> bool:
        """Sends on. Whether all is sent."""
        self.answer = self.answer[self.socket.send(self.answer) :]
        return not self.answer


def answer(directory: Directory, request: bytes, peer: str) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.split(b" ", 1)[0].split(b"?", 1)[0].decode("latin-1")
    if method != b"GET":
        return _response(405, "only GET\n")
    try:
        found = directory.find(peer)
    except (OSError, ValueError, KeyError) as error:
        return _response(503, f"{error}\n")
    text = page(pages(*found), path) if found is not None else None
    return _response(404, "not found\n") if text is None else _response(200, text)


def _response(code: int, text: str) -> bytes:
    reason = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[code]
    body = text.encode()
    head = f"HTTP/1.1 {code} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
    return (head + "Connection: close\r\n\r\n").encode() + body


# --- the loop ----------------------------------------------------------------------------------------


class Server:
    def __init__(self, directory: Directory, advertiser: Advertiser | None) -> None:
        self._directory = directory
        self._advertiser = advertiser
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, Connection] = {}

    def listen(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        scope = socket.if_nametoindex(INTERFACE) if address.startswith("fe80:") else 0
        listener.bind((address, PORT, 0, scope) if family == socket.AF_INET6 else (address, PORT))
        listener.listen(128)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        if self._advertiser is not None:
            self._selector.register(self._advertiser.socket, selectors.EVENT_READ)
        while True:
            events = self._selector.select(LOOK_SECONDS)
            for key, _ in events:
                self._ready(key.fileobj)
            self._end_late()
            if self._advertiser is not None:
                self._advertise(self._advertiser)

    def _advertise(self, advertiser: Advertiser) -> None:
        try:
            self._directory.refresh()
            advertiser.advertise(self._directory.routers)
        except (OSError, ValueError, KeyError) as error:
            print(f"routers are not advertised: {error}", file=sys.stderr, flush=True)

    def _ready(self, ready: object) -> None:
        if not isinstance(ready, socket.socket):
            return
        if self._advertiser is not None and ready is self._advertiser.socket:
            self._advertiser.heard()
        elif ready.fileno() in self._connections:
            self._go_on(self._connections[ready.fileno()])
        else:
            self._accept(ready)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except OSError:
            return  # it has gone again
        if len(self._connections) >= CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._connections[sock.fileno()] = Connection(sock, str(peer[0]).partition("%")[0])
        self._selector.register(sock, selectors.EVENT_READ)

    def _go_on(self, connection: Connection) -> None:
        try:
            if not connection.answer:
                if connection.take(self._directory):
                    self._selector.modify(connection.socket, selectors.EVENT_WRITE)
            elif connection.give():
                self._end(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()

    def _end_late(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._connections.values() if c.deadline < now]:
            self._end(connection)


def main(path: str, addresses: list[str]) -> None:
    with_ipv6 = any(":" in address for address in addresses)
    server = Server(Directory(path), Advertiser(INTERFACE) if with_ipv6 else None)
    for address in addresses:
        server.listen(address)
    server.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
