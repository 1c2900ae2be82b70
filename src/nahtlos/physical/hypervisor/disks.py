"""What the disks of a VMM look like: (server) -> block nodes, throttle groups, devices. Pure.

    device --> throttle filter (root) --> one connection                    a volume with one copy
                                      `-> quorum of N --> N connections     one with N current copies

The root is the knob for limits and the point at which a volume is pivoted to other connections. A quorum
acknowledges a write when all its members have it (`vote-threshold` = N), so a copy that fails stops the guest
before anything is acknowledged that this copy lacks. A root cannot leave a quorum that fails to flush: while
the guest stands still, placeholders take the members' places, which accept writes and fail every read.

A connection of a quorum never connects again by itself: whoever watches it has to decide whether the copy is
still the same, and to set the new socket's time-outs. A single one does: there is nothing else to go on with.

Names of nodes say what they are, so that a VMM's graph alone tells how it reaches its volumes. The guest sees
nothing of it, and nothing of it is part of a stream.
"""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import RbdEndpoint, ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import DiskLimits

SYSTEM_ROOT = "top"
SYSTEM_GROUP = "limits"
SYSTEM_DEVICE = "disk"
SYSTEM_ADDRESS = 0x3
EARLIER = "volume"
"""The one connection of a VMM that was started before there were several."""
TLS_CLIENT = "tls-client"
QUEUE_SIZE = 256
"""Of every virtio queue for data, said aloud because defaults differ between releases."""
SERIAL_LENGTH = 20
"""What a guest can read of a data volume's name: `/dev/disk/by-id/virtio-...`."""
RECONNECT_SECONDS = 30
"""How long requests over a single connection wait for its daemon."""
OPEN_SECONDS = 2
"""Longest that a new connection holds up the VMM, whose monitor waits for it."""

Options = dict[str, object]


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a server. `place` None: the system disk, else the number of its root port."""

    attachment: VolumeAttachment
    place: int | None = None

    @property
    def volume(self) -> VolumeId:
        return self.attachment.volume

    @property
    def root(self) -> str:
        return SYSTEM_ROOT if self.place is None else f"top-{short(self.volume)}"

    @property
    def device(self) -> str:
        return SYSTEM_DEVICE if self.place is None else f"data{self.place}-{short(self.volume)}"

    @property
    def group(self) -> str:
        if self.attachment.limits_group:
            return f"group-{short(self.attachment.limits_group)}"
        return SYSTEM_GROUP if self.place is None else f"limits-{short(self.volume)}"

    @property
    def endpoints(self) -> tuple[VolumeEndpoint, ...]:
        return endpoints(self.attachment)

    @property
    def keys(self) -> tuple[str, ...]:
        """One per connection it needs, in order."""
        rbd = self.attachment.rbd
        return (key_of_rbd(rbd),) if rbd else tuple(key_of(each) for each in self.endpoints)


def short(text: str) -> str:
    """Names of nodes have at most 31 characters."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def endpoints(attachment: VolumeAttachment) -> tuple[VolumeEndpoint, ...]:
    if attachment.copies:
        return attachment.copies
    return (
        VolumeEndpoint(
            host=HostId(""), address=attachment.address, port=attachment.port, export=attachment.export
        ),
    )


def key_of(endpoint: VolumeEndpoint) -> str:
    """The same for the same export at the same place, whatever its host is called."""
    joining = "w" if endpoint.joining else ""
    return short(f"{endpoint.address} {endpoint.port} {endpoint.export}") + joining


def key_of_rbd(rbd: RbdEndpoint) -> str:
    return short(f"rbd {rbd.pool} {rbd.image} {rbd.user} {rbd.configuration}")


def disks_of(server: ServerConfig) -> tuple[Disk, ...]:
    """Refused if there are more than the machine has places for."""
    volumes = (server.volume.volume, *(v.volume for v in server.data_volumes))
    twice = {v for v in volumes if volumes.count(v) > 1}
    if twice:
        raise Refused(f"{', '.join(sorted(twice))} would be attached twice", field="data_volumes")
    data = tuple(
        Disk(attachment=attachment, place=_place(server, index, attachment.volume))
        for index, attachment in enumerate(server.data_volumes)
    )
    places = server.spec.data_places
    beyond = [disk for disk in data if disk.place is not None and disk.place >= places]
    if beyond:
        raise Refused(
            f"{server.spec.id} has places for {places} data volumes; "
            f"{', '.join(disk.volume for disk in beyond)} would be one more",
            field="data_volumes",
            remedy="detach one first, or attach it to another server",
        )
    return (Disk(attachment=server.volume), *data)


def _place(server: ServerConfig, index: int, volume: VolumeId) -> int:
    return server.spec.data_volumes.index(volume) if volume in server.spec.data_volumes else index


# --- limits ------------------------------------------------------------------------------------------


