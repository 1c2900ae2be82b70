"""This process inside a place's namespace, as an agent of one of its hosts is: to be entered before a thread
is started, as threads stay where they were begun."""

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from physical_host import CLONE_NEWNET, Host, Place

from nahtlos.model.ids import VolumeId
from nahtlos.physical.storage.backups import OwnDoor

BLOCK = 65536


@contextmanager
def inside(place: Place) -> Generator[None]:
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _enter(Path(f"/run/netns/{place.namespace}"))
        yield
    finally:
        assert ctypes.CDLL(None).setns(before, CLONE_NEWNET) == 0
        os.close(before)


def _enter(path: Path) -> None:
    with path.open() as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0


def door(host: Host) -> OwnDoor:
    settings = host.settings
    return OwnDoor(
        host=settings.host, address=settings.address, port=settings.nbd_port, pki_dir=settings.pki_dir
    )


def write(host: Host, volume: VolumeId, block: int, data: bytes, *, epoch: int = 1) -> None:
    """As a server on another host would."""
    with door(host).client(f"{volume}.e{epoch}") as client:
        client.write(block * BLOCK, data)
        client.flush()


def content(host: Host, volume: VolumeId, *, epoch: int = 1) -> bytes:
    with door(host).client(f"{volume}.e{epoch}") as client:
        step = 4 << 20
        return b"".join(client.read(at, min(step, client.size - at)) for at in range(0, client.size, step))
