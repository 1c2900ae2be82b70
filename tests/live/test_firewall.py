"""Security groups and anti-spoofing with real packets: servers with real stacks, on two real hosts."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from firewall_stage import (
    SECOND,
    A,
    B,
    Box,
    C,
    Stage,
    advertisement,
    arp,
    both,
    downloading,
    echoes,
    ethernet,
    group,
    heard,
    icmpv6,
    ipv4,
    ipv6,
    router_advertisement,
    rule,
    solicitation,
    tcp_ack,
    udp,
)
from network_namespaces import missing_programs

from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import AddressPair, Direction, Family, SecurityGroupSpec
from nahtlos.physical.network.firewall.guard import link_local
from nahtlos.physical.ports import MoveRole

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
T = TypeVar("T")
IN, OUT = Direction.INGRESS, Direction.EGRESS
FOUR, SIX = Family.IPV4, Family.IPV6
CLIENTS = SecurityGroupId("clients")
OPEN_OUT = both(OUT)
SETTLE_SECONDS = 0.1
EVERYBODY = "ff:ff:ff:ff:ff:ff"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    try:
        yield stage
    finally:
        await asyncio.to_thread(stage.close)


def web() -> SecurityGroupSpec:
    """May be reached by TCP 80, UDP 53 and ping; 5432 by clients only; begins nothing itself but UDP 99."""
    clients = [rule(IN, "tcp", 5432, family=f, remote_group=CLIENTS) for f in Family]
    return group(
        "web",
        *both(IN, "tcp", 80),
        *both(IN, "udp", 53),
        rule(IN, "icmp", 8),
        rule(IN, "icmp", 128, family=SIX),
        *both(OUT, "udp", 99),
        *clients,
    )


async def run(act: Callable[..., T], *arguments: object) -> T:
    """Beside the hosts' loops."""
    return await asyncio.to_thread(act, *arguments)


async def test_what_groups_allow_passes_and_nothing_else(stage: Stage) -> None:
    server = stage.box(10, A, "web")
    near, far, stranger = stage.box(11, A, "clients"), stage.box(12, B, "clients"), stage.box(13, B)
    stage.groups = [web(), group("clients", *OPEN_OUT)]
    await stage.opened()
    server.serve(80, 81, 53, 54, 5432)
    stranger.serve(80, 98, 99)
    far.serve(80)
    for family in Family:
        for client in (near, far, stranger):
            who = (client.ip, family)
            assert await run(client.tcp, server, 80, family), who
            assert not await run(client.tcp, server, 81, family), who
            assert await run(client.udp, server, 53, family), who
            assert not await run(client.udp, server, 54, family), who
            assert await run(client.udp, server, 53, family, 4000), (who, "in fragments")
            assert await run(client.ping, server, family), who
            assert await run(client.tcp, server, 5432, family) is (client is not stranger), who
        assert await run(server.udp, stranger, 99, family), "and the answer comes back"
        assert not await run(server.udp, stranger, 98, family)
        assert not await run(server.tcp, stranger, 80, family)
        assert not await run(server.ping, stranger, family)
        assert not await run(stranger.tcp, far, 80, family), "a group without rules for it lets nothing in"
        assert await run(far.tcp, stranger, 80, family)
    stranger.groups = (CLIENTS,)
    assert await stage.converge() == {A: (), B: ()}
    assert await run(stranger.tcp, server, 5432), "a member from now on"
    assert await run(stranger.tcp, server, 5432, SIX)
    assert stage.hosts[A].command("cat", "/proc/sys/net/netfilter/nf_conntrack_tcp_loose").strip() == "0"


async def test_the_middle_of_no_connection_is_dropped(stage: Stage) -> None:
    server, open_, far = stage.box(10, A, "web"), stage.box(11, A), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    for to, marker in ((server, b"to the strict one"), (open_, b"to the open one")):
        for _ in range(5):
            segment = tcp_ack(far.ip, to.ip, (4444, 80), marker)
            far.say(ethernet(to.mac, far.mac, 0x0800, ipv4(far.ip, to.ip, 6, segment)))
    await asyncio.sleep(SETTLE_SECONDS)
    assert open_.got(b"to the open one"), "it passes where nothing is asked"
    assert not server.got(b"to the strict one")


