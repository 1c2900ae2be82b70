"""A machine with a real TCP stack behind its tap: a namespace whose own tap is joined to the host's by hand,
so that segments of 64 KiB pass through rings, tunnels and returns as they do with a VMM.

Owns the namespaces `nlt-stream<n>-*`.
"""

import hashlib
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Sequence
from fcntl import ioctl

from handover_play import Machine

from nahtlos.lab import topology
from nahtlos.physical.network import tap

TUNSETOFFLOAD, OFFLOADS = 0x400454D0, 0x1 | 0x2 | 0x4
"""Checksums and TCP segments of both families may be left to the reader."""
BLOCK = os.urandom(1 << 18)
TOTAL_RETRANSMITS = 100
"""Offset in struct tcp_info."""


class StreamMachine(Machine):
    def __init__(self, number: int, mtu: int) -> None:
        super().__init__(number)
        self.namespace = f"nlt-stream{os.getpid() % 10000}-{number}"
        self.largest = 0
        """Bytes of the longest frame that came from the host's tap."""
        _run("ip", "netns", "add", self.namespace)
        self._tap = topology.within(self.namespace, lambda: tap.open_tap("eth0"))
        ioctl(self._tap, TUNSETOFFLOAD, OFFLOADS)
        _run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", inside=self.namespace)
        for command in (
            f"link set eth0 address {self.mac} mtu {mtu} txqueuelen 10000 up",
            f"addr add {self.ip}/24 dev eth0",
            "link set lo up",
        ):
            _run("ip", "-n", self.namespace, *command.split())
        self.streams: list[Stream] = []
        self._gone = threading.Event()
        self._out = threading.Thread(target=self._send_on, name="stream-out")
        self._out.start()

    def run_on(self, fds: Sequence[int]) -> None:
        for fd in fds:
            ioctl(fd, TUNSETOFFLOAD, OFFLOADS)
        super().run_on(fds)

    def _read(self, fds: Sequence[int]) -> None:
        while not self._stop.is_set():
            for fd in select.select(list(fds), [], [], 0.02)[0]:
                for view in tap.frames(fd, 64):
                    self.largest = max(self.largest, len(view))
                    os.write(self._tap, view)

    def _send_on(self) -> None:
        """Only while the machine runs: what it sends meanwhile waits in its own ring."""
        while not self._gone.is_set():
            if not select.select([self._tap], [], [], 0.02)[0]:
                continue
            with self._mouth:
                if self._fds:
                    for view in tap.frames(self._tap, 64):
                        os.write(self._fds[0], view)
                    continue
            self._gone.wait(0.002)

    def remove(self) -> None:
        for stream in self.streams:
            stream.close()
        self.stop()
        self._gone.set()
        self._out.join(5)
        os.close(self._tap)
        _run("ip", "netns", "del", self.namespace)


class Stream:
    """Bytes without end from one machine to another by TCP; both ends keep a digest."""

    def __init__(self, sender: StreamMachine, receiver: StreamMachine, port: int) -> None:
        listening = topology.within(receiver.namespace, lambda: socket.create_server((receiver.ip, port)))
        self._out = topology.within(
            sender.namespace, lambda: socket.create_connection((receiver.ip, port), timeout=10)
        )
        self._in = listening.accept()[0]
        listening.close()
        self._in.settimeout(10)
        sender.streams.append(self)
        self.sent = self.received = 0
        self._end = threading.Event()
        self._digests: dict[str, str] = {}
        self._threads = [threading.Thread(target=t, name="stream") for t in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def _write(self) -> None:
        digest, number = hashlib.blake2b(), 0
        while not self._end.is_set():
            block = struct.pack("Q", number) + BLOCK[number % 999 :]
            try:
                self._out.sendall(block)
            except OSError:
                return  # `finish` will miss the digest
            digest.update(block)
            self.sent, number = self.sent + len(block), number + 1
        self._out.shutdown(socket.SHUT_WR)
        self._digests["sent"] = digest.hexdigest()

    def _read(self) -> None:
        digest = hashlib.blake2b()
        while data := self._receive():
            digest.update(data)
            self.received += len(data)
        self._digests["received"] = digest.hexdigest()

    def _receive(self) -> bytes:
        try:
            return self._in.recv(1 << 20)
        except OSError:
            return b""

    @property
    def again(self) -> int:
        """Segments sent again so far."""
        info = self._out.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("I", info, TOTAL_RETRANSMITS)[0])

    def finish(self) -> int:
        """Segments sent again. AssertionError if the other end did not get exactly what was sent."""
        self._end.set()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "the connection hangs"
        again = self.again
        assert self._digests["sent"] == self._digests["received"]
        assert self.sent == self.received > 0
        self.close()
        return again

    def close(self) -> None:
        self._end.set()
        self._out.close()
        self._in.close()


def _run(*argv: str, inside: str = "") -> None:
    enter = ("nsenter", f"--net=/run/netns/{inside}") if inside else ()
    subprocess.run([*enter, *argv], check=True, capture_output=True, timeout=10)
