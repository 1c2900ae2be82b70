"""What limits and shares mean, what is changed to reach them, and how it is said to the kernel."""

import msgspec
import pytest

from nahtlos.model.config import NetworkConfig, PortConfig, UnderlayShares
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec, PortBandwidth, Rate
from nahtlos.physical.network import device_names, netlink
from nahtlos.physical.network.bandwidth import ports as shaping
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.bandwidth import underlay as shares
from nahtlos.physical.network.bandwidth.ports import Found, Limits, Root, Todo
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Request

MEGABIT = 1_000_000
PORT = PortId("server-port")
TAP = device_names.tap_name(PORT)
BUCKET = tc.Bucket(rate=625_000, burst=6250, limit=70_000)
OTHER = tc.Bucket(rate=6_250_000, burst=62_500, limit=312_500)


def rate(megabits: float, burst: int = 0) -> Rate:
    return Rate(bits_per_second=int(megabits * MEGABIT), burst_bytes=burst)


# --- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "mtu", "expected"),
    [
        (rate(5), 1500, tc.Bucket(625_000, 6250, 70_000)),
        (rate(1), 1500, tc.Bucket(125_000, 6000, 70_000)),
        (rate(500), 1500, tc.Bucket(62_500_000, 625_000, 3_125_000)),
        (rate(500, burst=20_000), 1500, tc.Bucket(62_500_000, 20_000, 3_125_000)),
        (rate(5, burst=100), 1500, tc.Bucket(625_000, 1518, 70_000)),
        (rate(5), 9000, tc.Bucket(625_000, 9018, 70_000)),
        (Rate(bits_per_second=1), 1500, tc.Bucket(1, 6000, 70_000)),
        (None, 1500, None),
    ],
)
def test_a_rate_is_a_bucket_that_lets_a_frame_pass(
    wanted: Rate | None, mtu: int, expected: tc.Bucket | None
) -> None:
    assert shaping.bucket(wanted, mtu) == expected


def test_ingress_is_what_the_server_receives() -> None:
    spec = NetworkSpec(
        id=NetworkId("n"),
        vni=1,
        cidr="10.0.0.0/24",
        gateway_ip="",
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip="10.0.0.2",
    )
    port = PortConfig(
        id=PORT,
        server=ServerId("s"),
        mac="52:54:00:00:00:01",
        ip="10.0.0.5",
        host=HostId("h"),
        vtep="",
        bandwidth=PortBandwidth(ingress=rate(5)),
    )
    limits = shaping.limits_of(port, NetworkConfig(spec=spec, ports=(), gateway_vtep="", vteps=()))
    assert limits == Limits(received=BUCKET, sent=None)


# --- what is changed ---------------------------------------------------------------------------------


def htb(index: int, bucket: tc.Bucket | None) -> Root:
    return Root(tc.Qdisc(index, "htb", tc.HANDLE, tc.ROOT, default=tc.ONLY), bucket)


def foreign(index: int) -> Root:
    return Root(tc.Qdisc(index, "tbf", 0x10000, tc.ROOT), None)


def shaper(*, up: bool = True, alias: str = shaping.ALIAS + PORT) -> LinkInfo:
    name = shaping.shaper_name(TAP)
    return LinkInfo(8, name, "ifb", up, "", 1500, 0, alias, None)


def found(**values: object) -> Found:
    return msgspec.structs.replace(Found(TAP, 7), **values)


WHOLE = Limits(received=BUCKET, sent=BUCKET)
RIGHT = found(root=htb(7, BUCKET), ingress=True, leads_to=8, shaper=shaper(), shaper_root=htb(8, BUCKET))