async def test_a_stateless_group_asks_for_each_packet(stage: Stage) -> None:
    server, client = stage.box(10, A, "stateless"), stage.box(12, B)
    answers = [rule(OUT, "udp", family=FOUR, remote_cidr=f"{client.ip}/32")]
    stage.groups = [group("stateless", *both(IN, "udp", 53), *answers, stateful=False)]
    await stage.opened()
    server.serve(53)
    assert await run(client.udp, server, 53)
    assert await run(client.udp, server, 53, FOUR, 4000), "later fragments show no ports"
    assert not await run(client.udp, server, 53, SIX), "nothing lets the answer out"
    assert "nahtlos-firewall" not in stage.nft(A, "list tables inet"), "nothing is tracked for it"


# --- spoofing ----------------------------------------------------------------------------------------


def lies(box: Box, other: Box) -> dict[str, bytes]:
    """Frames that a server must not be able to send; each carries what it is called."""
    own6, local, everybody = box.ip6, link_local(box.mac), "ff02::1"
    multicast = "33:33:00:00:00:01"

    def four(sender: str, source: str, body: bytes) -> bytes:
        return ethernet(other.mac, sender, 0x0800, ipv4(source, other.ip, 17, body))

    def six(sender: str, source: str, body: bytes) -> bytes:
        return ethernet(multicast, sender, 0x86DD, ipv6(source, everybody, 17, body))

    def nd(source: str, body: bytes) -> bytes:
        return ethernet(multicast, box.mac, 0x86DD, icmpv6(source, everybody, body))

    def named(name: str) -> bytes:
        return udp(1000, 1000, name.encode())

    tag = "tagged IPv4 source"
    return {
        "MAC": four("52:54:00:00:00:99", box.ip, named("MAC")),
        "IPv4 source": four(box.mac, "10.77.0.99", named("IPv4 source")),
        "IPv6 source": six(box.mac, "fd77::99", named("IPv6 source")),
        "link-local source": six(box.mac, "fe80::99", named("link-local source")),
        tag: packed_tag(four(box.mac, "10.77.0.99", named(tag))),
        "MAC of another kind": ethernet(EVERYBODY, "52:54:00:00:00:99", 0x88B6, b"MAC of another kind"),
        "two tags": packed_tag(packed_tag(four(box.mac, box.ip, named("two tags")))),
        "DHCP": four(box.mac, box.ip, udp(67, 68, b"DHCP")),
        "DHCPv6": six(box.mac, own6, udp(547, 546, b"DHCPv6")),
        "ARP sender": ethernet(EVERYBODY, box.mac, 0x0806, arp(2, box.mac, "10.77.0.1", other.ip)),
        "ARP MAC": ethernet(EVERYBODY, box.mac, 0x0806, arp(2, "52:54:00:00:00:98", box.ip, other.ip)),
        "ND target": nd(own6, advertisement("fd77::1", box.mac)),
        "ND MAC": nd(own6, advertisement(own6, "52:54:00:00:00:97")),
        "ND source": nd("fd77::96", solicitation(other.ip6, box.mac)),
        "ND source MAC": nd(own6, solicitation(other.ip6, "52:54:00:00:00:95")),
        "claim": nd("::", solicitation("fd77::94", None)),
        "router": nd(local, router_advertisement()),
    }


def packed_tag(frame: bytes) -> bytes:
    """With a VLAN tag that says nothing: receivers take it off."""
    return frame[:12] + b"\x81\x00\x00\x00" + frame[12:]


