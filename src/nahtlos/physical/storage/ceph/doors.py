"""Images served over NBD, and how the daemon that serves them is run. Pure.

    rbd-<volume> ── top-<volume> ── export <volume>.e<epoch>
    to-<volume>, a client of `target` ── (once it was completed: passes everything on)

A door is opened for a relocation, to an image or from one: the other side need not know of Ceph. The nodes of
an image bypass librbd's cache: it would acknowledge writes that a daemon which is killed forgets, and no
later flush would say so.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.physical.hypervisor.commandline import (
    TLS_CLIENT,
    hosts_only_object,
    object_argument,
    tls_object,
)
from nahtlos.physical.settings import CephSettings
from nahtlos.physical.storage.graph import node_name

UNIT = "qsd-ceph"
SOCKET_FD = "nbd-ceph"
TLS_SERVER, HOSTS_ONLY = "tls-server", "hosts-only"
RECONNECT_DELAY = 30

Options = dict[str, object]


class Door(msgspec.Struct, frozen=True, kw_only=True, order=True):
    volume: VolumeId
    epoch: int
    target: VolumeEndpoint | None = None
    """Where the volume goes; None: nowhere."""
    completed: bool = False
    """It is at `target`: its image counts for nothing."""

    @property
    def export(self) -> str:
        return f"{self.volume}.e{self.epoch}"

    @property
    def job(self) -> str:
        return node_name("move", self.volume)


def rbd_node(volume: VolumeId) -> str:
    return node_name("rbd", volume)


def top_node(volume: VolumeId) -> str:
    return node_name("top", volume)


def target_node(volume: VolumeId) -> str:
    return node_name("to", volume)


def limits_group(volume: VolumeId) -> str:
    return node_name("limits", volume)


def image_node(ceph: CephSettings, name: str, image: str, snapshot: SnapshotId | None = None) -> Options:
    """A snapshot's is read only."""
    node: Options = {
        "driver": "rbd",
        "node-name": name,
        "pool": ceph.pool,
        "image": image,
        "conf": str(ceph.configuration),
        "user": ceph.user,
        "cache": {"direct": True},
        "discard": "unmap",
    }
    return {**node, "snapshot": snapshot, "read-only": True} if snapshot else node


def target_nodes(door: Door) -> tuple[Options, ...]:
    target = door.target
    if target is None:
        return ()
    return (
        {
            "driver": "nbd",
            "node-name": target_node(door.volume),
            "server": {
                "type": "inet",
                "host": target.address,
                "port": str(target.port),
                "keep-alive": True,
            },
            "export": target.export,
            "tls-creds": TLS_CLIENT,
            "reconnect-delay": RECONNECT_DELAY,
            "discard": "unmap",
        },
    )


def nodes(ceph: CephSettings, door: Door) -> tuple[Options, ...]:
    """From below up, the last one is what is served."""
    below = target_nodes(door) if door.completed else (image_node(ceph, rbd_node(door.volume), door.volume),)
    top: Options = {
        "driver": "throttle",
        "node-name": top_node(door.volume),
        "throttle-group": limits_group(door.volume),
        "file": below[-1]["node-name"],
        "discard": "unmap",
    }
    return (*below, top)


def export(door: Door) -> Options:
    return {
        "type": "nbd",
        "id": door.export,
        "name": door.export,
        "node-name": top_node(door.volume),
        "writable": True,
    }


def arguments(ceph: CephSettings, qmp: Path, pki_dir: Path, doors: Iterable[Door]) -> tuple[str, ...]:
    """To follow `Bundle.storage_daemon()`: a daemon that is started again serves all of them at once."""
    listening = f"addr.type=fd,addr.str={{fd:{SOCKET_FD}}},max-connections=0"
    return (
        *("--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
        *_long(tls_object(TLS_SERVER, "server", pki_dir)),
        *_long(tls_object(TLS_CLIENT, "client", pki_dir)),
        *_long(hosts_only_object(HOSTS_ONLY)),
        *("--nbd-server", f"{listening},tls-creds={TLS_SERVER},tls-authz={HOSTS_ONLY}"),
        *(part for door in sorted(doors, key=lambda door: door.volume) for part in _door(ceph, door)),
    )


def _door(ceph: CephSettings, door: Door) -> Iterator[str]:
    yield from _long(object_argument("throttle-group", limits_group(door.volume)))
    for node in nodes(ceph, door):
        yield from ("--blockdev", _json(node))
    yield from ("--export", _json(export(door)))


def _long(arguments: tuple[str, str]) -> tuple[str, str]:
    """The storage daemon knows long options only."""
    option, value = arguments
    return f"-{option}", value


def _json(value: Options) -> str:
    return msgspec.json.encode(value).decode()
