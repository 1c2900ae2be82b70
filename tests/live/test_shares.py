"""Shares of an underlay with real traffic: each class gets its own, and alone nearly all."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.bandwidth import MEGABIT, PERCENT, SHARES, WHOLE, flow_of
from benchmarks.bandwidth_site import PORTS, Cable, run
from network_namespaces import missing_programs

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, UnderlayShares
from nahtlos.model.ids import HostId
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.bandwidth import underlay as shares
from nahtlos.physical.network.netlink import Netlink

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    with Cable() as cable:
        yield cable


def rates(cable: Cable, *names: str) -> dict[str, float]:
    """Mbit/s of frames that arrive of flows side by side."""
    arrived = run([flow_of(cable, name) for name in names], 2.0)
    return {name: a.frames(0.5, a.ended - a.began) / MEGABIT for name, a in zip(names, arrived, strict=True)}


def test_side_by_side_each_gets_its_share(cable: Cable) -> None:
    cable.share(SHARES)
    got = rates(cable, "moves", "tenants")
    assert got["moves"] > 0.9 * PERCENT["moves"], got
    assert got["tenants"] > 0.9 * PERCENT["tenants"], got
    assert sum(got.values()) < 1.1 * WHOLE
    got = rates(cable, "control", "moves", "tenants")
    assert all(got[name] > 0.9 * PERCENT[name] for name in PERCENT), got


@pytest.mark.parametrize("name", ["control", "moves", "tenants"])
def test_alone_each_gets_nearly_all(cable: Cable, name: str) -> None:
    cable.share(SHARES)
    got = rates(cable, name)[name]
    assert 0.85 * WHOLE < got < 1.1 * WHOLE


class Near:
    """The part of one agent at the near end of a cable."""

    def __init__(self, cable: Cable, record: Path) -> None:
        self._cable, self._record = cable, record
        self.start()

    def restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        self._part.close()
        self.netlink.close()

    def start(self) -> None:
        self.netlink = topology.within(self._cable.name("near"), Netlink)
        self._part = shares.Shares("eth0", PORTS, self._record, lambda: self.netlink)

    def reconcile(self, wanted: UnderlayShares | None) -> tuple[str, ...]:
        config = HostConfig(host=HostId("near"), generation=1, release=None, underlay=wanted)
        return topology.within(
            self._cable.name("near"), lambda: asyncio.run(self._part.reconcile(config, {}))
        )

    def command(self, program: str, line: str) -> None:
        where = f"--net={topology.NAMESPACES / self._cable.name('near')}"
        subprocess.run(
            ("nsenter", where, program, *line.split()), check=True, capture_output=True, timeout=20
        )

    def roots(self) -> list[str]:
        return [q.kind for q in tc.roots(tc.read_qdiscs(self.netlink)).values()]


@pytest.fixture
def near(cable: Cable, tmp_path: Path) -> Iterator[Near]:
    cable.share(None)
    near = Near(cable, tmp_path / "shares.json")
    yield near
    near.reconcile(None)
    near.close()


@pytest.mark.parametrize(
    ("program", "line", "words"),
    [
        ("tc", "qdisc del dev eth0 root", "shares of eth0 were missing"),
        ("tc", "class change dev eth0 classid 6e61:20 htb rate 1mbit ceil 100mbit", "were different"),
        ("tc", "class del dev eth0 classid 6e61:20", "were different"),
        ("tc", "filter del dev eth0 parent 6e61:", "were different"),
        ("tc", "qdisc replace dev eth0 root handle 1: tbf rate 1mbit burst 5k limit 9k", "were missing"),
        ("nft", "flush ruleset", "rules for the shares of eth0 were different"),
        ("nft", "flush chain inet nahtlos-shares output", "rules for the shares of eth0 were different"),
    ],
)
def test_what_was_changed_by_hand_is_put_right_and_said(
    near: Near, program: str, line: str, words: str
) -> None:
    assert near.reconcile(SHARES) == ()
    assert near.reconcile(SHARES) == ()
    near.command(program, line)
    (found,) = near.reconcile(SHARES)
    assert words in found
    assert near.reconcile(SHARES) == ()


def test_what_is_right_is_not_touched_and_a_change_is_no_drift(near: Near) -> None:
    near.reconcile(SHARES)
    near.reconcile(SHARES)
    near.restart()
    assert near.reconcile(SHARES) == ()
    assert near.netlink.writes == 0
    assert near.reconcile(UnderlayShares(bits_per_second=50 * MEGABIT, moves=60, tenants=30)) == ()
    assert near.netlink.writes == 7, "four classes, three queues; no qdisc anew"
    assert near.roots() == ["htb"]


def test_without_shares_the_interface_is_left_alone(near: Near) -> None:
    near.reconcile(SHARES)
    near.reconcile(None)
    assert near.roots() == []
    near.command("tc", "qdisc add dev eth0 root handle 5: tbf rate 900mbit burst 50k limit 900k")
    assert near.reconcile(None) == ()
    assert near.roots() == ["tbf"]
    near.command("tc", "qdisc del dev eth0 root")
