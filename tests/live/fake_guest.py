"""A guest's services without a guest, with faults on request: what the probe's tests measure.

Runs as a process of its own (`python fake_guest.py ADDRESS FAULTS-JSON`), one per address. Faults by the
number of the datagram or request: lose, double, swap, silence (seconds after which nothing is answered for
how long), reboot_after, break_line, fail_page.
"""

import asyncio
import json
import struct
import sys
import time
from typing import Any


class Guest:
    def __init__(self, address: str, faults: dict[str, Any]) -> None:
        self.address = address
        self.faults = faults
        self.began = time.monotonic()
        self.pages = 0
        self.lines = 0

    def age(self) -> float:
        return time.monotonic() - self.began

    def boot(self) -> int:
        after = self.faults.get("reboot_after")
        return 2 if after is not None and self.age() > after else 1

    def silent_for(self) -> float:
        start, length = self.faults.get("silence", (1e9, 0))
        return max(0.0, start + length - self.age()) if start <= self.age() else 0.0


class Echo(asyncio.DatagramProtocol):
    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.held: bytes | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        number = struct.unpack_from("<I", data, 16)[0]
        faults, send = self.guest.faults, self.transport.sendto
        if number in faults.get("lose", ()):
            return
        if self.guest.silent_for():
            asyncio.get_running_loop().call_later(self.guest.silent_for(), send, data, addr)
            return
        if number in faults.get("swap", ()):
            self.held = data
            return
        send(data, addr)
        if number in faults.get("double", ()):
            send(data, addr)
        if self.held is not None:
            send(self.held, addr)
            self.held = None


class Beat(asyncio.DatagramProtocol):
    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if data == b"subscribe" and self.task is None:
            self.task = asyncio.get_running_loop().create_task(self.beat(addr))

    async def beat(self, addr: Any) -> None:
        number = 0
        while True:
            number += 1
            beat = (number, time.monotonic_ns(), self.guest.boot(), number // 10, 0)
            self.transport.sendto(struct.pack("<QQQQQ", *beat), addr)
            await asyncio.sleep(0.01)


async def serve(address: str, faults: dict[str, Any]) -> None:
    guest = Guest(address, faults)
    loop = asyncio.get_running_loop()

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        boot = f"boot-{guest.boot()}"
        if request == b"/status":
            memory = {"verified_pages": int(guest.age() * 1000), "errors": 0, "mib": 1}
            disk = {"acknowledged": 1, "errors": 0}
            body = json.dumps({"boot_id": boot, "memory": memory, "disk": disk}).encode()
        else:
            guest.pages += 1
            body = f"ok {boot}\n".encode()
        if guest.pages not in faults.get("fail_page", ()) or request == b"/status":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            guest.lines += 1
            if guest.lines in faults.get("break_line", ()):
                writer.transport.abort()
                return
            writer.write(line)
        writer.close()

    await loop.create_datagram_endpoint(lambda: Echo(guest), local_addr=(address, 7))
    await loop.create_datagram_endpoint(lambda: Beat(guest), local_addr=(address, 9))
    http = await asyncio.start_server(page, address, 80)
    await asyncio.start_server(lines, address, 7000)
    await http.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], json.loads(sys.argv[2])))