def truths(box: Box, other: Box) -> dict[str, bytes]:
    """The same, as far as it is so."""
    multicast, everybody, local = "33:33:00:00:00:01", "ff02::1", link_local(box.mac)

    def nd(source: str, body: bytes) -> bytes:
        return ethernet(multicast, box.mac, 0x86DD, icmpv6(source, everybody, body))

    def four(source: str, name: str) -> bytes:
        body = ipv4(source, other.ip, 17, udp(1000, 1000, name.encode()))
        return ethernet(other.mac, box.mac, 0x0800, body)

    return {
        "IPv4": four(box.ip, "IPv4"),
        "pair": four("10.88.0.5", "pair"),
        "tagged": packed_tag(four(box.ip, "tagged")),
        "other kind": ethernet(EVERYBODY, box.mac, 0x88B6, b"other kind"),
        "link-local": ethernet(
            multicast, box.mac, 0x86DD, ipv6(local, everybody, 17, udp(1000, 1000, b"link-local"))
        ),
        "ARP": ethernet(EVERYBODY, box.mac, 0x0806, arp(2, box.mac, box.ip, other.ip)),
        "ARP of the pair": ethernet(EVERYBODY, box.mac, 0x0806, arp(2, box.mac, "10.88.0.7", other.ip)),
        "probe": ethernet(EVERYBODY, box.mac, 0x0806, arp(1, box.mac, "0.0.0.0", box.ip)),
        "ND": nd(box.ip6, advertisement(box.ip6, box.mac)),
        "ND without MAC": nd(box.ip6, advertisement(box.ip6, None)),
        "ND of the pair": nd(box.ip6, advertisement("fd88::1234", box.mac)),
        "ND link-local": nd(local, advertisement(local, box.mac)),
        "asking": nd(box.ip6, solicitation(other.ip6, box.mac)),
        "claim of its own": nd("::", solicitation(box.ip6, None)),
    }


ANSWERED_HERE = {
    "probe",
    "asking",
    "claim of its own",
    "ND",
    "ND without MAC",
    "ND of the pair",
    "ND link-local",
}
"""The bridge knows who has what: such questions and announcements go to no other host."""


async def test_a_server_cannot_pretend_to_be_another(stage: Stage) -> None:
    liar, near, far = stage.box(10, A), stage.box(11, A), stage.box(12, B)
    liar.pairs = (AddressPair(cidr="10.88.0.0/24"), AddressPair(cidr="fd88::/64"))
    await stage.opened()
    for other in (near, far):
        for kind, frames, arrives in (
            ("lie", lies(liar, other), False),
            ("truth", truths(liar, other), True),
        ):
            for name, frame in frames.items():
                shown = frame if b"\x81\x00" not in frame[12:14] else frame[16:]
                if other is far and name in ANSWERED_HERE:
                    continue
                other.delivered.clear()
                liar.say(frame)
                deadline = time.monotonic() + (2.0 if arrives else 0.02)
                while not other.got(shown[14:]) and time.monotonic() < deadline:
                    await asyncio.sleep(0.005)
                assert other.got(shown[14:]) is arrives, (kind, name, other.ip)
    counted = stage.nft(A, "list chain bridge nahtlos-firewall guest_arp")
    assert "packets 2 bytes" in counted or "packets 4 bytes" in counted, "what is dropped is counted"


# --- changes -----------------------------------------------------------------------------------------


async def test_what_is_withdrawn_is_cut_in_its_middle_and_the_rest_goes_on(stage: Stage) -> None:
    server, near, far = stage.box(10, A, "web"), stage.box(11, A, "clients"), stage.box(12, B, "clients")
    stage.groups = [web(), group("clients", *OPEN_OUT)]
    await stage.opened()
    server.serve(80, 5432)
    with downloading(near, server, 80) as kept, downloading(far, server, 5432) as member:
        other = await run(far.connect, server, 80)
        assert kept.proceeds() and member.proceeds()
        far.groups = ()
        assert await stage.converge() == {A: (), B: ()}
        assert not member.proceeds(0.3) or not member.proceeds(0.3), "no member any more: cut"
        assert kept.proceeds()
        assert await run(echoes, other), "the same client, by another rule"
        stage.groups[0] = msgspec.structs.replace(
            stage.groups[0], rules=tuple(r for r in stage.groups[0].rules if r.port_min != 80)
        )
        assert await stage.converge() == {A: (), B: ()}
        assert not kept.proceeds(0.3) or not kept.proceeds(0.3), "the rule is gone: cut"
        other.close()
        stage.groups[0] = web()
        await stage.converge()
    assert await run(near.tcp, server, 80), "allowed again"


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_rule_that_was_withdrawn_cuts_also_after_the_agent_died(
    stage: Stage, restarted: bool
) -> None:
    server, client = stage.box(10, A, "web"), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    server.serve(80)
    with downloading(client, server, 80) as download:
        assert download.proceeds()
        if restarted:
            stage.hosts[A].restart_agent()
            await stage.converge()
            assert download.proceeds()
            stage.hosts[A].restart_agent()
        stage.groups = [group("web")]
        await stage.converge()
        assert not download.proceeds(0.3) or not download.proceeds(0.3)