@pytest.mark.parametrize(
    ("wanted", "there", "words"),
    [
        (WHOLE, RIGHT, []),
        (Limits(), found(), []),
        (WHOLE, found(), ["receives was missing", "sends was missing"]),
        (WHOLE, msgspec.structs.replace(RIGHT, root=htb(7, OTHER)), ["receives was different"]),
        (WHOLE, msgspec.structs.replace(RIGHT, root=foreign(7)), ["receives was different"]),
        (WHOLE, msgspec.structs.replace(RIGHT, leads_to=9), ["sends was different"]),
        (WHOLE, msgspec.structs.replace(RIGHT, shaper=shaper(up=False)), ["sends was different"]),
        (WHOLE, msgspec.structs.replace(RIGHT, shaper=shaper(alias="")), ["sends was different"]),
        (WHOLE, msgspec.structs.replace(RIGHT, shaper_root=None), ["sends was different"]),
        (Limits(), RIGHT, ["receives was not asked for: removed", "sends was not asked for: removed"]),
        (Limits(), found(root=foreign(7)), ["receives was not asked for: removed"]),
    ],
)
def test_differences_are_said_and_nothing_if_there_is_none(
    wanted: Limits, there: Found, words: list[str]
) -> None:
    said = shaping.differences(wanted, there, PORT)
    assert len(said) == len(words)
    assert all(word in text for word, text in zip(words, said, strict=True))
    todo = Todo.nothing()
    shaping.plan_port(todo, wanted, there)
    if not words:
        assert todo == Todo.nothing()


def test_a_change_is_made_in_place() -> None:
    todo = Todo.nothing()
    shaping.plan_port(todo, Limits(received=OTHER, sent=BUCKET), RIGHT)
    assert [r.kind for r in todo.puts] == [tc.RTM_NEWQDISC, tc.RTM_NEWTCLASS]
    assert (todo.lifts, todo.removals) == ([], [])


def test_what_goes_is_lifted_first_and_the_redirection_ends_before_its_device() -> None:
    todo = Todo.nothing()
    shaping.plan_port(todo, Limits(), RIGHT)
    assert todo.puts == []
    assert [r.kind for r in todo.lifts] == [tc.RTM_NEWTCLASS, tc.RTM_NEWTCLASS]
    assert todo.emptying == [7, 8]
    assert [r.kind for r in todo.removals] == [tc.RTM_NEWQDISC, tc.RTM_DELQDISC, netlink.RTM_DELLINK]
    assert b"noqueue" in todo.removals[0].body


def test_what_is_foreign_is_replaced() -> None:
    todo = Todo.nothing()
    shaping.plan_port(todo, Limits(received=BUCKET), found(root=foreign(7)))
    assert todo.puts[0].flags & netlink.REPLACE
    assert todo.emptying == []


# --- the format --------------------------------------------------------------------------------------


def dumped(request: Request) -> bytes:
    """As the kernel would tell it: a request for a class has the same form."""
    return request.body


@pytest.mark.parametrize("per_second", [125_000, 62_500_000, 12_500_000_000])
def test_a_class_is_read_as_it_was_written(per_second: int) -> None:
    wanted = tc.Class(tc.HANDLE | 0x20, tc.HANDLE | 1, per_second, 2 * per_second, 10_000, 20_000, 1, 3000)
    read = tc.class_of(dumped(tc.put_class(3, wanted, "x")))
    assert read is not None
    assert (read.rate, read.ceiling, read.parent, read.priority) == (
        per_second,
        2 * per_second,
        wanted.parent,
        1,
    )
    assert wanted.like(read)


def test_another_rate_burst_or_limit_is_not_alike() -> None:
    assert BUCKET.like(BUCKET)
    assert BUCKET.like(tc.Bucket(BUCKET.rate, BUCKET.burst - 1, BUCKET.limit))
    assert not BUCKET.like(tc.Bucket(BUCKET.rate + 1, BUCKET.burst, BUCKET.limit))
    assert not BUCKET.like(tc.Bucket(BUCKET.rate, BUCKET.burst + 200, BUCKET.limit))
    assert not BUCKET.like(tc.Bucket(BUCKET.rate, BUCKET.burst, BUCKET.limit + 1))
    assert not BUCKET.like(None)


def test_a_redirection_is_read_as_it_was_written() -> None:
    read = tc.filter_of(dumped(tc.redirect(7, 8, "x")))
    assert read is not None
    assert (read.protocol, read.to_device) == (tc.ANY_PROTOCOL, 8)
    assert tc.matches_everything(read)


def test_a_filter_that_does_something_else_leads_nowhere() -> None:
    read = tc.filter_of(dumped(tc.classify(7, tc.ARP, tc.HANDLE | 0x10, "x")))
    assert read is not None
    assert (read.protocol, read.to_class, read.to_device) == (tc.ARP, tc.HANDLE | 0x10, 0)


