"""What the kernel has of this driver's items, kept in step by the kernel's own notifications.

The first look reads every table; from then on the kernel tells of each change, whoever made it, and the next
look costs as much as has changed. If more was told than could be kept, everything is read again; so it is now
and then anyway, in case the kernel is silent about something. Decides nothing.
"""

import errno
import socket
import struct
import time
from collections.abc import Iterable

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import facts, kernel, links, netlink
from nahtlos.physical.network.device_names import OWNED
from nahtlos.physical.network.items import Item, PortFlood, Setting
from nahtlos.physical.network.kernel import Observed
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink

GROUPS = 0x1 | 0x4 | 0x10 | 0x100
"""Links, neighbours and forwarding entries, IPv4 addresses, IPv6 addresses."""
BUFFER, RECEIVE_BUFFER_FORCED = 8 << 20, 33
MANY_LINKS = 50
"""So many changed devices are read faster all at once."""
ANEW_SECONDS = 60.0
DEVICE, FLOOD = ("device",), ("flood",)


class View:
    """One namespace's tables. Not to be used from two threads at once."""

    def __init__(self) -> None:
        self._asking = Netlink()
        self._hearing: socket.socket | None = None
        self._read_at = 0.0
        self._links: dict[int, LinkInfo] = {}
        self._facts: dict[int, dict[facts.Key, facts.Fact]] = {}
        self._items: dict[tuple[int, facts.Key], Item] = {}

    def close(self) -> None:
        self._asking.close()
        self._stop_hearing()

    # --- looking -------------------------------------------------------------------------------------

    def look(self, settings: Iterable[Setting] = ()) -> Observed:
        """Everything that is ours, and the present values of `settings`."""
        if self._hearing is None or time.monotonic() - self._read_at > ANEW_SECONDS:
            self._look_anew()
        else:
            self._catch_up(self._hearing)
        values = (kernel.setting(s.path) for s in settings)
        items = frozenset((*self._items.values(), *(s for s in values if s is not None)))
        devices = {link.name: link for link in self._links.values()}
        return Observed(items=items, links=devices, taps=kernel.taps_of(devices))

    def _look_anew(self) -> None:
        """Listens first, so that nothing falls between."""
        self._stop_hearing()
        self._hearing = _listener()
        self._read_at = time.monotonic()
        self._links = {link.index: link for link in links.read_links(self._asking).values()}
        self._facts = {}
        for index, key, fact, _ in facts.read(self._asking):
            if fact is not None:
                self._facts.setdefault(index, {})[key] = fact
        self._make_all_items()

    def _stop_hearing(self) -> None:
        if self._hearing is not None:
            self._hearing.close()
            self._hearing = None

    def _catch_up(self, hearing: socket.socket) -> None:
        changed_links: set[int] = set()
        changed: set[tuple[int, facts.Key]] = set()
        try:
            for kind, body in _messages(hearing):
                if kind in facts.KINDS:
                    told = facts.decode(kind, body)
                    if told is not None and self._note(*told):
                        changed.add(told[:2])
                else:
                    changed_links.add(self._hear_of_link(kind, body))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise Unavailable(f"rtnetlink: {error}", field="network") from error
            self._look_anew()
            return
        if self._read_links(changed_links):
            self._make_all_items()
            return
        for index in changed_links:
            self._make_device_items(index)
        for index, key in changed:
            self._make_item(index, key)

    def _note(self, index: int, key: facts.Key, fact: facts.Fact | None, port: int) -> bool:
        """Whether it is another than it was. What is told to be gone from one port may have come to
        another before."""
        known = self._facts.get(index, {}).get(key)
        if fact == known or (fact is None and known is not None and known.port != port):
            return False
        if fact is None:
            del self._facts[index][key]
        else:
            self._facts.setdefault(index, {})[key] = fact
        return True

    def _hear_of_link(self, kind: int, body: bytes) -> int:
        """Its index; what it is like now is asked for later. One that ends takes its entries with it."""
        index = int(struct.unpack_from("i", body, 4)[0])
        if kind == netlink.RTM_DELLINK and body[0] != netlink.AF_BRIDGE:
            self._drop_entries(index)
        return index

    def _drop_entries(self, index: int) -> None:
        for key in self._facts.pop(index, {}):
            self._items.pop((index, key), None)

    def _read_links(self, changed: set[int]) -> bool:
        """Whether a device that was known has become another's or has another name: then more than its own
        items may be different."""
        before = self._links
        if len(changed) > MANY_LINKS:
            self._links = {link.index: link for link in links.read_links(self._asking).values()}
        elif changed:
            asked = (links.read_link(self._asking, index) for index in changed)
            there = {link.index: link for link in asked if link is not None}
            self._links = {i: link for i, link in before.items() if i not in changed} | there
        known = changed & before.keys() & self._links.keys()
        return any(_who(before[index]) != _who(self._links[index]) for index in known)

    # --- items ---------------------------------------------------------------------------------------

    def _owned(self, index: int) -> LinkInfo | None:
        link = self._links.get(index)
        return link if link is not None and link.alias.startswith(OWNED) else None

    def _make_all_items(self) -> None:
        self._items.clear()
        for index in self._links:
            self._make_device_items(index)
        for index, entries in self._facts.items():
            for key in entries:
                self._make_item(index, key)

    def _make_device_items(self, index: int) -> None:
        link = self._owned(index)
        device = flood = None
        if link is not None:
            master = self._links.get(link.master)
            lower = self._links.get(link.lower)
            device = kernel.device_of(link, master.name if master else "", lower.name if lower else "")
            if link.flood is not None and link.kind != "bridge":
                flood = PortFlood(link.name, link.flood)
        self._set(index, DEVICE, device)
        self._set(index, FLOOD, flood)

    def _make_item(self, index: int, key: facts.Key) -> None:
        fact, link = self._facts.get(index, {}).get(key), self._owned(index)
        item = None
        if fact is not None and link is not None:
            port = self._owned(fact.port)
            if port is not None or not fact.port:
                item = facts.item_of(fact, link.name, port.name if port else "")
        self._set(index, key, item)

    def _set(self, index: int, key: facts.Key, item: Item | None) -> None:
        if item is None:
            self._items.pop((index, key), None)
        else:
            self._items[index, key] = item


def _who(link: LinkInfo) -> tuple[str, bool]:
    return link.name, link.alias.startswith(OWNED)


def _listener() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    hearing = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    hearing.bind((0, GROUPS))
    try:
        hearing.setsockopt(socket.SOL_SOCKET, RECEIVE_BUFFER_FORCED, BUFFER)
    except PermissionError:
        hearing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    return hearing


def _messages(hearing: socket.socket) -> Iterable[tuple[int, bytes]]:
    """Kind and body of everything told since the last time."""
    while True:
        try:
            data = hearing.recv(1 << 16)
        except BlockingIOError:
            return
        for kind, _, _, body in netlink.messages(data):
            yield kind, body
