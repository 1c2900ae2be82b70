"""A server with a real TCP stack: frames carried between a host's tap and one inside the server's namespace.

Runs as a process of its own (`python -m benchmarks.network_pump FD`) and is told by the messages of
`network_load` where the server runs. While it runs nowhere nothing is carried: what its stack sends waits in
the namespace's tap, what comes for it in the host's. Its clock alone goes on, as a real server's would not.
"""

import fcntl
import os
import select
import socket
import sys

import msgspec

from benchmarks import network_load as load

TUNSETOFFLOAD = 0x400454D0
CHECKSUMS_AND_SEGMENTS = 0x01 | 0x02 | 0x04
BATCH = 64
LONGEST = 1 << 17


class Pump:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.epoll()
        self._poll.register(control.fileno(), select.EPOLLIN)
        self._inside = self._outside = self._waiting = -1

    def serve(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._control.fileno():
                    if not self._obey():
                        return
                elif fd == self._waiting:
                    self._spoil()
                elif fd == self._outside:
                    carry(fd, self._inside)
                elif fd == self._inside and self._outside >= 0:
                    carry(fd, self._outside)

    def _obey(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
        if not data:
            return False
        match msgspec.json.decode(data, type=load.Message):
            case load.Outside():
                self._inside = self._prepared(fds[0])
            case load.Wait():
                self._waiting = self._prepared(fds[0])
                self._poll.register(self._waiting, select.EPOLLIN)
            case load.Run():
                self._outside = self._prepared(fds[0])
                self._poll.register(self._outside, select.EPOLLIN)
                self._poll.register(self._inside, select.EPOLLIN)
            case load.Stop():
                self._poll.unregister(self._inside)
                self._forget(self._outside)
                self._outside = -1
            case message:
                raise ValueError(f"a pump does not understand {message}")
        self._control.send(b"{}")
        return True

    def _prepared(self, fd: int) -> int:
        """As a VMM sets up a tap for a guest that takes whole segments."""
        os.set_blocking(fd, False)
        fcntl.ioctl(fd, TUNSETOFFLOAD, CHECKSUMS_AND_SEGMENTS)
        return fd

    def _spoil(self) -> None:
        os.read(self._waiting, LONGEST)
        self._forget(self._waiting)
        self._waiting = -1

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        os.close(fd)


def carry(source: int, target: int) -> None:
    """Frames with their virtio-net header, as they are. What a full ring refuses is lost, as on a wire."""
    for _ in range(BATCH):
        try:
            frame = os.read(source, LONGEST)
        except BlockingIOError:
            return
        try:
            os.write(target, frame)
        except OSError:
            continue


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control_socket:
        Pump(control_socket).serve()