# --- shares ------------------------------------------------------------------------------------------

SHARES = UnderlayShares(bits_per_second=100 * MEGABIT, control=10, moves=30, tenants=60)


def test_shares_are_guaranteed_and_may_borrow_the_whole() -> None:
    tree = shares.tree_of(SHARES)
    whole, *leaves = tree.classes
    assert (whole.rate, whole.ceiling) == (12_500_000, 12_500_000)
    assert [leaf.rate for leaf in leaves] == [1_250_000, 3_750_000, 7_500_000]
    assert {leaf.ceiling for leaf in leaves} == {12_500_000}
    assert set(tree.queues) == {leaf.handle for leaf in leaves}


@pytest.mark.parametrize(
    ("control", "moves", "tenants"), [(10, 30, 60), (50, 100, 150), (0, 0, 100), (1, 1, 1)]
)
def test_no_more_is_guaranteed_than_there_is(control: int, moves: int, tenants: int) -> None:
    wanted = UnderlayShares(bits_per_second=8_000_000, control=control, moves=moves, tenants=tenants)
    whole, *leaves = shares.tree_of(wanted).classes
    assert sum(leaf.rate for leaf in leaves) <= whole.rate + len(leaves)
    assert all(leaf.rate > 0 for leaf in leaves)


def as_found(tree: shares.Tree) -> shares.Found:
    return shares.Found(
        index=2,
        root=tc.Qdisc(2, "htb", tc.HANDLE, tc.ROOT, default=shares.TENANTS),
        classes={c.handle: c for c in tree.classes},
        queues={
            owner: tc.Qdisc(2, "bfifo", shares.queue_handle(owner), owner, limit=limit)
            for owner, limit in tree.queues.items()
        },
        filters=(tc.Filter(tc.ARP, to_class=tc.HANDLE | shares.CONTROL, keys=1),),
    )


def test_a_tree_that_is_right_is_not_touched() -> None:
    tree = shares.tree_of(SHARES)
    assert shares.changes(tree, as_found(tree), "eth0") == []


def test_other_shares_change_classes_in_place() -> None:
    there = as_found(shares.tree_of(SHARES))
    other = UnderlayShares(bits_per_second=100 * MEGABIT, control=10, moves=60, tenants=30)
    requests = shares.changes(shares.tree_of(other), there, "eth0")
    assert [r.kind for r in requests] == [tc.RTM_NEWTCLASS, tc.RTM_NEWTCLASS]


def test_what_is_no_tree_of_ours_is_replaced_by_a_whole_one() -> None:
    bare = shares.Found(2, None, {}, {}, ())
    kinds_ = [r.kind for r in shares.changes(shares.tree_of(SHARES), bare, "eth0")]
    assert kinds_ == [
        tc.RTM_NEWQDISC,
        *[tc.RTM_NEWTCLASS] * 4,
        *[tc.RTM_NEWQDISC] * 3,
        tc.RTM_NEWTFILTER,
    ]


def test_rules_name_tunnels_streams_and_control() -> None:
    text = shares.rules_of("up0", shares.Ports(control=(7443, 7444), moves=(49152, 49215)))
    lines = [line.strip() for line in text.splitlines()]
    order = [
        lines.index("meta priority set 6e61:10"),
        lines.index("tcp dport 49152-49215 meta priority set 6e61:20"),
        lines.index("tcp sport { 7443, 7444 } meta priority set 6e61:10"),
        lines.index("udp dport 4789 meta priority set 6e61:30"),
    ]
    assert order == sorted(order), "the last word counts"
    assert 'oifname != "up0" accept' in lines


def test_what_keeps_nothing_counts_as_nothing_at_the_root() -> None:
    def at_root(kind: str, handle: int) -> tc.Qdisc:
        return tc.Qdisc(index=7, kind=kind, handle=handle, parent=tc.ROOT)

    assert tc.roots([at_root("noqueue", 0x83090000), at_root("mq", 0)]) == {}
    assert list(tc.roots([at_root("tbf", 0x10000)])) == [7]
