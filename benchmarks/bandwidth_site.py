"""Two servers at a bridge, and two hosts at a cable, made of namespaces: where bandwidth is measured.

    limited --veth-- [tap] bridge [tap] --veth-- peer        one host, two servers; one of them limited
    near --veth-- far                                        two hosts; near's underlay has shares

A veth pair stands for a tap and its server, so that no process between them is what limits. What is measured
are the driver's own parts, called as the driver calls them.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from benchmarks import bandwidth_load as load
from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, UnderlayShares
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec, PortBandwidth
from nahtlos.physical.network import device_names
from nahtlos.physical.network.bandwidth.ports import Shaping
from nahtlos.physical.network.bandwidth.underlay import Ports, Shares
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort
from nahtlos.physical.settings import MIGRATION_PORTS

ROOT = Path(__file__).parents[1]
DEADLINE = 60.0
"""Making a namespace waits for others that are being removed."""
LIMITED, PEER = "10.78.0.1", "10.78.0.2"
NEAR, FAR = "10.79.0.1", "10.79.0.2"
PORT = PortId("limited-port")
PORTS = Ports(control=(7443, 7444, 10809), moves=MIGRATION_PORTS)
TAP = device_names.tap_name(PORT)
MAC = "52:54:00:4e:00:01"
NETWORK = NetworkConfig(
    spec=NetworkSpec(
        id=NetworkId("measured"),
        vni=78,
        cidr="10.78.0.0/24",
        gateway_ip="10.78.0.254",
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip="10.78.0.253",
    ),
    ports=(),
    gateway_vtep="",
    vteps=(),
)


class Flow(msgspec.Struct, frozen=True):
    """Traffic from one namespace to an address of another."""

    kind: str
    source: str
    target: str
    address: str
    port: int
    rate: int = 0
    """Offered, for UDP: bits per second of frames."""


class Arrivals(msgspec.Struct, frozen=True):
    """What came of a flow: bytes of payload in each hundredth of a second from `began` on."""

    kind: str
    began: float
    ended: float
    bins: list[int]

    def payload(self, since: float, until: float) -> int:
        """Bits per second between two moments after `began`."""
        first, last = int(since / load.BIN), int(until / load.BIN)
        return int(sum(self.bins[first:last]) * 8 / ((last - first) * load.BIN))

    def frames(self, since: float, until: float) -> int:
        """The same of whole frames, as limits are meant."""
        payload = load.TCP_PAYLOAD if self.kind == "tcp" else load.UDP_PAYLOAD
        return self.payload(since, until) * load.FRAME // payload


class Namespaces:
    """Base: named namespaces that are gone at the end."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"nlt-bw{os.getpid() % 100000}"
        self._names = names
        self.folder = Path(tempfile.mkdtemp(prefix="nlt-bw-"))

    def name(self, node: str) -> str:
        return f"{self._prefix}-{node}"

    def __enter__(self) -> Self:
        try:
            ip("", *(f"netns add {self.name(node)}" for node in self._names))
            self.lay()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        there = [n for n in map(self.name, self._names) if (topology.NAMESPACES / n).exists()]
        ip("", *(f"netns del {name}" for name in there))
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def lay(self) -> None:
        raise NotImplementedError


