"""Network functions change their release under load: no connection is refused or broken, leases are kept. Two
releases from two Debians, each by its own loader, and back to the host's own programs."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from network_namespaces import missing_programs
from routed_cloud import A, B
from test_load_balancer import Balanced, balanced

from nahtlos.lab.paths import BuildPaths
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.nouns import Component
from nahtlos.physical.hypervisor.bundle import Bundles
from nahtlos.wire.bundle import list_releases

__all__ = ["balanced"]  # a fixture
RELEASES = BuildPaths.default().releases
BUILT = list_releases(RELEASES, Component.NETWORK)
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
    pytest.mark.skipif(len(BUILT) < 2, reason="needs two: nahtlos release build network-12 network-13"),
]


class Load:
    """New connections all the time, each asked for an answer; one that stays and talks; names asked for."""

    def __init__(self, site: Balanced) -> None:
        self.opened = 0
        self.refused: list[str] = []
        self.lines = 0
        self.broken = ""
        self.asked = self.unanswered = 0
        self.longest = 0.0
        self._site = site
        self._stop = threading.Event()
        self._held = site.connect()
        acts = (self._open, self._talk, self._ask)
        self._threads = [threading.Thread(target=act) for act in acts]
        for thread in self._threads:
            thread.start()

    def _open(self) -> None:
        while not self._stop.is_set():
            try:
                with self._site.connect() as sock:
                    assert sock.recv(20), "closed without an answer"
            except (OSError, AssertionError) as error:
                self.refused.append(repr(error))
            self.opened += 1
            time.sleep(0.003)

    def _talk(self) -> None:
        self._held.settimeout(3.0)
        try:
            assert self._held.recv(20)
            while not self._stop.is_set():
                self._held.sendall(b"x")
                assert self._held.recv(20), "closed"
                self.lines += 1
                time.sleep(0.003)
        except (OSError, AssertionError) as error:
            self.broken = repr(error)

    def _ask(self) -> None:
        """As a resolver does: again after half a second."""
        query = b"\0\7\1\0\0\1\0\0\0\0\0\0" + b"\3one\3red\0" + b"\0\1\0\1"
        with self._site.client.within(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.settimeout(0.5)
            while not self._stop.is_set():
                self.asked += 1
                began = time.monotonic()
                for _ in range(4):
                    with contextlib.suppress(OSError):
                        sock.sendto(query, ("10.1.0.2", 53))
                        sock.recv(1500)
                        break
                else:
                    self.unanswered += 1
                self.longest = max(self.longest, time.monotonic() - began)
                time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._held.close()


@pytest.fixture
async def upgradable(balanced: Balanced) -> AsyncIterator[Balanced]:
    for host in balanced.cloud.hosts.values():
        host.driver._programs._bundles = Bundles(RELEASES)
    yield balanced


async def give(site: Balanced, release: ReleaseId | None) -> dict[str, tuple[str, ...]]:
    cloud, plain = site.cloud, site.cloud.config
    found: dict[str, tuple[str, ...]] = {}
    with _given(site, release):
        for name in (A, B):
            found[name] = await cloud.reconcile(name)
    assert cloud.config == plain
    return found


@contextlib.contextmanager
def _given(site: Balanced, release: ReleaseId | None) -> Iterator[None]:
    plain = site.cloud.config
    site.cloud.config = lambda host: msgspec.structs.replace(plain(host), network_release=release)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del site.cloud.config


def runs(site: Balanced, host: str, name: str) -> str:
    """Which file the process of a unit executes: a loader, for a program of a bundle."""
    supervisor = site.cloud.hosts[host].supervisor
    pid = supervisor.processes[name].pid
    return " ".join(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))


async def test_releases_change_under_load_and_nobody_is_refused(upgradable: Balanced) -> None:
    site = upgradable
    await give(site, None)
    before = (await site.status()).version
    leases = Path(site.cloud.hosts[A].settings.run_dir) / "dhcp" / "red.leases"
    leases.write_text(f"{int(time.time()) + 90000} 52:54:00:52:00:00 10.1.0.10 client *\n")
    load, versions = Load(site), [before]
    try:
        await asyncio.sleep(0.3)
        for release in (*BUILT, *reversed(BUILT), None):
            name = release.id if release else None
            found = await give(site, name)
            assert not any(found.values()), "asked for: no drift"
            assert not any((await give(site, name)).values())
            status = await site.until(lambda s: all(m.up for m in s.members))
            versions.append(status.version)
            for host in (A, B):
                assert await site.cloud.hosts[host].call(lambda d: d.release()) == name
            command = runs(site, A, "dnsmasq.red")
            assert (str(RELEASES / name) in command) if name else command.startswith("/usr/sbin/dnsmasq")
            await asyncio.sleep(0.3)
    finally:
        load.stop()
    wanted = [BUILT[0].version, BUILT[1].version, BUILT[1].version, BUILT[0].version]
    assert [v.split("-")[0] for v in versions[1:5]] == wanted, versions
    assert versions[5] == before
    print(
        f"{load.opened} connections, {len(load.refused)} refused; {load.lines} lines over one; "
        f"{load.asked} questions, {load.unanswered} without answer, longest {load.longest:.2f} s; {versions}"
    )
    assert load.opened > 100 and load.lines > 100 and load.asked > 50
    assert load.refused == []
    assert load.broken == "", "one that was there before lives in the old worker"
    assert load.unanswered == 0
    assert "10.1.0.10" in leases.read_text(), "leases are kept"


async def test_what_cannot_serve_is_refused_and_all_goes_on_as_before(upgradable: Balanced) -> None:
    site = upgradable
    await give(site, BUILT[0].id)
    before = await site.status()
    for release in (list_releases(RELEASES)[0].id, ReleaseId("network-9-000000000000")):
        with pytest.raises(Refused):
            await give(site, release)
    assert (await site.status()).version == before.version
    assert site.asked(6)[""] == 0
    assert await site.cloud.hosts[A].call(lambda d: d.release()) == BUILT[0].id
