"""Images served over NBD, and how the daemon that serves them is run. Pure.

    rbd ── fair ── top ── export <volume>.e<epoch>      a mirror on `top` writes to `to`, too:
    link ── to                                          a connection to `target`; once that must not fail
    hold ── to                                          any more, one that waits for a target that is gone
    there ── fair ── top ── export                      completed: everything is passed on

A door is opened for a relocation, to an image or from one: the other side need not know of Ceph. A view is a
snapshot that this host itself reads: the moment of a backup. The nodes of an image bypass librbd's cache: it
would acknowledge writes that a daemon which is killed forgets, and no later flush would say so.
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
LINK_SECONDS = 1
"""A target whose daemon is started anew is there again at once; one that is gone for longer ends the copy."""
HOLD_SECONDS = 86_400
PASS_SECONDS = 30
"""How long a connection waits for a target that is gone."""

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


class View(msgspec.Struct, frozen=True, kw_only=True, order=True):
    volume: VolumeId
    snapshot: SnapshotId

    @property
    def export(self) -> str:
        return f"{self.volume}.past.{self.snapshot}"


def view_node(volume: VolumeId) -> str:
    return node_name("past", volume)


def rbd_node(volume: VolumeId) -> str:
    return node_name("rbd", volume)


def fair_node(volume: VolumeId) -> str:
    return node_name("fair", volume)


def top_node(volume: VolumeId) -> str:
    return node_name("top", volume)


def there_node(volume: VolumeId) -> str:
    return node_name("there", volume)


def target_node(volume: VolumeId) -> str:
    return node_name("to", volume)


def link_node(volume: VolumeId) -> str:
    return node_name("link", volume)


def hold_node(volume: VolumeId) -> str:
    return node_name("hold", volume)


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


def connection(door: Door, name: str, reconnect: int) -> Options:
    target = door.target
    assert target is not None, f"{door.volume} goes nowhere"
    return {
        "driver": "nbd",
        "node-name": name,
        "server": {"type": "inet", "host": target.address, "port": str(target.port), "keep-alive": True},
        "export": target.export,
        "tls-creds": TLS_CLIENT,
        "reconnect-delay": reconnect,
        "discard": "unmap",
    }


def target(door: Door, below: str) -> Options:
    """What the mirror writes to."""
    return _filter(door, target_node(door.volume), below)


def fair(door: Door, below: str) -> Options:
    """Where what is served comes from."""
    return _filter(door, fair_node(door.volume), below)


def _filter(door: Door, name: str, file: str) -> Options:
    return {
        "driver": "throttle",
        "node-name": name,
        "throttle-group": limits_group(door.volume),
        "file": file,
        "discard": "unmap",
    }


def nodes(ceph: CephSettings, door: Door) -> tuple[Options, ...]:
    """From below up, the last one is what is served."""
    volume = door.volume
    below = there(door) if door.completed else image_node(ceph, rbd_node(volume), volume)
    middle = fair(door, str(below["node-name"]))
    return (below, middle, _filter(door, top_node(volume), fair_node(volume)))


def there(door: Door) -> Options:
    return connection(door, there_node(door.volume), PASS_SECONDS)


def view(ceph: CephSettings, of: View) -> Options:
    return image_node(ceph, view_node(of.volume), of.volume, of.snapshot)


def view_export(of: View) -> Options:
    node = view_node(of.volume)
    return {"type": "nbd", "id": of.export, "name": of.export, "node-name": node, "writable": False}


def export(door: Door) -> Options:
    return {
        "type": "nbd",
        "id": door.export,
        "name": door.export,
        "node-name": top_node(door.volume),
        "writable": True,
    }


def arguments(
    ceph: CephSettings, qmp: Path, pki_dir: Path, doors: Iterable[Door], views: Iterable[View]
) -> tuple[str, ...]:
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
        *(part for each in sorted(views) for part in _view(ceph, each)),
    )


def _door(ceph: CephSettings, door: Door) -> Iterator[str]:
    yield from _long(object_argument("throttle-group", limits_group(door.volume)))
    for node in nodes(ceph, door):
        yield from ("--blockdev", _json(node))
    yield from ("--export", _json(export(door)))


def _view(ceph: CephSettings, of: View) -> Iterator[str]:
    yield from ("--blockdev", _json(view(ceph, of)))
    yield from ("--export", _json(view_export(of)))


def _long(arguments: tuple[str, str]) -> tuple[str, str]:
    """The storage daemon knows long options only."""
    option, value = arguments
    return f"-{option}", value


def _json(value: Options) -> str:
    return msgspec.json.encode(value).decode()
