"""The probe against guests' services with known faults: it must count exactly these."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nahtlos.runtime.evidence.records import ProbeSummary, count, read_probe

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a network namespace and port 7"),
]

GUEST = Path(__file__).with_name("fake_guest.py")


class World:
    """A namespace with loopback only; every process that runs in it is ended at the end."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.namespace = f"nlt-probe-{os.getpid()}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.plan: dict[str, Any] = {"servers": [], "udp_pps": 250}
        subprocess.run(["ip", "netns", "add", self.namespace], check=True, timeout=10)
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "lo", "up"], check=True, timeout=10)

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["nsenter", f"--net=/run/netns/{self.namespace}", *command])
        self.processes.append(process)
        return process

    def guest(self, number: int, **faults: Any) -> subprocess.Popen[bytes]:
        return self.run(sys.executable, str(GUEST), f"127.0.0.{number}", json.dumps(faults))

    def add(self, name: str, number: int) -> None:
        self.plan["servers"].append({"name": name, "ip": f"127.0.0.{number}", "start": time.time()})
        self.write_plan()

    def write_plan(self) -> None:
        partial = self.tmp / "plan.partial"
        partial.write_text(json.dumps(self.plan))
        partial.replace(self.tmp / "plan.json")

    def probe(self) -> subprocess.Popen[bytes]:
        self.write_plan()
        return self.run(
            sys.executable, "-m", "nahtlos.lab.probe",
            "--plan", str(self.tmp / "plan.json"), "--out", str(self.tmp / "out"),
        )  # fmt: skip

    def summary(self) -> ProbeSummary | None:
        try:
            return read_probe(self.tmp / "out").summary
        except FileNotFoundError:
            return None

    def until(self, true: Callable[[ProbeSummary], bool], seconds: float = 15) -> ProbeSummary:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            summary = self.summary()
            if summary is not None and true(summary):
                return summary
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {self.summary()}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)
        subprocess.run(["ip", "netns", "del", self.namespace], check=True, timeout=10)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def sent_more_than(packets: int, servers: int = 1) -> Callable[[ProbeSummary], bool]:
    return lambda s: sum(1 for p in s.servers if p.packets_sent > packets) >= servers


def test_a_quiet_server_shows_no_fault_and_every_count_agrees(world: World) -> None:
    world.guest(11)
    world.add("calm", 11)
    probe = world.probe()
    world.until(sent_more_than(500))
    probe.send_signal(signal.SIGTERM)
    assert probe.wait(15) == 0
    records = read_probe(world.tmp / "out")
    server = records.summary.servers[0]
    assert records.summary.state == "final"
    exact = count(records.arrivals["calm"], complete=True)
    assert exact.sent == server.packets_sent > 500
    assert exact.received == server.packets_received == exact.sent
    assert (server.packets_lost, exact.lost, exact.duplicated, exact.reordered) == (0, 0, 0, 0)
    assert server.tcp_sessions_broken == server.http_failures == server.reboots == 0
    assert server.tcp_lines > 20
    assert server.http_requests > 10
    assert server.heartbeats > 100
    assert server.memory_pages_verified > 500
    assert server.disk_acknowledged > 10
    assert server.answered_at is not None
    assert server.answered_at >= server.asked_at


def test_every_fault_is_counted_exactly(world: World) -> None:
    world.guest(
        11, lose=[100, 101, 250], double=[120, 130], swap=[200], fail_page=[8, 12], break_line=[30],
        reboot_after=3.0,
    )  # fmt: skip
    world.add("ill", 11)
    probe = world.probe()
    world.until(sent_more_than(1000))
    probe.send_signal(signal.SIGTERM)
    assert probe.wait(15) == 0
    records = read_probe(world.tmp / "out")
    server = records.summary.servers[0]
    exact = count(records.arrivals["ill"], complete=True)
    for lost, duplicated, reordered in (
        (server.packets_lost, server.packets_duplicated, server.packets_reordered),
        (exact.lost, exact.duplicated, exact.reordered),
    ):
        assert (lost, duplicated, reordered) == (3, 2, 1)
    assert server.http_failures == 2
    assert server.tcp_sessions_broken == 1
    assert server.reboots == 1
    assert server.tcp_error == "the server closed it"


def test_a_silence_is_a_gap_and_no_loss(world: World) -> None:
    world.guest(11, silence=[2.0, 0.4])
    world.add("slow", 11)
    probe = world.probe()
    world.until(sent_more_than(900))
    probe.send_signal(signal.SIGTERM)
    assert probe.wait(15) == 0
    server = read_probe(world.tmp / "out").summary.servers[0]
    assert server.packets_lost == 0
    assert 380 <= server.longest_gap_ms <= 520


def test_a_server_joins_late_and_a_killed_probe_leaves_its_records(world: World) -> None:
    world.guest(11)
    world.add("first", 11)
    probe = world.probe()
    world.until(sent_more_than(100))
    world.add("second", 12)
    time.sleep(0.5)
    late = world.guest(12)
    summary = world.until(sent_more_than(300, servers=2))
    second = summary.servers[1]
    assert second.answered_at is not None
    assert second.answered_at - second.asked_at > 0.5
    late.kill()
    world.until(lambda s: s.servers[1].packets_lost > 0)
    probe.kill()
    probe.wait(10)
    records = read_probe(world.tmp / "out")
    assert records.summary.state == "running"
    first, second_counts = (count(records.arrivals[n], complete=False) for n in ("first", "second"))
    assert first.sent > 300
    assert first.lost == 0
    assert second_counts.lost > 0


def test_a_refused_api_counts_and_one_that_never_was_does_not(world: World) -> None:
    world.plan["api_socket"] = str(world.tmp / "operator.sock")
    probe = world.probe()
    world.until(lambda s: s.api is not None)
    time.sleep(0.5)
    api = world.run(sys.executable, "-c", API, str(world.tmp / "operator.sock"))
    summary = world.until(lambda s: s.api is not None and s.api.requests > 5)
    assert summary.api is not None
    assert summary.api.errors == 0
    api.kill()
    summary = world.until(lambda s: s.api is not None and s.api.errors > 5)
    assert summary.api is not None
    assert "ECONNREFUSED" in summary.api.error
    probe.send_signal(signal.SIGTERM)
    assert probe.wait(15) == 0


def test_a_plan_may_change_its_pace(world: World) -> None:
    world.guest(11)
    world.add("slower", 11)
    probe = world.probe()
    world.until(sent_more_than(300))
    world.plan |= {"udp_pps": 20, "tcp_interval": 0.5, "http_interval": 2.0}
    world.write_plan()
    before = world.until(lambda s: s.packets_per_second == 20)
    world.until(lambda s: s.updated_at > before.updated_at + 3.0)
    probe.send_signal(signal.SIGTERM)
    assert probe.wait(15) == 0
    after = read_probe(world.tmp / "out").summary
    sent = after.servers[0].packets_sent - before.servers[0].packets_sent
    assert 20 < sent < 250 * 3
    assert (after.servers[0].packets_lost, after.servers[0].http_failures) == (0, 0)


def test_a_plan_that_is_none_is_refused(world: World) -> None:
    world.plan["udp_pps"] = 0
    assert world.probe().wait(15) == 2


API = """
import asyncio, sys
async def answer(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\n{}")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_unix_server(answer, sys.argv[1])
    await server.serve_forever()
asyncio.run(main())
"""
