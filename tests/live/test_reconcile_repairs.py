"""What somebody breaks by hand is put right: exactly that, told in words, and nothing else is written."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from handover_play import EDGE, A, B, C, Machine, Stage
from network_namespaces import missing_programs

from nahtlos.physical.network import device_names

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
HERE, THERE, FAR = "52:54:00:4d:00:0a", "52:54:00:4d:00:0b", "10.99.0.12"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, hosts=3)
    try:
        yield stage
    finally:
        await asyncio.to_thread(stage.close)


def picture(stage: Stage, host: str) -> dict[str, Any]:
    """All that the driver is answerable for, by names that outlive a device's end."""
    command = stage.hosts[host].command
    found: dict[str, Any] = {}
    for link in msgspec.json.decode(command("ip", "-j", "-d", "link", "show")):
        info = link.get("linkinfo", {})
        kept = ("learning", "flood", "mcast_flood", "bcast_flood", "neigh_suppress", "hairpin")
        found[link["ifname"]] = (
            *(link.get(k) for k in ("mtu", "master", "ifalias", "txqlen")),
            link["address"] if info.get("info_kind") == "bridge" else "",
            "UP" in link["flags"],
            *(info.get("info_data", {}).get(k) for k in ("id", "local", "learning", "mcast_snooping")),
            *(info.get("info_slave_data", {}).get(k) for k in kept),
        )
    entries = msgspec.json.decode(command("bridge", "-j", "fdb", "show"))
    kept = ("mac", "ifname", "dst", "master", "state")
    found["entries"] = sorted(
        str([e.get(k) for k in kept])
        for e in entries
        if not e["mac"].startswith(("33:33", "01:00")) and (e.get("state") != "permanent" or "dst" in e)
    )
    found["neighbours"] = sorted(command("ip", "neigh", "show", "nud", "permanent").splitlines())
    found["addresses"] = sorted(re.findall(r"inet6? (?!fe80)(\S+).* (\S+)$", command("ip", "addr"), re.M))
    rules = msgspec.json.decode(command("nft", "-j", "list", "ruleset"))["nftables"]
    found["rules"] = sorted(map(rule, rules))
    return found


def rule(entry: dict[str, Any]) -> str:
    """Without what counts by itself, and without the order in which a set happens to be listed."""
    (kind, value), *_ = entry.items()
    for part in value.get("expr", ()):
        if "counter" in part:
            part["counter"] = None
    if "elem" in value:
        value["elem"] = sorted(map(str, value["elem"]))
    return str((kind, {k: v for k, v in value.items() if k != "handle"}))


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """By subject: what is gone and what is new."""
    found: dict[str, Any] = {}
    for key in before | after:
        was, now = before.get(key, ()), after.get(key, ())
        if was != now:
            found[key] = ([x for x in was if x not in now], [x for x in now if x not in was])
    return found


