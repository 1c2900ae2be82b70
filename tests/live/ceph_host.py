"""Hosts beside a Ceph cluster, all in one namespace: the cluster's. The test's own thread must be in it too
while they are used (`inside`): the process by which the driver speaks to the cluster is its child."""

import asyncio
import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from physical_host import CLONE_NEWNET, Host

from nahtlos.lab.ceph import CephCluster, way
from nahtlos.model.errors import Unavailable
from nahtlos.model.storage import StorageBackend, VolumeSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage.ceph.driver import CephStorage


@contextmanager
def cluster(name: str) -> Iterator[tuple[str, CephCluster]]:
    """Its namespace and a cluster in it. To be entered by the main thread."""
    namespace = f"nlt-{name}-{os.getpid()}"
    for words in (("netns", "add", namespace), ("-n", namespace, "link", "set", "lo", "up")):
        subprocess.run(("ip", *words), check=True, capture_output=True, timeout=10)
    try:
        with CephCluster(namespace) as made:
            yield namespace, made
    finally:
        subprocess.run(("ip", "netns", "del", namespace), check=True, capture_output=True, timeout=10)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread, and processes it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{namespace}").open() as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


class AskedAgain(CephStorage):
    """As agents do it: what takes longer than one call waits is asked for until it is there."""

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        while True:
            try:
                return await super().reconcile(desired)
            except Unavailable as error:
                if "is being made" not in str(error):
                    raise
                await asyncio.sleep(0.1)


def ceph_settings(host: Host, ceph: CephCluster) -> AgentSettings:
    return msgspec.structs.replace(host.settings, ceph=way(ceph.configuration))


def ceph_storage(host: Host, ceph: CephCluster) -> CephStorage:
    settings = ceph_settings(host, ceph)
    assert settings.ceph is not None
    return AskedAgain(settings, settings.ceph, host.supervisor)


def in_ceph(volume: VolumeSpec) -> VolumeSpec:
    return msgspec.structs.replace(volume, backend=StorageBackend.CEPH)