DRIFTS = {
    "flush ruleset": 3,
    "delete table bridge nahtlos-firewall": 1,
    "delete table inet nahtlos-firewall": 1,
    "flush chain bridge nahtlos-firewall guard": 1,
    "insert rule bridge nahtlos-firewall ingress accept": 1,
    "flush set bridge nahtlos-firewall macs": 1,
    "flush map bridge nahtlos-firewall ingress": 1,
    'add element bridge nahtlos-firewall ipv4 { "{tap}" . 52:54:00:4d:00:0a . 10.77.0.99 }': 1,
    "add chain bridge nahtlos-firewall mine": 0,
}


async def test_reconcile_restores_what_was_changed_by_hand_and_nothing_else(stage: Stage) -> None:
    server, client = stage.box(10, A, "web"), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    server.serve(80, 81)
    tap = next(name for name in stage.hosts[A].links() if name.startswith("tp"))
    whole = listed(stage)
    assert await run(client.tcp, server, 80)
    with downloading(client, server, 80) as download:
        for change, words in DRIFTS.items():
            stage.nft(A, change.replace("{tap}", tap))
            found = await stage.reconcile(A)
            assert len(found) == words, (change, found)
            assert all("packet filter" in word for word in found), found
            assert listed(stage) == whole, change
            assert await stage.reconcile(A) == (), change
            assert download.proceeds(), change
    assert not await run(client.tcp, server, 81)
    handles = stage.nft(A, "-a", "list chain bridge nahtlos-firewall guest")
    stage.nft(A, "insert rule bridge nahtlos-firewall ingress accept")
    await stage.reconcile(A)
    assert stage.nft(A, "-a", "list chain bridge nahtlos-firewall guest") == handles, (
        "what is right is not touched"
    )
    stage.hosts[A].command("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=1")
    assert "nf_conntrack_tcp_loose" in str(await stage.reconcile(A))


def listed(stage: Stage) -> str:
    """Both tables as they are, without what counts."""
    text = "".join(stage.nft(A, f"list table {family} nahtlos-firewall") for family in ("bridge", "inet"))
    return "\n".join(line.split("counter packets")[0] for line in text.splitlines())


async def test_a_restarted_agent_finds_everything_right(stage: Stage) -> None:
    server, client = stage.box(10, A, "web"), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    server.serve(80)
    before = listed(stage)
    for host in (A, B):
        stage.hosts[host].restart_agent()
    newcomer = stage.box(11, A, "web")
    await stage.boot(newcomer)  # before anything was reconciled
    assert await stage.converge() == {A: (), B: ()}
    newcomer.serve(80, 81)
    assert await run(client.tcp, newcomer, 80)
    assert not await run(client.tcp, newcomer, 81)
    stage.boxes.remove(newcomer)
    del stage.guests[newcomer.port]
    newcomer.close()
    await stage.hosts[A].call(lambda d: d.port_delete(newcomer.port))
    await stage.converge()
    assert listed(stage) == before


# --- isolation and moves -----------------------------------------------------------------------------


async def test_projects_with_the_same_addresses_never_meet(stage: Stage) -> None:
    mine, my_client = stage.box(10, A, "web"), stage.box(12, B)
    theirs, their_client = stage.box(10, A, "web", network=SECOND), stage.box(12, B, network=SECOND)
    stage.groups = [web()]
    await stage.opened()
    mine.serve(80)
    theirs.serve(80)
    for client, server, others in ((my_client, mine, theirs), (their_client, theirs, mine)):
        secret = os.urandom(16)
        with await run(client.connect, server, 80) as made:
            made.sendall(secret)
            assert made.recv(16) == secret
        assert server.got(secret)
        assert not any(box.got(secret) for box in stage.boxes if box.network is others.network)
    with downloading(my_client, mine, 80) as download:
        stage.groups[0] = msgspec.structs.replace(stage.groups[0], rules=())
        theirs.groups = ()
        mine.groups = (SecurityGroupId("mine"),)
        stage.groups.append(group("mine", *both(IN, "tcp", 80)))
        await stage.converge()
        assert download.proceeds(), "what another project does is none of its business"