Break = tuple[str, str, str, int]
"""Where, what is done by hand, the words that tell of it, and how many requests may put it right."""
BREAKS: tuple[Break, ...] = (
    (A, f"bridge fdb del {HERE} dev {{tap}} master", f"forwarding of {HERE}", 1),
    (A, f"bridge fdb replace {THERE} dev {{tap}} master static", f"forwarding of {THERE}", 1),
    (A, f"bridge fdb del 00:00:00:00:00:00 dev vx100 dst {FAR} self", f"for broadcasts to {FAR}", 1),
    (A, f"bridge fdb replace {THERE} dev vx100 dst 10.99.0.99 self", f"tunnel entry for {THERE}", 2),
    (EDGE, f"bridge fdb del {HERE} dev vx100 self", f"tunnel entry for {HERE}", 1),
    (EDGE, f"bridge fdb del {HERE} dev vx100 master", f"forwarding of {HERE}", 1),
    (A, "bridge fdb flush dev vx100", "was missing", 20),
    (A, "bridge fdb add 52:54:00:4d:00:77 dev vx100 master static", "was not asked for", 1),
    (A, "ip neigh del 10.77.0.11 dev br100", "neighbour 10.77.0.11", 1),
    (A, "ip neigh replace 10.77.0.11 lladdr 02:00:00:00:00:09 dev br100 nud permanent", "neighbour", 1),
    (A, "ip neigh flush dev br100 nud permanent", "neighbour", 8),
    (A, "ip link set {tap} mtu 1300", "tun {tap}", 4),
    (A, "ip link set br100 mtu 1300", "bridge br100", 4),
    (A, "ip link set {tap} txqueuelen 500", "tun {tap}", 2),
    (A, "ip link set {tap} down", "tun {tap}", 2),
    (A, "ip link set vx100 down", "vxlan vx100", 20),
    (A, "ip link set gb100 nomaster", "veth gb100", 5),
    (A, "ip link set {tap} nomaster", "tun {tap}", 6),
    (A, "ip link set br100 address 02:00:00:00:00:99", "bridge br100", 10),
    (A, "bridge link set dev {tap} flood on learning on", "flooding settings of {tap}", 1),
    (A, "bridge link set dev {tap} bcast_flood off mcast_flood off", "flooding settings of {tap}", 1),
    (A, "bridge link set dev gb100 bcast_flood on", "flooding settings of gb100", 1),
    (A, "bridge link set dev vx100 neigh_suppress off", "flooding settings of vx100", 1),
    (A, "ip link set br100 type bridge mcast_snooping 1", "bridge br100", 3),
    (A, "sysctl -qw net.ipv4.conf.br100.arp_ignore=0", "arp_ignore", 0),
    (EDGE, "ip addr del 10.77.0.1/24 dev br100", "address 10.77.0.1/24", 6),
    (A, "nft delete table netdev nahtlos", "packet filter", 0),
    (A, "nft flush chain netdev nahtlos vx100", "packet filter", 0),
    (A, "nft add rule netdev nahtlos vx100 drop", "packet filter", 0),
    (A, "nft flush ruleset", "packet filter", 0),
    (A, "ip link del gm100", "veth gm100", 12),
    (A, "ip link del vx100", "vxlan vx100", 30),
    (A, "ip link del br100", "bridge br100", 60),
    (EDGE, "ip link del br100", "bridge br100", 60),
)


async def test_each_break_is_repaired_and_nothing_else(stage: Stage) -> None:
    here, there = stage.machine(10, A), stage.machine(11, B)
    watching = stage.machine(12, C)
    await stage.opened(here, there, watching)
    assert await stage.reconcile_all() == dict.fromkeys(stage.hosts, ())
    tap = device_names.tap_name(here.port)
    for number, (where, command, words, limit) in enumerate(BREAKS):
        host, before = stage.hosts[where], picture(stage, where)
        host.command(*command.format(tap=tap).split())
        assert picture(stage, where) != before or command.startswith("sysctl"), command
        writes = host.driver.writes
        found = await stage.reconcile(where)
        assert any(words.format(tap=tap) in text for text in found), (command, found)
        assert host.driver.writes - writes <= limit, (command, host.driver.writes - writes, found)
        after = picture(stage, where)
        assert differences(before, after) == {}, command
        writes = host.driver.writes
        assert await stage.reconcile(where) == (), command
        assert host.driver.writes == writes, command
        await passes(watching, here, number, command)
        await passes(here, there, number, command)


async def passes(sender: Machine, receiver: Machine, number: int, after: str) -> None:
    sender.say(sender.frame_to(receiver.mac, receiver.ip, number))
    for _ in range(100):
        if number in receiver.received:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"no frame passes after: {after}")


async def test_a_break_in_the_middle_of_a_move(stage: Stage) -> None:
    """What the move needs is put right too, or left to the move; and it ends well."""
    mover, other = stage.machine(10, A), stage.machine(12, C)
    await stage.opened(mover, other)
    talker = stage.talk(other, 1, mover.mac, mover.ip)
    move = stage.move(B, mover)
    await move.begin()
    for host in (A, B):
        stage.hosts[host].command("nft", "flush", "ruleset")
        words = await stage.reconcile(host, mover.port)
        assert any("packet filter" in text for text in words)
        assert HERE in stage.hosts[host].command("nft", "list", "set", "netdev", "nahtlos", "moving100")
    began = len(mover.received)
    await move.switch()
    await asyncio.sleep(0.1)
    stage.hosts[B].command("ip", "neigh", "del", other.ip, "dev", "br100")
    assert len(await stage.reconcile(B, mover.port)) == 1
    await move.finish()
    await asyncio.sleep(0.1)
    sent = talker.stop()
    await asyncio.sleep(0.1)
    numbers = {n - 1_000_000 for n in mover.received}
    assert set(range(sent)) - numbers == set(), began
