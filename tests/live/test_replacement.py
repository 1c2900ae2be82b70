"""A server's VMM is replaced by one of another release, in place, under traffic: the real guest, driver and
kernel, and the agent's own operation. Nothing is lost, memory and disk are as they were."""

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import pytest
from network_namespaces import missing_programs
from physical_host import Host, Place, release, server_on, volume_on
from test_addressing import Client, network_spec
from test_guest_addresses import Networked, console_says

from nahtlos.lab.probe.datagrams import large_buffer
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import OperationId, PortId, ReleaseId, ServerId
from nahtlos.model.inventory import OperationKind, OperationState, RunState
from nahtlos.model.networking import PortSpec
from nahtlos.model.version_pairs import PAIRS, Verdict, Way
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal, Ledger, Role
from nahtlos.physical.agent.replacement import Replacement
from nahtlos.physical.ports import Drivers, NetworkDesired, StorageDesired, VmmId
from nahtlos.wire.messages import Message, ReplaceOrder

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
RED = network_spec("red", 310)
MAC, CLIENT_MAC = "52:54:00:4d:00:10", "52:54:00:4d:00:20"
NUMBER = struct.Struct("<8sQI")
INTERVAL = 0.001


class Elsewhere:
    """A driver that runs on another thread's loop."""

    def __init__(self, networked: Networked) -> None:
        self._networked = networked

    def __getattr__(self, verb: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            act = getattr(self._networked.driver, verb)
            return await self._networked.call(lambda: act(*arguments, **named))

        return call


class Inside(Protocol):
    """Somebody in a namespace."""

    def within(self, act: Callable[[], socket.socket]) -> socket.socket: ...


class Echoes(threading.Thread):
    """Numbered datagrams to the guest's echo port, a thousand a second, and what came back."""

    def __init__(self, client: Inside, address: str) -> None:
        super().__init__(daemon=True)
        self._sock = client.within(lambda: self._open(address))
        self.sent = self.received = self.doubled = 0
        self.longest = 0.0
        self._ends = threading.Event()

    @staticmethod
    def _open(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        large_buffer(sock)
        sock.connect((address, 7))
        sock.setblocking(False)
        return sock

    def wait_for_answer(self, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                self._sock.send(NUMBER.pack(b"nahtlos1", 7, 0xFFFFFFFF) + bytes(44))
                time.sleep(0.1)
                if self._sock.recv(2000):
                    return
        raise TimeoutError("the server does not answer")

    def run(self) -> None:
        seen: set[int] = set()
        began = last = time.monotonic()
        while not self._ends.is_set() or time.monotonic() - last < 1.0:
            now = time.monotonic()
            if not self._ends.is_set() and now - began >= self.sent * INTERVAL:
                self._sock.send(NUMBER.pack(b"nahtlos1", 7, self.sent) + bytes(44))
                self.sent += 1
            try:
                number = NUMBER.unpack_from(self._sock.recv(2000))[2]
            except BlockingIOError:
                time.sleep(0.0002)
                continue
            if number == 0xFFFFFFFF:
                continue
            self.doubled += number in seen
            seen.add(number)
            self.longest, last = max(self.longest, now - last), now
            self.received = len(seen)
        self._sock.close()

    def stop(self) -> None:
        self._ends.set()
        self.join(20)


class Stage:
    """One host with one network, a server in it and a client."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.networked = Networked(host)
        self.client: Client | None = None
        plain = server_on(host, "web")
        port = PortSpec(id=PortId("web-red"), network=RED.id, mac=MAC, ip="10.77.0.16")
        self.server = msgspec.structs.replace(plain, spec=msgspec.structs.replace(plain.spec, ports=(port,)))
        place = {"host": host.settings.host, "vtep": host.settings.address}
        self.port = PortConfig(id=port.id, server=plain.spec.id, mac=MAC, ip=port.ip, **place)
        asking = PortConfig(
            id=PortId("client-red"), server=ServerId("client"), mac=CLIENT_MAC, ip="10.77.0.32", **place
        )
        vteps = (host.settings.address,)
        self.network = NetworkConfig(spec=RED, ports=(self.port, asking), gateway_vtep="", vteps=vteps)
        self.config = HostConfig(
            host=host.settings.host, generation=1, release=None, networks=(self.network,)
        )
        self.ledger = Ledger(":memory:")
        self.epoch = 1
        self.number = 0

    async def begin(self, under: ReleaseId) -> None:
        self.ledger.accept(self.config)
        self.ledger.own(self.server)
        await self.reconcile()
        driver = self.networked.driver
        for port in self.network.ports:
            await self.networked.call(lambda p=port: driver.port_create(p, self.network, deliver=True))
        await self.reconcile()
        await self.host.storage.reconcile(StorageDesired(volumes=(volume_on(self.host, "web-root"),)))
        await self.host.hypervisor.start(self.server, under)
        fd = await self.host.supervisor.fetch_fd("tap.client-red")
        assert fd is not None
        self.client = await asyncio.to_thread(Client, "r-red", CLIENT_MAC, 1500, fd)
        os.close(fd)
        self.client.run("ip", "addr", "add", "10.77.0.32/24", "dev", "eth0")
        await console_says(self.host, self.vmm, "NAHTLOS-READY 10.77.0.16")

    async def reconcile(self) -> tuple[str, ...]:
        driver = self.networked.driver
        return await self.networked.call(lambda: driver.reconcile(NetworkDesired(config=self.config)))

    @property
    def vmm(self) -> VmmId:
        return VmmId(self.server.spec.id, self.epoch)

    def context(self, hypervisor: Any = None) -> Context:
        async def no_orchestrator(body: Message, timeout: float) -> Message:
            raise Unavailable("none here")

        return Context(
            settings=self.host.settings,
            drivers=Drivers(
                supervisor=self.host.supervisor,
                hypervisor=hypervisor or self.host.hypervisor,
                network=cast("Any", Elsewhere(self.networked)),
                storage=self.host.storage,
            ),
            ledger=self.ledger,
            transport=cast("Any", None),
            now=time.time,
            emit=lambda _: None,
            changed=lambda: None,
            on_bug=lambda error: print("bug", repr(error)),
            ask=no_orchestrator,
        )

    def replacement(self, to: ReleaseId, hypervisor: Any = None) -> Replacement:
        self.number += 1
        current = msgspec.structs.replace(self.server, epoch=self.epoch)
        order = ReplaceOrder(
            id=OperationId(f"op-{self.number}"),
            host=self.host.settings.host,
            server=current,
            ports=(self.port,),
            release=to,
        )
        journal = Journal(id=order.id, kind=OperationKind.REPLACE, role=Role.HOST, replace=order)
        self.ledger.begin(journal)
        return Replacement(self.context(hypervisor), journal)

    async def replace(self, to: ReleaseId) -> Journal:
        ended = await self.replacement(to).run(recovering=False)
        if ended.state is OperationState.DONE:
            self.epoch += 1
        return ended

    async def guest(self) -> dict[str, Any]:
        _, offset = await self.host.hypervisor.console(self.vmm, 0, 1 << 20)
        await self.host.hypervisor.console_write(self.vmm, b"status\n")
        async with asyncio.timeout(10):
            while True:
                data, _ = await self.host.hypervisor.console(self.vmm, offset, 1 << 20)
                if found := re.search(rb"\{.*\}\s", data, re.DOTALL):
                    return json.loads(found.group())
                await asyncio.sleep(0.05)

    def echoes(self) -> Echoes:
        assert self.client is not None
        echoes = Echoes(self.client, "10.77.0.16")
        echoes.start()
        return echoes

    async def is_as_before(self) -> None:
        """Nothing of the replacement is left, and nothing is to be put right."""
        assert await self.reconcile() == ()
        assert len(list(self.host.settings.ram_dir.iterdir())) == 1
        stored = await self.host.supervisor.stored()
        assert "tap.web-red" in stored
        assert not [name for name in stored if name.startswith("spare.")]

    async def close(self) -> None:
        if self.client is not None:
            self.client.close()
        await self.networked.close()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    place = Place("rep")
    stage = Stage(place.host("host-1"))
    try:
        yield stage
    finally:
        await stage.close()
        await place.close()


WALK = ("7.2", "7.2", "10.0", "10.0", "11.1", "11.1", "7.2", "11.1", "10.0", "7.2")
"""Every release after every one, itself included."""


def test_every_row_of_the_table_that_names_this_file_is_walked() -> None:
    rows = [pair for pair in PAIRS if Path(pair.source).name == Path(__file__).name]
    assert {(pair.old, pair.new) for pair in rows} == set(pairwise(WALK))
    assert {(pair.way, pair.verdict) for pair in rows} == {(Way.IN_PLACE, Verdict.PROVEN)}


async def test_from_every_release_to_every_other_and_back_nothing_is_lost(stage: Stage) -> None:
    stage.server = msgspec.structs.replace(
        stage.server, spec=msgspec.structs.replace(stage.server.spec, machine="pc-q35-7.2")
    )
    await stage.begin(release(WALK[0]))
    before = await stage.guest()
    echoes = stage.echoes()
    for to in map(release, WALK[1:]):
        await asyncio.sleep(0.3)
        ended = await stage.replace(to)
        assert ended.state is OperationState.DONE, ended.error
        (found,) = await stage.host.hypervisor.observe()
        assert (found.id, found.state, found.release) == (stage.vmm, RunState.RUNNING, to)
    await asyncio.sleep(0.3)
    echoes.stop()
    assert (echoes.received, echoes.doubled) == (echoes.sent, 0)
    after = await stage.guest()
    assert after["boot_id"] == before["boot_id"]
    assert after["memory"]["errors"] == after["disk"]["errors"] == 0
    await stage.is_as_before()


class Unlucky:
    """A hypervisor of which one verb fails once, before or after its effect."""

    def __init__(self, hypervisor: Any, verb: str, *, after: bool) -> None:
        self._hypervisor, self._verb, self._after = hypervisor, verb, after
        self.failed = False

    def __getattr__(self, verb: str) -> Any:
        act = getattr(self._hypervisor, verb)
        if verb != self._verb or self.failed:
            return act

        async def fail(*arguments: Any, **named: Any) -> Any:
            self.failed = True
            if self._after:
                await act(*arguments, **named)
            raise Unavailable(f"{verb} failed")

        return fail


@pytest.mark.parametrize(
    ("verb", "after"), [("replace_send", False), ("pause", True), ("incoming_wait", True)]
)
async def test_what_fails_before_the_point_of_no_return_is_undone_and_nothing_is_lost(
    stage: Stage, verb: str, after: bool
) -> None:
    await stage.begin(release("10.0"))
    echoes = stage.echoes()
    await asyncio.sleep(0.3)
    unlucky = Unlucky(stage.host.hypervisor, verb, after=after)
    ended = await stage.replacement(release("11.1"), unlucky).run(recovering=False)
    assert unlucky.failed
    assert ended.state is OperationState.UNDONE
    (found,) = await stage.host.hypervisor.observe()
    assert (found.id, found.state, found.release) == (stage.vmm, RunState.RUNNING, release("10.0"))
    await asyncio.sleep(0.3)
    assert (await stage.replace(release("11.1"))).state is OperationState.DONE
    await asyncio.sleep(0.3)
    echoes.stop()
    assert (echoes.received, echoes.doubled) == (echoes.sent, 0)
    assert (await stage.guest())["memory"]["errors"] == 0
    await stage.is_as_before()
