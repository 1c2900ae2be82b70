"""What a gateway remembers of connections, on its way to another place.

Owns the form in which it travels: a mark and a version, then msgpack of (family, attributes as ctnetlink
writes them). A place refuses a version it does not know. Never decides when.
"""

import errno
import zlib

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.network.routing.namespaces import Namespaces
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import Entry

MARK = b"NLGW\x01"
REMEMBERED_SECONDS = 60
"""At least so long without a packet, wherever a connection stood: the way changes meanwhile."""


class Connections:
    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    def read(self, name: str) -> bytes:
        return encode(self._namespaces.within(name, _dump))

    def write(self, name: str, state: bytes) -> int:
        """How many are known now. What was known already stays as it is: it is used here, and so later than
        what was sent. Unavailable if the kernel would not take one of them."""
        entries = decode(state)
        return self._namespaces.within(name, lambda: _load(entries))


def encode(entries: list[Entry]) -> bytes:
    return MARK + zlib.compress(msgspec.msgpack.encode(entries), 1)


def decode(state: bytes) -> list[Entry]:
    if not state.startswith(MARK):
        raise Refused(
            "the gateway's connections were sent in a form that this host does not know",
            field="state",
            remedy="upgrade the older of the two hosts' agents, then move again",
        )
    try:
        return msgspec.msgpack.decode(zlib.decompress(state[len(MARK) :]), type=list[Entry])
    except (zlib.error, msgspec.DecodeError) as error:
        raise Refused(f"the gateway's connections arrived damaged: {error}", field="state") from error


def _dump() -> list[Entry]:
    with conntrack.Table() as table:
        return table.dump(0, lambda _: True)


def _load(entries: list[Entry]) -> int:
    with conntrack.Table() as table:
        known = {entry.key for entry in table.dump(0, lambda _: True)}
        new = [entry for entry in entries if entry.key not in known]
        refused = table.put([conntrack.put(entry, 0, REMEMBERED_SECONDS) for entry in new])
    failed = [r for r in refused if r.code not in (errno.EBUSY, errno.EEXIST)]  # known since a moment ago
    if failed:
        raise Unavailable(
            f"{len(failed)} of {len(entries)} connections could not be taken up (error {failed[0].code})",
            field="state",
        )
    return len(entries)