async def test_connections_behind_strict_groups_survive_moves(stage: Stage) -> None:
    server, near, far = stage.box(10, A, "web"), stage.box(11, A, "clients"), stage.box(12, B, "clients")
    stage.groups = [web(), group("clients", *OPEN_OUT)]
    await stage.opened()
    server.serve(80, 81)
    idle = await run(far.connect, server, 80)
    assert await run(echoes, idle)
    with downloading(far, server, 80) as remote, downloading(near, server, 80) as local:
        for to in (B, A):
            assert remote.proceeds() and local.proceeds()
            await stage.move(server, to)
            assert remote.proceeds(2.0) and local.proceeds(2.0), to
            assert await run(echoes, idle)
            for client in (near, far):
                assert await run(client.tcp, server, 80), "new ones, too, while the old host passes them on"
                assert not await run(client.tcp, server, 81)
                segment = tcp_ack(client.ip, server.ip, (4444, 80), b"in the middle")
                client.say(ethernet(server.mac, client.mac, 0x0800, ipv4(client.ip, server.ip, 6, segment)))
            await asyncio.sleep(SETTLE_SECONDS)
            assert not server.got(b"in the middle")
            assert await stage.converge() == {A: (), B: ()}
            assert remote.proceeds() and local.proceeds()
            for reflected in stage.reflect.values():
                reflected.clear()
            assert await stage.converge() == {A: (), B: ()}
    idle.close()


async def test_what_a_server_begins_at_its_new_host_is_answered_by_way_of_the_old_one(tmp_path: Path) -> None:
    """A third host answers to where it still knows the server to be, and that host has never seen the
    question."""
    stage = Stage(tmp_path, hosts=3)
    try:
        server, third = stage.box(10, A, "clients"), stage.box(12, C)
        stage.groups = [group("clients", *OPEN_OUT)]
        await stage.reconcile(C)
        await stage.opened()
        third.serve(53)
        answered: list[bool] = []
        for to in (B, A):
            await stage.reconcile(C)
            await stage.move(server, to, arrived=lambda: answered.append(server.udp(third, 53)))
        assert answered == [True, True]
    finally:
        await asyncio.to_thread(stage.close)


async def test_a_port_that_arrives_is_guarded_from_its_first_frame_on(stage: Stage) -> None:
    """Between the switches and the end, nothing gets in that could not have before."""
    server, near, far = stage.box(10, A, "web"), stage.box(11, A), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    server.serve(80, 81)
    refused: list[bytes] = []

    def during() -> None:
        """Its path leads to the destination already; it is still nowhere."""
        for client, host in ((near, "its old host"), (far, "its new host")):
            refused.append(f"refused from {host}".encode())
            body = udp(1000, 54, refused[-1])
            client.say(ethernet(server.mac, client.mac, 0x0800, ipv4(client.ip, server.ip, 17, body)))
            allowed = udp(1000, 53, f"allowed from {host}".encode())
            client.say(ethernet(server.mac, client.mac, 0x0800, ipv4(client.ip, server.ip, 17, allowed)))
        time.sleep(SETTLE_SECONDS)

    await stage.move(server, B, during=during)
    await asyncio.sleep(SETTLE_SECONDS)
    assert server.got(b"allowed from its old host")
    assert server.got(b"allowed from its new host")
    assert not any(server.got(marker) for marker in refused)
    listing = stage.nft(A, "list ruleset bridge") + stage.nft(B, "list ruleset bridge")
    assert "gb100" not in listing, "nothing of the move is left"


