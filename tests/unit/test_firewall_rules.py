"""The firewall's compiler: what rules mean, as lines and as a judgement, and the way to new tables."""

import json
from ipaddress import ip_address, ip_network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import HostId, NetworkId, PortId, SecurityGroupId, ServerId
from nahtlos.model.networking import (
    AddressPair,
    Direction,
    Family,
    NetworkSpec,
    SecurityGroupSpec,
    SecurityRule,
)
from nahtlos.physical.network.firewall import guard as firewall_guard
from nahtlos.physical.network.firewall import layout as firewall
from nahtlos.physical.network.firewall import rules as firewall_rules
from nahtlos.physical.network.firewall.flows import Standing, flow_of, narrowed
from nahtlos.physical.network.firewall.layout import ESTABLISHED, NEW, Judge, Moving, Tracking
from nahtlos.physical.network.firewall.rules import Flow, Members, rule_lines
from nahtlos.physical.network.firewall.tables import (
    BRIDGE,
    Chain,
    Comparison,
    Elements,
    Observed,
    ObservedTable,
    Table,
    Written,
    decode,
    digest,
    key_text,
)
from nahtlos.physical.network.netlink import attribute, nested
from nahtlos.physical.network.parts import LocalPort
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.ports import MoveRole

IN, OUT = Direction.INGRESS, Direction.EGRESS
WEB, CLIENTS = SecurityGroupId("web"), SecurityGroupId("clients")
TCP, UDP = 6, 17