class Bridge(Namespaces):
    """One host with two servers."""

    def __init__(self) -> None:
        super().__init__("host", "limited", "peer")
        self._generation = 0

    def lay(self) -> None:
        limited, peer = self.name("limited"), self.name("peer")
        ip(
            self.name("host"),
            "link add br0 type bridge forward_delay 0",
            f"link add {TAP} index 101 type veth peer name eth0 index 2 netns {limited}",
            f"link set {TAP} master br0 up alias {device_names.port_alias(PORT, MAC)}",
            f"link add tppeer index 102 type veth peer name eth0 index 2 netns {peer}",
            "link set tppeer master br0 up",
            "link set br0 up",
        )
        for namespace, address in ((limited, LIMITED), (peer, PEER)):
            ip(namespace, "link set lo up", "link set eth0 up", f"addr add {address}/24 dev eth0")

    def limit(self, bandwidth: PortBandwidth) -> float:
        """As a reconcile of the driver does; returns when it was done."""
        port = PortConfig(
            id=PORT,
            server=ServerId("limited"),
            mac=MAC,
            ip=LIMITED,
            host=HostId("host"),
            vtep="",
            bandwidth=bandwidth,
        )
        local = {PORT: LocalPort(port, NETWORK, TAP)}
        self._generation += 1
        config = HostConfig(host=HostId("host"), generation=self._generation, release=None)

        def act() -> float:
            with Netlink() as netlink:
                part = Shaping(self.folder / "shaping.json", lambda: netlink, lambda: netlink)
                asyncio.run(part.reconcile(config, local))
                part.close()
            return time.monotonic()

        return topology.within(self.name("host"), act)

    def received(self, kind: str, rate: int = 0) -> Flow:
        """By the limited server."""
        return Flow(kind, self.name("peer"), self.name("limited"), LIMITED, 5001, rate)

    def sent(self, kind: str, rate: int = 0) -> Flow:
        return Flow(kind, self.name("limited"), self.name("peer"), PEER, 5001, rate)


class Cable(Namespaces):
    """Two hosts."""

    def __init__(self) -> None:
        super().__init__("near", "far")
        self._generation = 0

    def lay(self) -> None:
        near, far = self.name("near"), self.name("far")
        ip(near, f"link add eth0 index 101 type veth peer name eth0 index 2 netns {far}")
        for namespace, address in ((near, NEAR), (far, FAR)):
            ip(namespace, "link set lo up", "link set eth0 up", f"addr add {address}/24 dev eth0")

    def share(self, shares: UnderlayShares | None) -> None:
        """The underlay of `near`, as a reconcile of the driver does."""
        self._generation += 1
        config = HostConfig(host=HostId("near"), generation=self._generation, release=None, underlay=shares)

        def act() -> None:
            with Netlink() as netlink:
                part = Shares("eth0", PORTS, self.folder / "shares.json", lambda: netlink)
                asyncio.run(part.reconcile(config, {}))
                part.close()

        topology.within(self.name("near"), act)

    def flow(self, kind: str, port: int, rate: int = 0) -> Flow:
        return Flow(kind, self.name("near"), self.name("far"), FAR, port, rate)


def ip(namespace: str, *lines: str) -> None:
    where = ("-n", namespace) if namespace else ()
    subprocess.run(
        ("ip", *where, "-batch", "-"),
        input="".join(f"{line}\n" for line in lines),
        text=True,
        capture_output=True,
        check=True,
        timeout=DEADLINE,
    )


# --- traffic -----------------------------------------------------------------------------------------


class Running:
    """Flows that run side by side for a while."""

    def __init__(self, flows: Sequence[Flow], seconds: float) -> None:
        self._flows, self._seconds = flows, seconds
        self._receivers = [_start("receive", flow, flow.target, seconds) for flow in flows]
        for receiver in self._receivers:
            assert receiver.stdout is not None
            receiver.stdout.readline()
        self.began = time.monotonic()
        self._senders = [_start("send", flow, flow.source, seconds + 0.2) for flow in flows]

    def wait(self) -> list[Arrivals]:
        found: list[Arrivals] = []
        try:
            for flow, receiver in zip(self._flows, self._receivers, strict=True):
                out, _ = receiver.communicate(timeout=self._seconds + DEADLINE)
                found.append(msgspec.convert({"kind": flow.kind, **json.loads(out)}, Arrivals))
        finally:
            for process in (*self._senders, *self._receivers):
                process.kill()
                process.communicate()
        return found


def run(flows: Sequence[Flow], seconds: float) -> list[Arrivals]:
    return Running(flows, seconds).wait()


def _start(act: str, flow: Flow, namespace: str, seconds: float) -> subprocess.Popen[bytes]:
    command = (
        *("nsenter", f"--net={topology.NAMESPACES / namespace}", sys.executable, "-m"),
        *("benchmarks.bandwidth_load", act, flow.kind, flow.address, str(flow.port), str(seconds)),
        *((str(flow.rate),) if flow.rate else ()),
    )
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
