"""The baseline of `bench-moves`: the same guest moved between two namespaces by bare QEMU commands.

What a careful person with two machines and QEMU's documentation would do: learning bridges, a tuned
pre-copy (4 GiB/s, downtime-limit 20 ms, relented when it does not converge), QEMU's own switchover and its
announcement, one shared raw file as disk, no TLS. The guest, its memory, the QEMU releases, the probe and the
machine are those of nahtlos' runs.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from nahtlos.lab.topology import within
from nahtlos.physical.hypervisor.bundle import Bundle, read_bundle

TUNSETIFF = 0x400454CA
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000
SUBNET = "10.77.0"
MAC = "52:54:00:4d:00:f0"
GUEST_IP = f"{SUBNET}.240"
BANDWIDTH = 4 << 30
DOWNTIME_MS = 20
Relent = tuple[tuple[float, int], ...]
RELENT: Relent = ((4.0, 300), (12.0, 2000))
"""A guest that writes faster than it converges: after so many seconds so long a downtime is accepted
(300 ms is QEMU's default)."""
BOOT_SECONDS = 60.0
MOVE_SECONDS = 60.0


class BareLab:
    """Two hosts `a` and `b`, a switch and a client, each a namespace."""

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self.work = work
        self._dnsmasq: subprocess.Popen[bytes] | None = None

    def namespace(self, node: str) -> str:
        return f"nlb-{self.name}-{node}"

    def open(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        sw = self.namespace("sw")
        _run("ip", "netns", "add", sw)
        _run("ip", "-n", sw, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        _run("ip", "-n", sw, "link", "set", "br0", "up")
        for number, node in enumerate(("a", "b", "client"), start=1):
            self._join(node, number)
        self._dnsmasq = subprocess.Popen(
            [
                *(
                    "nsenter",
                    f"--net=/run/netns/{self.namespace('client')}",
                    "dnsmasq",
                    "--keep-in-foreground",
                ),
                *("--conf-file=/dev/null", "--port=0", "--bind-interfaces", "--interface=eth0"),
                *(f"--dhcp-range={SUBNET}.0,static", f"--dhcp-host={MAC},{GUEST_IP}"),
                f"--dhcp-leasefile={self.work / 'leases'}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _join(self, node: str, number: int) -> None:
        ns, sw = self.namespace(node), self.namespace("sw")
        _run("ip", "netns", "add", ns)
        _run("ip", "-n", ns, "link", "set", "lo", "up")
        _run("ip", "-n", sw, "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", ns)
        _run("ip", "-n", sw, "link", "set", f"p{number}", "master", "br0", "up")
        _run("ip", "-n", ns, "link", "set", "eth0", "up")
        if node == "client":
            _run("ip", "-n", ns, "addr", "add", f"{SUBNET}.1/24", "dev", "eth0")
            return
        # A fixed address: a bridge's own changes with its ports, and then the stream finds nobody.
        address = f"02:00:00:00:01:{number:02x}"
        _run("ip", "-n", ns, "link", "add", "br0", "address", address, "type", "bridge", "forward_delay", "0")
        _run("ip", "-n", ns, "link", "set", "br0", "up")
        _run("ip", "-n", ns, "link", "set", "eth0", "master", "br0")
        _run("ip", "-n", ns, "addr", "add", f"{SUBNET}.{200 + number}/24", "dev", "br0")

    def address(self, node: str) -> str:
        return f"{SUBNET}.{200 + {'a': 1, 'b': 2}[node]}"

    def close(self) -> None:
        if self._dnsmasq:
            self._dnsmasq.kill()
            self._dnsmasq.wait()
        for node in ("a", "b", "client", "sw"):
            subprocess.run(["ip", "netns", "del", self.namespace(node)], capture_output=True, check=False)
        shutil.rmtree(self.work, ignore_errors=True)


class BareGuest:
    """One guest and the QEMU process that runs it now."""

    def __init__(self, lab: BareLab, image: Path, memory_mib: int, releases: tuple[Path, Path]) -> None:
        self._lab = lab
        self._memory = memory_mib
        self._bundles = {node: read_bundle(path) for node, path in zip(("a", "b"), releases, strict=True)}
        self._disk = lab.work / "disk.raw"
        _run("cp", "--sparse=always", "--reflink=auto", str(image), str(self._disk))
        self._node = "a"
        self._number = 0
        self._seen = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: QMPClient | None = None

    async def boot(self) -> None:
        self._process, self._qmp = await self._start(self._node, self._bundles[self._node], incoming=False)

    async def move(self) -> None:
        """To the other host and, if the releases differ, to the other release."""
        assert self._qmp is not None, "not booted"
        target = "b" if self._node == "a" else "a"
        process, qmp = await self._start(target, self._bundles[target], incoming=True)
        uri = f"tcp:{self._lab.address(target)}:{4500 + self._number}"
        for side in (self._qmp, qmp):
            await set_capabilities(side, frozenset({"events", "return-path"}))
        await self._qmp.execute(
            "migrate-set-parameters", {"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME_MS}
        )
        await qmp.execute("migrate-incoming", {"uri": uri})
        await self._qmp.execute("migrate", {"uri": uri})
        await self._until_arrived(qmp)
        await self._take_up(process, qmp)
        self._node = target

    async def _until_arrived(self, qmp: QMPClient, relent: Relent = RELENT) -> None:
        assert self._qmp is not None
        began, limits = time.monotonic(), list(relent)
        while not await self._arrived(qmp):
            if time.monotonic() - began > MOVE_SECONDS:
                raise RuntimeError(f"bare move not done after {MOVE_SECONDS:g} s: {self._seen}")
            if limits and time.monotonic() - began > limits[0][0]:
                await self._qmp.execute("migrate-set-parameters", {"downtime-limit": limits.pop(0)[1]})
            await asyncio.sleep(0.01)

    async def _take_up(self, process: "subprocess.Popen[bytes]", qmp: QMPClient) -> None:
        """The guest runs there; the process it left ends."""
        await self._end(self._process, self._qmp)
        self._process, self._qmp = process, qmp

    async def _arrived(self, destination: QMPClient) -> bool:
        assert self._qmp is not None
        sent: Any = await self._qmp.execute("query-migrate")
        there: Any = await destination.execute("query-status")
        self._seen = f"source {sent['status']}, destination {there['status']}"
        if sent["status"] == "failed":
            raise RuntimeError(f"bare move failed: {sent.get('error-desc')}")
        return sent["status"] == "completed" and there["running"]

    async def close(self) -> None:
        await self._end(self._process, self._qmp)

    async def _end(self, process: "subprocess.Popen[bytes] | None", qmp: QMPClient | None) -> None:
        if process:
            process.kill()
            process.wait()
        if qmp:
            with contextlib.suppress(EOFError):
                await qmp.disconnect()

    async def _start(
        self, node: str, bundle: Bundle, *, incoming: bool
    ) -> "tuple[subprocess.Popen[bytes], QMPClient]":
        self._number += 1
        name = f"tap{self._number}"
        namespace = self._lab.namespace(node)
        tap = within(namespace, lambda: _open_tap(name))
        _run("ip", "-n", namespace, "link", "set", name, "txqueuelen", "10000", "master", "br0", "up")
        monitor = self._lab.work / f"{self._number}.qmp"
        arguments = [
            *("nsenter", f"--net=/run/netns/{namespace}"),
            *bundle.system(),
            *("-machine", "pc-q35-10.0", "-accel", "tcg", "-cpu", "qemu64", "-smp", "1"),
            *("-m", f"{self._memory}M", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-serial", f"file:{self._lab.work / f'{self._number}.console'}"),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *("-drive", f"file={self._disk},format=raw,if=none,id=d,file.locking=off,cache=none"),
            *("-device", "virtio-blk-pci,drive=d,addr=0x3,bootindex=0"),
            *(
                "-netdev",
                f"tap,id=n,fd={tap}",
                "-device",
                f"virtio-net-pci,netdev=n,mac={MAC},addr=0x4,romfile=",
            ),
            *(("-incoming", "defer") if incoming else ()),
        ]
        process = subprocess.Popen(
            arguments, pass_fds=(tap,), env={**os.environ, **bundle.environment}, stdin=subprocess.DEVNULL
        )
        os.close(tap)
        return process, await _connected(monitor, process)


async def set_capabilities(qmp: QMPClient, on: frozenset[str]) -> None:
    known: Any = await qmp.execute("query-migrate-capabilities")
    capabilities = [{"capability": c["capability"], "state": c["capability"] in on} for c in known]
    await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def _connected(monitor: Path, process: "subprocess.Popen[bytes]") -> QMPClient:
    async with asyncio.timeout(BOOT_SECONDS):
        while True:
            qmp = QMPClient("bare")
            try:
                await qmp.connect(str(monitor))
            except Exception:
                if process.poll() is not None:
                    raise
                await asyncio.sleep(0.02)
            else:
                return qmp


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_FLAGS))
    return fd


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