def limits_of(server: ServerConfig) -> dict[str, Options]:
    """Throttle groups and their limits: every field, because one that is not named keeps its value."""
    groups: dict[str, Options] = {}
    for disk in disks_of(server):
        groups.setdefault(disk.group, throttle_limits(disk.attachment.limits))
    return groups


def throttle_limits(limits: DiskLimits) -> Options:
    """Refused for a total beside one of its parts."""
    iops = _rates("iops", limits.iops, limits.iops_read, limits.iops_write, limits.iops_burst, limits)
    bps = _rates("bps", limits.bytes, limits.bytes_read, limits.bytes_write, limits.bytes_burst, limits)
    return {**iops, **bps, "iops-size": 0}


def _rates(kind: str, total: int, read: int, write: int, burst: int, limits: DiskLimits) -> Options:
    if total and (read or write):
        raise Refused(
            f"a limit of all {kind} together excludes one of reads or writes",
            field="limits",
            remedy="set the total to 0, or its parts",
        )
    found: Options = {}
    for part, rate in (("total", total), ("read", read), ("write", write)):
        bursts = burst if rate and burst > rate else 0
        found[f"{kind}-{part}"] = rate
        found[f"{kind}-{part}-max"] = bursts
        found[f"{kind}-{part}-max-length"] = max(1, limits.burst_seconds) if bursts else 1
    return found


# --- nodes and devices -------------------------------------------------------------------------------


def connection_name(key: str, number: int, *, alone: bool) -> str:
    return f"{'s' if alone else 'c'}-{key}-{number}"


def key_in(node: str) -> str | None:
    """Which endpoint a connection leads to; None for a node that is none."""
    kind, _, rest = node.partition("-")
    return rest.partition("-")[0] if kind in ("s", "c", "j") and rest else None


def quorum_name(volume: VolumeId, threshold: int, number: int) -> str:
    return f"q{threshold}-{short(volume)}-{number}"


def threshold_in(node: str) -> int | None:
    """Votes a quorum asks for; None for a node that is none."""
    votes = node.partition("-")[0].removeprefix("q")
    return int(votes) if node.startswith("q") and votes.isdecimal() else None


def placeholder_name(volume: VolumeId, number: int) -> str:
    return f"gone-{short(volume)}-{number}"


def is_placeholder(node: str) -> bool:
    return node.startswith("gone-")


def ours(node: str) -> bool:
    """A node that is only there for a disk's root."""
    return (
        node == EARLIER or key_in(node) is not None or threshold_in(node) is not None or is_placeholder(node)
    )


def connection(endpoint: VolumeEndpoint, name: str, *, alone: bool) -> Options:
    return {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "inet", "host": endpoint.address, "port": str(endpoint.port)},
        "export": endpoint.export,
        "reconnect-delay": RECONNECT_SECONDS if alone else 0,
        "open-timeout": OPEN_SECONDS,
        "tls-creds": TLS_CLIENT,
        "discard": "unmap",
    }


def rbd_connection(rbd: RbdEndpoint, name: str) -> Options:
    """Without librbd's cache: while a root goes from one way to the image to another, both tell the same."""
    return {
        "driver": "rbd",
        "node-name": name,
        "pool": rbd.pool,
        "image": rbd.image,
        "user": rbd.user,
        "conf": rbd.configuration,
        "cache": {"direct": True},
        "discard": "unmap",
    }


def connections(disk: Disk, number: int) -> tuple[tuple[Options, ...], str]:
    """Fresh ones to all copies, each node to be added after the one before, and the name of the last, for a
    root. `number` tells them from earlier ones to the same place."""
    alone = len(disk.keys) == 1
    names = [connection_name(key, number, alone=alone) for key in disk.keys]
    if disk.attachment.rbd:
        return (rbd_connection(disk.attachment.rbd, names[0]),), names[0]
    nodes: list[Options] = []
    members: list[str] = []
    for endpoint, name in zip(disk.endpoints, names, strict=True):
        nodes.append(connection(endpoint, name, alone=alone))
        members.append(f"j{name[1:]}" if endpoint.joining else name)
        if endpoint.joining:
            nodes.append(unreadable(members[-1], name))
    if alone:
        return tuple(nodes), members[0]
    nodes.append(quorum(quorum_name(disk.volume, len(members), number), members))
    return tuple(nodes), str(nodes[-1]["node-name"])


def quorum(name: str, children: Iterable[str]) -> Options:
    members = list(children)
    return {
        "driver": "quorum",
        "node-name": name,
        "children": members,
        "vote-threshold": len(members),
        "read-pattern": "fifo",
    }


def placeholder(name: str, size: int) -> Options:
    """Takes every write, fails every read. A plain null-co would answer reads with zeros."""
    return unreadable(name, {"driver": "null-co", "size": size, "read-zeroes": False})