async def test_a_move_that_is_given_up_leaves_nothing(stage: Stage) -> None:
    server, far = stage.box(10, A, "web"), stage.box(12, B)
    stage.groups = [web()]
    await stage.opened()
    server.serve(80)
    before = listed(stage)
    port, network = stage.port(server), stage.network
    source, destination = stage.hosts[A], stage.hosts[B]
    await destination.call(lambda d: d.port_create(port, network, deliver=False))
    address = source.node.address
    await destination.call(lambda d: d.move_prepare(port, network, MoveRole.DESTINATION, address))
    await source.call(lambda d: d.move_prepare(port, network, MoveRole.SOURCE, destination.node.address))
    assert await stage.reconcile(A, server.port) == ()
    assert "passed_on" in stage.nft(A, "list map bridge nahtlos-firewall passed_on")
    assert "vx100" in stage.nft(A, "list map bridge nahtlos-firewall passed_on"), "left alone while it moves"
    for host in (A, B):
        stage.hosts[host].restart_agent()
        stage.nft(host, "flush ruleset")
        assert await stage.reconcile(host, server.port) != ()
    assert "vx100" in stage.nft(A, "list map bridge nahtlos-firewall passed_on"), "and restored"
    assert "gb100" in stage.nft(B, "list set bridge nahtlos-firewall arriving")
    await source.call(lambda d: d.move_revert(port, network, MoveRole.SOURCE))
    await destination.call(lambda d: d.move_revert(port, network, MoveRole.DESTINATION))
    await destination.call(lambda d: d.port_delete(port.id))
    await stage.converge()
    assert await stage.converge() == {A: (), B: ()}
    assert listed(stage) == before
    assert await run(far.tcp, server, 80)


async def test_it_says_how_connections_are_tracked(stage: Stage) -> None:
    found = await stage.hosts[A].call(lambda d: d.capabilities())
    assert found.strict_stateful is found.details["firewall"].startswith("used: stateful and strict")
    assert found.strict_stateful
    assert ("nf_conntrack_bridge" in found.details["firewall"]) and os.geteuid() == 0


async def test_what_a_server_begins_at_any_moment_of_a_move_is_answered(tmp_path: Path) -> None:
    """Flows of one datagram each, to somebody on the old, the new and a third host. None is let in by a rule,
    so each answer is judged by what some host remembers, and which one knows it changes in the middle."""
    stage = Stage(tmp_path, hosts=3)
    try:
        server = stage.box(10, A, "clients")
        others = [stage.box(number, host) for number, host in ((11, A), (12, B), (13, C))]
        stage.groups = [group("clients", *OPEN_OUT)]
        await stage.reconcile(C)
        await stage.opened()
        for other in others:
            other.serve(53)
        assert all(server.udp(other, 53) for other in others)
        asked: list[socket.socket] = []

        def ask() -> None:
            asked.extend(server.ask(other, 53) for other in others)
            time.sleep(0.02)  # it is a relay that stands where a VMM would

        for to in (B, A, B):
            await stage.reconcile(C)
            await stage.move(server, to, stopping=ask, runs=ask, arrived=ask)
            await asyncio.sleep(0.05)
        silent = [n for n, sock in enumerate(asked) if not heard(sock)]
        assert silent == []
        assert len(asked) == 27
    finally:
        await asyncio.to_thread(stage.close)


async def test_nobody_else_gets_in_by_way_of_a_move(tmp_path: Path) -> None:
    """The old host passes on what it does not know; the new one lets in what it knows, and nothing else."""
    stage = Stage(tmp_path, hosts=3)
    try:
        server = stage.box(10, A, "clients")
        strangers = [stage.box(number, host) for number, host in ((11, A), (12, B), (13, C))]
        stage.groups = [group("clients", *OPEN_OUT)]
        await stage.reconcile(C)
        await stage.opened()
        server.serve(53)
        tried: list[bool] = []

        def try_it() -> None:
            tried.extend(stranger.udp(server, 53) for stranger in strangers)

        for to in (B, A):
            await stage.reconcile(C)
            await stage.move(server, to, stopping=try_it, during=try_it, runs=try_it, arrived=try_it)
        assert tried == [False] * 24
    finally:
        await asyncio.to_thread(stage.close)


async def test_a_stateless_port_that_comes_is_asked_for_each_packet_at_once(stage: Stage) -> None:
    """Before the next reconcile: known connections of the others take a shorter way."""
    stateful, peer = stage.box(10, A, "clients"), stage.box(12, B)
    stage.groups = [group("clients", *OPEN_OUT), group("less", *OPEN_OUT, stateful=False)]
    await stage.opened()
    peer.serve(53)
    assert await run(stateful.udp, peer, 53)
    late = stage.box(11, A, "less")
    await stage.converge()
    await stage.boot(late)
    assert not await run(late.udp, peer, 53), "no rule lets the answer in"
    assert await run(stateful.udp, peer, 53)
    await stage.converge()
    assert not await run(late.udp, peer, 53)
    assert await stage.converge() == {A: (), B: ()}
