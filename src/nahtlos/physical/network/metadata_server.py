"""Tells servers of one network about themselves: HTTP at 169.254.169.254 and fe80::a9fe:a9fe, port 80.

A program of its own that outlives the agent, run inside the namespace of a network's services. It knows the
network's servers from one file, read again when it is another one, and who asks from the sender's address,
which a server cannot forge; from an IPv6 address it has not been told of (link-local, made by other rules)
by the MAC that the kernel spoke to. Uses nothing but Python's own library, to be small and quick to start.
Never writes, and answers GET only.

    python metadata_server.py FILE ADDRESS...
"""

import asyncio
import ipaddress
import json
import os
import socket
import struct
import sys
from typing import Any

PORT = 80
DEADLINE = 10.0
LARGEST_REQUEST = 8192
CONNECTIONS = 256
INTERFACE = "eth0"
VERSIONS = ("latest", "2009-04-04")
Record = dict[str, Any]


# --- what there is to tell ---------------------------------------------------------------------------


def pages(record: Record, nic: Record) -> dict[str, str]:
    """Every page of one server by its path, seen from interface `nic`."""
    facts = meta_data(record, nic)
    config = network_config(record["nics"])
    found: dict[str, str] = {}
    for version in VERSIONS:
        found |= {f"/{version}/meta-data/{name}": value for name, value in facts.items()}
        found[f"/{version}/network-config"] = config
        if record.get("user_data"):
            found[f"/{version}/user-data"] = record["user_data"]
    found |= {f"/nocloud/{name}": text for name, text in seed(record).items()}
    return found


def meta_data(record: Record, nic: Record) -> dict[str, str]:
    """EC2's names for what is known of a server."""
    addresses = [a.split("/")[0] for a in nic["addresses"]]
    first = {family: next((a for a in addresses if (":" in a) == (family == 6)), "") for family in (4, 6)}
    named = {"local-ipv4": first[4], "ipv6": first[6]}
    return {
        "instance-id": record["server"],
        "hostname": record["server"],
        "local-hostname": record["server"],
        "mac": nic["mac"],
        **{name: value for name, value in named.items() if value},
        "public-keys": "",
    }


def seed(record: Record) -> dict[str, str]:
    """The files of a NoCloud seed. JSON is YAML."""
    name = record["server"]
    return {
        "meta-data": json.dumps({"instance-id": name, "local-hostname": name}, indent=1) + "\n",
        "user-data": record.get("user_data") or "#cloud-config\n{}\n",
        "vendor-data": "",
        "network-config": network_config(record["nics"]),
    }


def network_config(nics: list[Record]) -> str:
    """Version 2, interfaces named by their MAC. The first one's way out is preferred."""
    ethernets = {f"nic{number}": _ethernet(nic, 100 * (number + 1)) for number, nic in enumerate(nics)}
    return json.dumps({"version": 2, "ethernets": ethernets}, indent=1) + "\n"


def _ethernet(nic: Record, metric: int) -> Record:
    routes = [
        {"to": "::/0" if ":" in gateway else "0.0.0.0/0", "via": gateway, "metric": metric}
        for gateway in nic["gateways"]
    ]
    return {
        "match": {"macaddress": nic["mac"]},
        "mtu": nic["mtu"],
        "dhcp4": False,
        "dhcp6": False,
        "addresses": nic["addresses"],
        "nameservers": {"addresses": nic["name_servers"], "search": [nic["domain"]]},
        **({"routes": routes} if routes else {}),
    }


def page(found: dict[str, str], path: str) -> str | None:
    """A page, or the list of what is below `path`; None if there is neither."""
    path = "/" + path.strip("/")
    if path in found and not (path.endswith("/public-keys") and not found[path]):
        return found[path]
    if path in found:
        return ""
    below = path.rstrip("/") + "/"
    names = {name[len(below) :] for name in found if name.startswith(below)}
    if not names:
        return None
    entries = sorted({first + ("/" if rest else "") for first, _, rest in (n.partition("/") for n in names)})
    return "\n".join(entries)


# --- who asks ----------------------------------------------------------------------------------------


class Directory:
    """The network's servers by address and by MAC, as the file has them now."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._by_address: dict[str, tuple[Record, Record]] = {}
        self._by_mac: dict[str, tuple[Record, Record]] = {}

    def _refresh(self) -> None:
        state = os.stat(self._path)  # noqa: PTH116 - pathlib would double what this process takes
        if (state.st_ino, state.st_mtime_ns) == self._seen:
            return
        with open(self._path, encoding="utf-8") as file:  # noqa: PTH123
            content = json.load(file)
        here = [(r, n) for r in content["servers"] for n in r["nics"] if n["network"] == content["network"]]
        self._by_address = {a.split("/")[0]: (r, n) for r, n in here for a in n["addresses"]}
        self._by_mac = {n["mac"]: (r, n) for r, n in here}
        self._seen = (state.st_ino, state.st_mtime_ns)

    def find(self, address: str) -> tuple[Record, Record] | None:
        self._refresh()
        known = self._by_address.get(address)
        if known is None and ":" in address:
            known = self._by_mac.get(neighbour_mac(address))
        return known


def neighbour_mac(address: str) -> str:
    """MAC of a neighbour the kernel has just spoken to (IPv6); empty if it knows none."""
    destination = ipaddress.IPv6Address(address).packed
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


class Server:
    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._room, asyncio.timeout(DEADLINE):
                writer.write(self.answer(await reader.readuntil(b"\r\n\r\n"), writer))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # who asks and does not go on is let go
        finally:
            writer.close()

    def answer(self, request: bytes, writer: asyncio.StreamWriter) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?", 1)[0].decode("latin-1")
        if method != b"GET":
            return _response(405, "only GET\n")
        peer = str(writer.get_extra_info("peername")[0]).partition("%")[0]
        try:
            found = self._directory.find(peer)
        except (OSError, ValueError) as error:
            return _response(503, f"{error}\n")
        text = page(pages(*found), path) if found is not None else None
        return _response(404, "not found\n") if text is None else _response(200, text)


def _response(code: int, text: str) -> bytes:
    reason = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[code]
    body = text.encode()
    head = f"HTTP/1.1 {code} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
    return (head + "Connection: close\r\n\r\n").encode() + body


async def run(path: str, addresses: list[str]) -> None:
    server = Server(Directory(path))
    async with asyncio.TaskGroup() as listening:
        for address in addresses:
            scoped = f"{address}%{INTERFACE}" if address.startswith("fe80:") else address
            listener = await asyncio.start_server(
                server.serve, scoped, PORT, limit=LARGEST_REQUEST, reuse_address=True
            )
            listening.create_task(listener.serve_forever())


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2:]))
