"""Whether anybody has changed a qdisc, class or filter, or a device that frames are redirected to.

Owns a socket that the kernel tells of such changes, so that a reconcile need not read thousands of qdiscs to
find them as they were. It is not trusted for ever: now and then the answer is yes in any case. Decides
nothing.
"""

import socket
import struct
import time

from nahtlos.physical.network import netlink
from nahtlos.physical.network.links import IFLA_NAME

GROUPS = 0x1 | 0x8
"""Links, traffic control."""
BUFFER = 1 << 20
LINK_KINDS = (netlink.RTM_NEWLINK, netlink.RTM_DELLINK)
ANEW_SECONDS = 60.0


class Watch:
    """Of one namespace: that of the thread which asks first."""

    def __init__(self, prefix: str) -> None:
        """`prefix` is how the names of devices begin that count."""
        self._prefix = prefix.encode()
        self._hearing: socket.socket | None = None
        self._quiet_since = 0.0

    def stirred(self) -> bool:
        """Something may have changed since `settle` was last called."""
        if self._hearing is None:
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._hearing = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            self._hearing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._hearing.bind((0, GROUPS))
        if self._heard(self._hearing):
            self._quiet_since = 0.0
        return time.monotonic() - self._quiet_since > ANEW_SECONDS

    def settle(self, looked_at: float) -> None:
        """Everything was found as it should be, or put right, by somebody who had begun to look at
        `looked_at`. Call `stirred` before looking: what is told meanwhile counts next time."""
        self._quiet_since = looked_at

    def _heard(self, hearing: socket.socket) -> bool:
        heard = False
        while True:
            try:
                data = hearing.recv(1 << 16)
            except BlockingIOError:
                return heard
            except OSError:
                heard = True  # more was told than could be kept
                continue
            heard = heard or any(self._counts(kind, body) for kind, _, _, body in netlink.messages(data))

    def _counts(self, kind: int, body: bytes) -> bool:
        if kind not in LINK_KINDS:
            return True
        (family,) = struct.unpack_from("B", body)
        name = netlink.attributes(body[16:]).get(IFLA_NAME, b"")
        return family == socket.AF_UNSPEC and name.startswith(self._prefix)

    def close(self) -> None:
        if self._hearing is not None:
            self._hearing.close()
            self._hearing = None