def rule(**fields: object) -> SecurityRule:
    return SecurityRule(**{"direction": IN, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_", "lines"),
    [
        (rule(), ["meta protocol ip accept"]),
        (rule(family=Family.IPV6), ["meta protocol ip6 accept"]),
        (
            rule(protocol="tcp", port_min=80, port_max=80),
            ["meta protocol ip meta l4proto 6 th dport 80 accept"],
        ),
        (
            rule(protocol="udp", port_min=5, port_max=9),
            ["meta protocol ip meta l4proto 17 th dport 5-9 accept"],
        ),
        (rule(protocol="17", port_min=5), ["meta protocol ip meta l4proto 17 th dport 5-65535 accept"]),
        (rule(protocol="47"), ["meta protocol ip meta l4proto 47 accept"]),
        (rule(protocol="icmp"), ["meta protocol ip meta l4proto 1 accept"]),
        (rule(protocol="icmp", port_min=8), ["meta protocol ip icmp type 8 accept"]),
        (
            rule(protocol="icmp", port_min=3, port_max=4, family=Family.IPV6),
            ["meta protocol ip6 icmpv6 type 3 icmpv6 code 4 accept"],
        ),
        (rule(remote_cidr="10.0.0.7/8"), ["meta protocol ip ip saddr 10.0.0.0/8 accept"]),
        (rule(remote_cidr="0.0.0.0/0"), ["meta protocol ip accept"]),
        (
            rule(direction=OUT, remote_cidr="fd00::1", family=Family.IPV6),
            ["meta protocol ip6 ip6 daddr fd00::1/128 accept"],
        ),
        # What cannot be meant allows nothing.
        (rule(remote_cidr="fd00::/8"), []),
        (rule(remote_cidr="nonsense"), []),
        (rule(protocol="nonsense"), []),
        (rule(protocol="256"), []),
        (rule(protocol="47", port_min=1), []),
        (rule(port_min=80, port_max=80), []),
        (rule(protocol="tcp", port_min=9, port_max=5), []),
        (rule(protocol="tcp", port_min=9, port_max=65536), []),
        (rule(protocol="icmp", port_min=256), []),
    ],
)
def test_a_rule_says_what_it_means(given_: SecurityRule, lines: list[str]) -> None:
    assert list(rule_lines(given_, {})) == lines


def test_a_group_is_its_members_and_what_they_may_send_from() -> None:
    asked = rule(remote_group=CLIENTS)
    single = firewall_rules.member_set(CLIENTS, Family.IPV4)
    wide = firewall_rules.member_set(CLIENTS, Family.IPV4, prefixes=True)
    assert list(rule_lines(asked, {})) == [f"meta protocol ip ip saddr @{single} accept"]
    members = {(CLIENTS, Family.IPV4): Members(prefixes=("10.9.0.0/24",))}
    assert len(rule_lines(asked, members)) == 2 and f"@{wide}" in rule_lines(asked, members)[1]
    config = config_of(
        port(1, CLIENTS),
        port(2, WEB),
        msgspec.structs.replace(port(3, CLIENTS), allowed_pairs=(AddressPair(cidr="10.9.0.0/24"),)),
    )
    found = firewall_rules.membership(config, frozenset({CLIENTS}))
    assert found[CLIENTS, Family.IPV4] == Members(frozenset({"10.0.0.1", "10.0.0.3"}), ("10.9.0.0/24",))
    assert found[CLIENTS, Family.IPV6] == Members(frozenset({"fd00::1", "fd00::3"}))


# --- a judgement agrees with the lines ---------------------------------------------------------------

addresses = st.integers(0, 2**32 - 1).map(lambda n: str(ip_address(n)))
prefixes = st.tuples(addresses, st.integers(0, 32)).map(lambda p: f"{p[0]}/{p[1]}")
ports = st.integers(0, 65535)
some_rules = st.builds(
    SecurityRule,
    direction=st.sampled_from(Direction),
    protocol=st.sampled_from(["", "tcp", "udp", "icmp", "47", "6"]),
    port_min=st.none() | ports,
    port_max=st.none() | ports,
    remote_cidr=st.just("") | prefixes,
)
flows = st.builds(
    Flow,
    zone=st.just(1),
    source=addresses,
    destination=addresses,
    protocol=st.sampled_from([1, TCP, UDP, 47]),
    port=ports,
    code=st.integers(0, 255),
)


def says(line: str, flow: Flow, direction: Direction) -> bool:
    """An interpreter of the few words that lines are made of."""
    words = line.removesuffix(" accept").split()
    remote = flow.source if direction is IN else flow.destination
    while words:
        match words:
            case ["meta", "protocol", "ip", *words]:
                continue
            case ["ip", ("saddr" | "daddr") as end, prefix, *words]:
                assert (end == "saddr") is (direction is IN)
                if ip_address(remote) not in ip_network(prefix):
                    return False
            case ["meta", "l4proto", number, *words]:
                if flow.protocol != int(number):
                    return False
            case ["th", "dport", span, *words]:
                low, _, high = span.partition("-")
                if not int(low) <= flow.port <= int(high or low):
                    return False
            case ["icmp", "type", kind, *words]:
                if (flow.protocol, flow.port) != (1, int(kind)):
                    return False
            case ["icmp", "code", code, *words]:
                if flow.code != int(code):
                    return False
            case _:
                raise AssertionError(words)
    return True


@given(st.lists(some_rules, max_size=5), flows, st.sampled_from(Direction))
def test_connections_are_judged_as_packets_are(
    rules: list[SecurityRule], flow: Flow, direction: Direction
) -> None:
    group = SecurityGroupSpec(id=WEB, rules=tuple(rules))
    lines = firewall_rules.group_lines(group, direction, {})
    by_lines = any(says(line, flow, direction) for line in lines)
    assert firewall_rules.allowed(flow, [group], direction, {}) is by_lines


# --- the whole ---------------------------------------------------------------------------------------


def port(number: int, *groups: SecurityGroupId) -> PortConfig:
    return PortConfig(
        id=PortId(f"port-{number}"),
        server=ServerId(f"server-{number}"),
        mac=f"52:54:00:00:00:{number:02X}",
        ip=f"10.0.0.{number}",
        addresses=(f"fd00::{number:x}",),
        host=HostId("host-1"),
        vtep="10.99.0.11",
        security_groups=groups,
    )


def network(*ports_: PortConfig, vni: int = 100) -> NetworkConfig:
    spec = NetworkSpec(
        id=NetworkId(f"net-{vni}"),
        vni=vni,
        cidr="10.0.0.0/24",
        gateway_ip="10.0.0.254",
        gateway_mac="",
        gateway_host=HostId("edge-1"),
        dhcp_ip="10.0.0.253",
    )
    return NetworkConfig(spec=spec, ports=ports_, gateway_vtep="", vteps=())


def config_of(*ports_: PortConfig, groups: tuple[SecurityGroupSpec, ...] = ()) -> HostConfig:
    return HostConfig(
        host=HostId("host-1"),
        generation=1,
        release=None,
        networks=(network(*ports_),),
        security_groups=groups,
    )


def local(*ports_: PortConfig, vni: int = 100) -> list[LocalPort]:
    return [LocalPort(p, network(*ports_, vni=vni), f"tp{p.id}") for p in ports_]


def compiled(
    *ports_: PortConfig,
    groups: tuple[SecurityGroupSpec, ...] = (),
    moving: tuple[Moving, ...] = (),
    way: Tracking = Tracking.NETFILTER,
) -> tuple[Table, ...]:
    held = firewall.policy(config_of(*ports_, groups=groups), ports_)
    return firewall.tables(held, local(*ports_), moving, way)


OPEN = SecurityGroupSpec(id=WEB, rules=(rule(),))


def test_ports_without_groups_cost_nothing_but_the_guard() -> None:
    (bridge,) = compiled(port(1), port(2), groups=(OPEN,))
    assert set(bridge.chains) == set(firewall_guard.CHAINS)
    assert set(bridge.sets) == set(firewall_guard.DECLARATIONS)
    assert '"tpport-1" . 52:54:00:00:00:01 . 10.0.0.1' in bridge.sets["ipv4"].items


def test_a_stateless_group_tracks_nothing() -> None:
    stateless = msgspec.structs.replace(OPEN, stateful=False)
    (bridge,) = compiled(port(1, WEB), groups=(stateless,))
    lines = [line for chain in bridge.chains.values() for line in chain.rules]
    assert not any("ct " in line or f"{ESTABLISHED:#x}" in line or f"{NEW:#x}" in line for line in lines)


def test_another_port_of_known_groups_is_elements_only() -> None:
    few = compiled(port(1, WEB), groups=(OPEN,))
    more = compiled(port(1, WEB), port(2, WEB), groups=(OPEN,))
    assert [t.chains for t in few] == [t.chains for t in more]
    changes = Comparison(more, observed_of(few), written_of(few)).changes()
    assert all(line.startswith("add element bridge") for line in changes.text.splitlines())
    assert "10.0.0.1 " not in changes.text


def test_a_changed_rule_rewrites_one_chain_however_many_have_it() -> None:
    many = [port(n, WEB) for n in range(1, 200)]
    before = compiled(*many, groups=(OPEN,))
    after = compiled(*many, groups=(SecurityGroupSpec(id=WEB, rules=(rule(protocol="tcp"),)),))
    changes = Comparison(after, observed_of(before), written_of(before)).changes()
    chain = firewall_rules.group_chain(WEB, IN)
    assert changes.text.splitlines() == [
        f"flush chain bridge nahtlos-firewall {chain}",
        f"add rule bridge nahtlos-firewall {chain} meta protocol ip meta l4proto 6 accept",
    ]
    assert changes.words == ()


def test_a_group_nobody_knows_allows_nothing() -> None:
    (bridge, inet) = compiled(port(1, WEB))
    assert bridge.chains[firewall_rules.group_chain(WEB, IN)].rules == ()
    assert inet.sets["zones"].items == {'"br100"': "100"}


def test_the_source_of_a_move_judges_by_mac_and_the_destination_trusts_it() -> None:
    mover = port(10, WEB)
    source = Moving(mover, 100, "tpport-10", MoveRole.SOURCE)
    bridge = compiled(mover, groups=(OPEN,), moving=(source,))[0]
    ((found, verdict),) = bridge.sets["passed_on"].items.items()
    assert found == '"vx100" . 52:54:00:00:00:0a'
    lenient = bridge.chains[verdict.removeprefix("goto ")].rules
    strict = bridge.chains[firewall.profile_chain(mover, IN)].rules
    assert [line for line in lenient if line not in strict] == [f"meta mark {firewall.INVALID:#x} accept"]
    destination = msgspec.structs.replace(source, role=MoveRole.DESTINATION)
    bridge = compiled(mover, groups=(OPEN,), moving=(destination,))[0]
    assert set(bridge.sets["arriving"].items) == {
        f'"{device}" . "tpport-10" . 52:54:00:00:00:0a' for device in ("vx100", "gb100")
    }
    assert not bridge.sets["passed_on"].items


@pytest.mark.parametrize(("marked", "chain"), [(True, "passed_on_marked"), (False, "passed_on")])
def test_what_a_source_does_not_let_in_is_the_destinations_business_if_that_knows(
    marked: bool, chain: str
) -> None:
    mover = port(10, WEB)
    source = Moving(mover, 100, "tpport-10", MoveRole.SOURCE, marked)
    bridge, _ = compiled(port(1, WEB), groups=(OPEN,), moving=(source,))
    (verdict,) = bridge.sets["passed_on"].items.values()
    assert verdict == f"goto {firewall.profile_chain(mover, chain)}"
    lines = bridge.chains[firewall.profile_chain(mover, chain)].rules
    assert lines[-1] == (f"meta mark set {NEW:#x} accept" if marked else "goto ingress_rest")
    destination = Moving(mover, 100, "tpport-10", MoveRole.DESTINATION, marked)
    bridge, _ = compiled(port(1, WEB), groups=(OPEN,), moving=(destination,))
    known = {name: bool(bridge.sets[name].items) for name in ("arriving", "arriving_marked")}
    assert known == {"arriving": not marked, "arriving_marked": marked}


def test_known_connections_take_a_short_way_where_all_groups_are_stateful() -> None:
    stateless = msgspec.structs.replace(OPEN, id=SecurityGroupId("less"), stateful=False)
    other = port(2, SecurityGroupId("less"))
    (fast, *_), (slow, *_) = (
        compiled(port(1, WEB), groups=(OPEN,)),
        compiled(port(1, WEB), other, groups=(OPEN, stateless)),
    )
    known = f"meta mark {ESTABLISHED:#x}"
    assert fast.chains["egress"].rules[0] == f"{known} accept"
    assert fast.chains["ingress"].rules[:2] == (
        f"{known} oifname . ether daddr vmap @passed_on",
        f"{known} accept",
    )
    for name in ("egress", "ingress"):
        assert fast.chains[name].rules[-1] == slow.chains[name].rules[-1]
        assert known not in "".join(slow.chains[name].rules), "a stateless group asks for each packet"
        written = digest(fast.chains[name].text)
        assert firewall.is_too_fast(BRIDGE, name, slow.chains[name], written)
        assert not firewall.is_too_fast(BRIDGE, name, fast.chains[name], digest(slow.chains[name].text))


def test_a_mark_is_believed_of_arriving_ports_only() -> None:
    bridge, inet = compiled(port(1, WEB), groups=(OPEN,))
    assert bridge.chains["let_in"].rules[-1] == "meta mark set meta mark and 0xffffffef"
    zone, out = inet.chains["zone"].rules, inet.chains["tunnels"].rules
    assert zone.index("udp dport 4789 ip dscp 0x3 meta mark set 0x6e6c0010") < zone.index(
        "udp dport 4789 notrack"
    )
    assert zone[0].endswith("return"), "what servers send is none of the tunnels', whatever it looks like"
    assert out[0] == "udp dport 4789 meta mark 0x6e6c0010 ip dscp set 0x3"


def test_a_kernel_that_tracks_on_bridges_is_asked_there() -> None:
    bridge, inet = compiled(port(1, WEB), groups=(OPEN,), way=Tracking.BRIDGE)
    assert set(inet.chains) == {"marked", "marks"}, "only the tunnels' headers are looked at there"
    zone, classify = bridge.chains["zone"], bridge.chains["classify"]
    assert "ct zone set meta ibrname map @zones" in zone.rules
    assert "prerouting priority -250" in zone.base, "before connections are tracked, at -200"
    assert "prerouting priority -150" in classify.base, "and after"


def test_what_a_port_may_say_it_is() -> None:
    pairs = (
        AddressPair(cidr="10.9.0.0/25"),
        AddressPair(cidr="10.9.0.128/25"),
        AddressPair(cidr="10.9.1.1/32", mac="52:54:00:00:00:FF"),
        AddressPair(cidr="fd01::/64"),
    )
    (found,) = [
        firewall_guard.elements(p) for p in local(msgspec.structs.replace(port(1), allowed_pairs=pairs))
    ]
    mine, other = '"tpport-1" . 52:54:00:00:00:01', '"tpport-1" . 52:54:00:00:00:ff'
    assert found["macs"] == [mine, other]
    assert set(found["ipv4"]) == {f"{mine} . 10.0.0.1", f"{other} . 10.9.1.1"}
    assert found["ipv4_prefixes"] == [f"{mine} . 10.9.0.0/24"], "as few as possible, none within another"
    assert set(found["ipv6"]) >= {f"{mine} . fd00::1", f"{mine} . fe80::5054:ff:fe00:1"}
    assert found["hardware"] == ['"tpport-1" . 0x525400000001', '"tpport-1" . 0x5254000000ff']
    assert f"{mine} . 0xfd000000000000000000000000000001" in found["targets"]
    assert found["target_prefixes"] == [f"{mine} . 0xfd01{'0' * 28}-0xfd01{'0' * 12}{'f' * 16}"]


# --- comparing ---------------------------------------------------------------------------------------


def observed_of(tables: tuple[Table, ...]) -> Observed:
    """A kernel in which `tables` were just made. It lists a chain as whatever it was told."""
    return {
        t.family: ObservedTable(
            {name: f"listed {digest(chain.text)}" for name, chain in t.chains.items()},
            {name: dict(elements.items) for name, elements in t.sets.items()},
            {name for name, elements in t.sets.items() if elements.values},
        )
        for t in tables
    }


def written_of(tables: tuple[Table, ...]) -> dict[str, Written]:
    return {
        f"{t.family}/{name}": Written(digest(chain.text), f"listed {digest(chain.text)}")
        for t in tables
        for name, chain in t.chains.items()
    }


words = st.sampled_from(["a", "b", "c", "d"])
some_tables = st.builds(
    Table,
    family=st.just("bridge"),
    chains=st.dictionaries(words, st.builds(Chain, st.lists(words, max_size=2).map(tuple)), max_size=3),
    sets=st.dictionaries(
        words, st.builds(Elements, st.just("type mark;"), st.dictionaries(words, st.just(""))), max_size=3
    ),
)


def carried_out(text: str, observed: Observed, desired: Table) -> Observed:
    """What a kernel would make of these commands; refuses what it would refuse."""
    table = observed.setdefault("bridge", ObservedTable({}, {}, set()))
    rules: dict[str, list[str]] = {}
    for line in text.splitlines():
        verb, kind, rest = line.split(" ", 2)
        name, _, more = rest.removeprefix("bridge nahtlos-firewall").strip().partition(" ")
        keys = [k.strip() for k in more.strip("{} ").split(",")] if kind == "element" else []
        match verb, kind:
            case "add", "table":
                continue
            case "add", "chain":
                table.chains[name] = "empty"
                rules[name] = []
            case "add", "set":
                table.sets[name] = {}
            case "flush", "chain":
                assert name in table.chains
                rules[name] = []
            case "add", "rule":
                rules[name].append(more)
            case "add", "element":
                table.sets[name].update(dict.fromkeys(keys, ""))
            case "delete", "element":
                for key in keys:
                    del table.sets[name][key]
            case "delete", "chain":
                del table.chains[name]
                rules.pop(name)
            case "delete", "set":
                del table.sets[name]
            case _:
                raise AssertionError(line)
    for name, lines in rules.items():
        table.chains[name] = f"listed {digest(Chain(tuple(lines), '').text)}"
    assert set(table.chains) == set(desired.chains)
    return observed


@given(some_tables, some_tables)
def test_changes_lead_from_anything_to_what_is_wanted_and_no_further(before: Table, after: Table) -> None:
    observed, written = observed_of((before,)), written_of((before,))
    changes = Comparison((after,), observed, written).changes()
    assert changes.words == (), "nothing of this is drift"
    found = carried_out(changes.text, observed, after)
    assert found == observed_of((after,))
    assert Comparison((after,), found, written_of((after,))).changes().text == ""


@given(some_tables, some_tables)
def test_what_others_changed_is_put_right_and_told(wanted: Table, there: Table) -> None:
    observed = observed_of((there,))
    changes = Comparison((wanted,), observed, written_of((wanted,)), trusted=True).changes()
    altered = {n for n, c in wanted.chains.items() if there.chains.get(n) != c}
    for name in altered:
        assert any(f"chain {name} " in word for word in changes.words)
    assert set(changes.chains) == {f"bridge/{name}" for name in altered}, "and what is right is not touched"


def test_what_is_not_known_stays_where_it_is_asked_to() -> None:
    wanted = Table("bridge", {}, {"macs": Elements("", {'"tp1" . a': ""})})
    there: Observed = {"bridge": ObservedTable({}, {"macs": {'"tp1" . b': "", '"tp2" . c': ""}})}
    kept = Comparison((wanted,), there, {}, kept=frozenset({'"tp2"'})).changes()
    assert kept.text.splitlines() == [
        'delete element bridge nahtlos-firewall macs { "tp1" . b }',
        'add element bridge nahtlos-firewall macs { "tp1" . a }',
    ]


def test_elements_read_as_they_are_written() -> None:
    cases = {
        "tp1": '"tp1"',
        "52:54:00:00:00:01": "52:54:00:00:00:01",
        "10.0.0.1": "10.0.0.1",
        "FE80::1": "fe80::1",
        "0x00ff": "0xff",
    }
    for listed, written in cases.items():
        assert key_text(listed) == written
    assert key_text(255) == "0xff"
    assert key_text({"concat": ["tp1", {"prefix": {"addr": "10.0.0.0", "len": 8}}]}) == '"tp1" . 10.0.0.0/8'
    assert key_text({"range": [0, "0xff"]}) == "0x0-0xff"
    assert key_text({"elem": {"val": "10.0.0.1", "comment": "x"}}) == "10.0.0.1"


def test_a_listing_shows_sets_and_maps_of_this_table_only() -> None:
    of = {"family": "bridge", "table": "nahtlos-firewall"}
    listing = [
        {"table": {"family": "bridge", "name": "nahtlos-firewall"}},
        {"set": {**of, "name": "macs", "elem": [{"concat": ["tp1", "52:54:00:00:00:01"]}]}},
        {"map": {**of, "name": "ingress", "map": "verdict", "elem": [["tp1", {"goto": {"target": "x"}}]]}},
        {"set": {"family": "bridge", "table": "other", "name": "macs"}},
        {"table": {"family": "inet", "name": "nahtlos"}},
    ]
    documents = [{"nftables": listing}, {"nftables": [{"metainfo": {}}]}]
    found = decode("\n".join(json.dumps(document) for document in documents).encode())
    sets = {"macs": {'"tp1" . 52:54:00:00:00:01': ""}, "ingress": {'"tp1"': "goto x"}}
    assert found == {"bridge": ObservedTable({}, sets, {"ingress"})}


# --- connections -------------------------------------------------------------------------------------


def flow(source: str, destination: str, number: int, protocol: int = TCP, zone: int = 100) -> Flow:
    return Flow(zone, source, destination, protocol, number)


def test_who_is_judged_and_by_what() -> None:
    web = SecurityGroupSpec(
        id=WEB,
        rules=(
            rule(protocol="tcp", port_min=80, port_max=80),
            rule(protocol="tcp", port_min=22, port_max=22, remote_group=CLIENTS),
        ),
    )
    here, member = port(1, WEB), port(2, CLIENTS)
    held = firewall.policy(config_of(here, member, groups=(web,)), [here])
    judge = Judge(held, local(here))
    assert judge.allows(flow("10.0.0.9", "10.0.0.1", 80))
    assert not judge.allows(flow("10.0.0.9", "10.0.0.1", 81))
    assert judge.allows(flow("10.0.0.2", "10.0.0.1", 22))
    assert not judge.allows(flow("10.0.0.9", "10.0.0.1", 22))
    assert not judge.allows(flow("10.0.0.1", "10.0.0.9", 80)), "what it begins, by rules for that"
    assert judge.allows(flow("10.0.0.1", "255.255.255.255", 67, UDP)), "it may have an address"
    assert judge.allows(flow("10.0.0.2", "10.0.0.9", 81)), "of nobody here"
    assert judge.allows(flow("10.0.0.9", "10.0.0.1", 81, zone=200)), "of another network"


def test_only_what_became_less_is_judged_again() -> None:
    def standing(
        groups: tuple[SecurityGroupSpec, ...], *found: PortConfig, others: tuple[PortConfig, ...] = ()
    ) -> Standing:
        held = firewall.policy(config_of(*found, *others, groups=groups), found)
        return Standing.of(held, {p.id: (p, 100) for p in found})

    one, two = rule(protocol="tcp", port_min=80, port_max=80), rule(remote_group=CLIENTS)
    web = SecurityGroupSpec(id=WEB, rules=(one, two))
    less = SecurityGroupSpec(id=WEB, rules=(two,))
    here, member, newcomer = port(1, WEB), port(2, CLIENTS), port(3, CLIENTS)
    both = standing((web,), here, others=(member, newcomer))
    before = standing((web,), here, others=(member,))
    assert narrowed(before, both) == frozenset()
    assert narrowed(both, before) == {100}, "a member less"
    assert narrowed(standing((less,), here, others=(member,)), before) == frozenset()
    assert narrowed(before, standing((less,), here, others=(member,))) == {100}, "a rule less"
    assert narrowed(None, before) == {100}, "nobody knows what was before"
    assert narrowed(before, standing((web,), here, port(4, WEB), others=(member,))) == {100}, "a port more"
    assert narrowed(standing((web,), here), standing((web,), port(1))) == {100}, "not in that group any more"
    assert before.digest() == standing((web,), here, others=(member,)).digest() != both.digest()


def entry(*protocol: bytes, status: int = 0) -> conntrack.Entry:
    ends = nested(1, attribute(1, bytes((10, 0, 0, 1))), attribute(2, bytes((10, 0, 0, 2))))
    values = {
        conntrack.TUPLE_ORIG: ends + nested(2, *protocol),
        conntrack.STATUS: status.to_bytes(4, "big"),
    }
    return conntrack.Entry(2, values)


def test_flows_are_read_from_the_kernels_entries() -> None:
    tcp = (attribute(1, b"\x06"), attribute(2, b"\x30\x39"), attribute(3, b"\x00\x50"))
    assert flow_of(entry(*tcp), 7) == Flow(7, "10.0.0.1", "10.0.0.2", TCP, 80)
    ping = (attribute(1, b"\x01"), attribute(4, b"\x00\x01"), attribute(5, b"\x08"), attribute(6, b"\x00"))
    assert flow_of(entry(*ping), 7) == Flow(7, "10.0.0.1", "10.0.0.2", 1, 8, 0)
    assert flow_of(entry(*tcp, status=conntrack.SRC_NAT), 7) is None
