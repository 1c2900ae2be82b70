"""What disks are made of, how a graph is read, and what must never be in one: all without a QEMU."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from nahtlos.model.config import RbdEndpoint, ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.model.storage import DiskLimits
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.volumes.replicas import lost_exports, wanted_disks, without
from nahtlos.physical.hypervisor import disks
from nahtlos.physical.hypervisor.disks import Edge, Graph, disk_arguments, reaches, way_of


def copy(number: int, *, joining: bool = False) -> VolumeEndpoint:
    return VolumeEndpoint(
        host=HostId(f"host-{number}"),
        address=f"10.0.0.{number}",
        port=10809,
        export=f"v.e{number}",
        joining=joining,
    )


def attached(name: str, *copies: VolumeEndpoint, **more: Any) -> VolumeAttachment:
    first = copies[0] if copies else copy(1)
    return VolumeAttachment(
        volume=VolumeId(name),
        address=first.address,
        port=first.port,
        export=first.export,
        copies=copies,
        **more,
    )


def server(system: VolumeAttachment, *data: VolumeAttachment, places: tuple[str, ...] = ()) -> ServerConfig:
    named = places or tuple(each.volume for each in data)
    spec = ServerSpec(
        id=ServerId("web"),
        size=Size(vcpus=1, memory_mib=256),
        volume=system.volume,
        ports=(),
        machine="pc-q35-10.0",
        data_volumes=tuple(VolumeId(each) for each in named),
    )
    return ServerConfig(spec=spec, epoch=1, volume=system, data_volumes=data)


def nodes(config: ServerConfig) -> dict[str, dict[str, Any]]:
    values = [v for n, v in pairwise(disk_arguments(config)) if n == "-blockdev"]
    return {node["node-name"]: node for node in map(msgspec.json.decode, values)}


def devices(config: ServerConfig) -> list[dict[str, Any]]:
    return [msgspec.json.decode(v) for n, v in pairwise(disk_arguments(config)) if n == "-device"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_write_counts_only_when_every_copy_has_it(count: int) -> None:
    found = nodes(server(attached("v", *(copy(n) for n in range(1, count + 1)))))
    (quorum,) = [node for node in found.values() if node["driver"] == "quorum"]
    assert quorum["vote-threshold"] == len(quorum["children"]) == count
    assert quorum["read-pattern"] == "fifo"
    assert found["top"]["file"] == quorum["node-name"]
    assert all(
        found[child]["tls-creds"] and not found[child]["reconnect-delay"] for child in quorum["children"]
    )


def test_one_copy_needs_no_quorum_and_waits_for_its_daemon() -> None:
    found = nodes(server(attached("v")))
    assert [node["driver"] for node in found.values()] == ["nbd", "throttle"]
    assert found[found["top"]["file"]]["reconnect-delay"] == disks.RECONNECT_SECONDS


def test_neither_a_placeholder_nor_a_copy_that_joins_ever_answers_a_read() -> None:
    found = nodes(server(attached("v", copy(1), copy(2, joining=True))))
    (quorum,) = [node for node in found.values() if node["driver"] == "quorum"]
    assert [found[child]["driver"] for child in quorum["children"]] == ["nbd", "blkdebug"]
    for node in (found[quorum["children"][1]], disks.placeholder("gone-x-1", 4096)):
        assert node["driver"] == "blkdebug"
        assert node["inject-error"] == [{"event": "none", "iotype": "read", "errno": 5, "once": False}]


def test_errors_stop_the_guest_and_names_fit() -> None:
    long = "a-volume-with-a-name-that-is-longer-than-any-node-s"
    config = server(attached("v"), attached(long, copy(1), copy(2)))
    assert all(len(name) <= 31 for name in nodes(config))
    for device in devices(config):
        assert (device["werror"], device["rerror"]) == ("stop", "stop")
        assert len(device.get("serial", "")) <= 20


def test_a_disk_keeps_its_place_when_another_goes() -> None:
    both = devices(server(attached("v"), attached("a"), attached("b")))
    one = devices(server(attached("v"), attached("b"), places=("", "b")))
    assert [d["bus"] for d in both] == ["pcie.0", "slot0", "slot1"]
    assert one[1] == both[2]


def test_what_has_no_place_is_named() -> None:
    with pytest.raises(Refused) as refused:
        disk_arguments(server(attached("v"), attached("a"), attached("b"), attached("c")))
    assert (refused.value.field, bool(refused.value.remedy)) == ("data_volumes", True)
    with pytest.raises(Refused, match="twice"):
        disk_arguments(server(attached("v"), attached("a"), attached("a")))


def test_limits_name_every_field_and_a_group_has_those_of_its_first() -> None:
    config = server(
        attached("v", limits=DiskLimits(iops=100, iops_burst=200, burst_seconds=3), limits_group="g"),
        attached("a", limits=DiskLimits(iops=7), limits_group="g"),
        attached("b", limits=DiskLimits(bytes_read=1 << 20)),
    )
    groups = disks.limits_of(config)
    assert len(groups) == 2
    shared, own = groups.values()
    assert (shared["iops-total"], shared["iops-total-max"], shared["iops-total-max-length"]) == (100, 200, 3)
    assert (own["bps-read"], own["iops-total"], own["iops-total-max-length"]) == (1 << 20, 0, 1)
    assert shared.keys() == own.keys()
    with pytest.raises(Refused, match="together"):
        disks.throttle_limits(DiskLimits(iops=1, iops_read=1))


def test_an_image_of_a_pool_is_reached_below_the_same_filter() -> None:
    rbd = RbdEndpoint(pool="p", image="v", user="u", configuration="/etc/ceph/ceph.conf")
    found = nodes(server(attached("v", rbd=rbd)))
    assert [node["driver"] for node in found.values()] == ["rbd", "throttle"]


# --- graphs ---


def graph(**edges: tuple[Edge, ...]) -> Graph:
    names = {name.replace("_", "-"): found for name, found in edges.items()}
    every = set(names) | {edge.child for found in names.values() for edge in found}
    return Graph(sizes=dict.fromkeys(every, 4096), edges=names, devices={}, groups=frozenset())


def keys(*copies: VolumeEndpoint) -> tuple[str, ...]:
    return tuple(disks.key_of(each) for each in copies)


def test_a_graph_tells_whether_it_reaches_exactly_the_wanted_copies() -> None:
    one, two = keys(copy(1), copy(2))
    members = (Edge("children.0", f"c-{one}-0"), Edge("children.1", f"c-{two}-0"))
    way = way_of(graph(top=(Edge("file", "q2-x-0"),), q2_x_0=members), "top")
    assert way is not None
    assert reaches(way, (one, two))
    assert not reaches(way, (one,))
    assert not reaches(way, keys(copy(1), copy(2, joining=True)))


@pytest.mark.parametrize(
    "third", ["gone-x-1", "c-ffffffffff-1"], ids=["placeholder", "one member more than votes"]
)
def test_what_an_interrupted_change_leaves_is_not_taken_for_whole(third: str) -> None:
    one, two = keys(copy(1), copy(2))
    members = (Edge("a", f"c-{one}-0"), Edge("b", f"c-{two}-0"), Edge("c", third))
    way = way_of(graph(top=(Edge("file", "q2-x-0"),), q2_x_0=members), "top")
    assert way is not None
    assert not reaches(way, (one, two))


def test_orphans_are_named_parents_first_and_what_a_root_uses_is_none() -> None:
    used = graph(
        top=(Edge("file", "s-aaaaaaaaaa-3"),),
        q2_x_1=(Edge("children.0", "j-bbbbbbbbbb-1"),),
        j_bbbbbbbbbb_1=(Edge("image", "c-bbbbbbbbbb-1"),),
    )
    assert used.orphans() == ("q2-x-1", "j-bbbbbbbbbb-1", "c-bbbbbbbbbb-1")
    assert used.free_number() == 4


# --- what a configuration may not bring back ---


def test_a_copy_once_lost_is_not_reached_again_by_its_old_export() -> None:
    ledger = Ledger(":memory:")
    ledger.remember("lost", {"lost/host-2 v.e2": b""})
    known = server(attached("v", copy(1)))
    told = server(attached("v", copy(1), copy(2), copy(3)))
    after = wanted_disks(told, known, lost=lost_exports(ledger), pinned=frozenset())
    assert [each.host for each in after.volume.copies] == ["host-1", "host-3"]
    again = msgspec.structs.replace(copy(2), export="v.e9")
    back = without(attached("v", copy(1), again), lost_exports(ledger))
    assert [each.export for each in back.copies] == ["v.e1", "v.e9"]
    ledger.close()


def test_what_is_said_of_a_pinned_volume_is_not_acted_on() -> None:
    held = server(attached("v", copy(1), copy(2)), attached("a"))
    told = server(attached("v", copy(1)), attached("a", limits=DiskLimits(iops=5)))
    after = wanted_disks(told, held, lost=frozenset(), pinned=frozenset({VolumeId("v")}))
    assert after.volume == held.volume
    assert after.data_volumes == told.data_volumes