def unreadable(name: str, below: str | Options) -> Options:
    """A member that fails a read is passed over for the next one."""
    return {
        "driver": "blkdebug",
        "node-name": name,
        "image": below,
        "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "once": False}],
    }


def root(disk: Disk, child: str, group: str | None = None) -> Options:
    """All its options: a reopen sets what is not named back to its default."""
    return {
        "driver": "throttle",
        "node-name": disk.root,
        "throttle-group": group or disk.group,
        "file": child,
        "discard": "unmap",
    }


def device(disk: Disk) -> Options:
    place: Options = (
        {"bus": "pcie.0", "addr": f"{SYSTEM_ADDRESS:#x}", "bootindex": 0}
        if disk.place is None
        else {"bus": f"slot{disk.place}", "addr": "0x0", "serial": disk.volume[:SERIAL_LENGTH]}
    )
    return {
        "driver": "virtio-blk-pci",
        "id": disk.device,
        "drive": disk.root,
        **place,
        "num-queues": 1,
        "queue-size": QUEUE_SIZE,
        "werror": "stop",
        "rerror": "stop",
    }


def disk_arguments(server: ServerConfig) -> tuple[str, ...]:
    """As a VMM is started with them."""
    arguments: list[str] = []
    for group, limits in limits_of(server).items():
        arguments += ["-object", _json({"qom-type": "throttle-group", "id": group, "limits": limits})]
    for disk in disks_of(server):
        nodes, last = connections(disk, 0)
        for node in (*nodes, root(disk, last)):
            arguments += ["-blockdev", _json(node)]
        arguments += ["-device", _json(device(disk))]
    return (*arguments, "-boot", "strict=on")


def _json(value: Mapping[str, object]) -> str:
    return msgspec.json.encode(value).decode()


# --- how a VMM reaches a volume now, and what has to be done -----------------------------------------


class Edge(msgspec.Struct, frozen=True):
    name: str
    """Of the edge, not of the child."""
    child: str


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """A VMM's block nodes, as it tells them."""

    sizes: Mapping[str, int]
    """Of every node, in bytes."""
    edges: Mapping[str, tuple[Edge, ...]]
    devices: Mapping[str, str]
    """Name of a disk's device -> its root."""
    groups: frozenset[str]
    """Throttle groups."""

    def child(self, node: str, name: str = "file") -> str | None:
        return next((edge.child for edge in self.edges.get(node, ()) if edge.name == name), None)

    def below(self, node: str) -> frozenset[str]:
        found: set[str] = set()
        waiting = [node]
        while waiting:
            children = {edge.child for edge in self.edges.get(waiting.pop(), ())} - found
            found |= children
            waiting += children
        return frozenset(found)

    def orphans(self) -> tuple[str, ...]:
        """Nodes of ours that no root uses, parents before children: what an interrupted change has left."""
        roots = [node for node in self.sizes if node == SYSTEM_ROOT or node.startswith("top-")]
        used = frozenset[str]().union(*(self.below(node) for node in roots))
        left = [node for node in self.sizes if ours(node) and node not in used]
        return tuple(
            sorted(left, key=lambda node: (threshold_in(node) is None, not node.startswith("j-"), node))
        )

    def free_number(self) -> int:
        """Larger than that of any node of ours."""
        numbers = [
            int(tail) for node in self.sizes if ours(node) and (tail := node.rpartition("-")[2]).isdecimal()
        ]
        return max(numbers, default=0) + 1


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How a root reaches its volume."""

    top: str
    """The root's child: a connection or a quorum."""
    members: Mapping[str, str]
    """Key of an endpoint -> its connection."""
    placeholders: tuple[str, ...] = ()
    threshold: int | None = None
    """None: there is no quorum."""
    edges: Mapping[str, str] = {}
    """Member of the quorum -> the name of its edge."""


def way_of(graph: Graph, root_node: str) -> Way | None:
    """None if the graph has no such root."""
    top = graph.child(root_node)
    if top is None:
        return None
    threshold = threshold_in(top)
    if threshold is None:
        key = key_in(top)
        return Way(top=top, members={key: top} if key else {})
    edges = {edge.child: edge.name for edge in graph.edges.get(top, ())}
    return Way(
        top=top,
        members={key: node for node in edges if (key := key_in(node))},
        placeholders=tuple(node for node in edges if is_placeholder(node)),
        threshold=threshold,
        edges=edges,
    )


def reaches(way: Way, wanted: tuple[str, ...]) -> bool:
    """Exactly the wanted copies, and each of them has a vote."""
    if way.threshold is None:
        return len(wanted) == 1 and set(way.members) == set(wanted)
    return (
        set(way.members) == set(wanted)
        and len(way.edges) == way.threshold == len(wanted)
        and not way.placeholders
    )
