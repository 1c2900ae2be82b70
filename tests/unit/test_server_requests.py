"""What servers may be given, from their creation and while they run, and what projects may have in all: what
is refused, with field and remedy, and what is made of what is not."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from volume_world import OLD, Site, host, server, volume

from nahtlos.model.blueprint import Blueprint, HostIntent, PlannedMove
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import NetworkId, OperationId, PortId, ProjectId, ServerId, VolumeId
from nahtlos.model.inventory import Accelerator, ComputeStatus, Inventory
from nahtlos.model.networking import DEFAULT_PROJECT, NetworkSpec, PortSpec, Rate
from nahtlos.model.nouns import CpuShare, ServerSpec, Size
from nahtlos.model.prediction import Experience
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.model.server_snapshots import MEMORY_SNAPSHOTS
from nahtlos.model.storage import DiskLimits
from nahtlos.model.topology import Topology
from nahtlos.runtime.controllers.cloud import ServerChange, ServerRequest
from nahtlos.runtime.controllers.project_requests import (
    changed_limits,
    check_project,
    known_projects,
    project_view,
)
from nahtlos.runtime.controllers.projects import ProjectChange
from nahtlos.runtime.controllers.server_requests import changed_server, with_hardware
from nahtlos.runtime.controllers.server_snapshot_requests import taking
from nahtlos.runtime.controllers.server_snapshots import ServerSnapshotRequest
from nahtlos.runtime.controllers.share_requests import check_shares_somewhere
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.store.intent import HostRow, ServerRow, VolumeRow

WEB, DB, WEB_DISK, WEB_DATA = ServerId("web"), ServerId("db"), VolumeId("web-disk"), VolumeId("web-data")
BLUE = NetworkId("blue")
TCG = Accelerator(name="tcg", reason="the only one here")
KVM = Accelerator(name="kvm", reason="a probe booted")


def web(**changes: Any) -> ServerSpec:
    """2 vCPUs of at most 4, 512 MiB of 256 to 1280."""
    plain = msgspec.structs.replace(
        server("web", "web-disk", "web-data"),
        size=Size(vcpus=2, memory_mib=512),
        max_vcpus=4,
        boot_memory_mib=256,
        max_memory_mib=1280,
        ports=(
            PortSpec(id=PortId("web-eth0"), network=BLUE, mac="52:54:00:4d:00:01", ip="10.1.0.10"),
            PortSpec(id=PortId("web-eth1"), network=BLUE, mac="52:54:00:4d:00:02", ip="10.1.0.11"),
        ),
    )
    return msgspec.structs.replace(plain, **changes)


class Stage:
    """Two hosts of 8 vCPUs and 4096 MiB; `web` on the first of them, and what a test puts beside it."""

    def __init__(self, spec: ServerSpec | None = None, *beside: ServerSpec) -> None:
        self.site = Site(2)
        self.site.want(volume("web-disk", 1), volume("web-data", 2), *(volume(s.volume, 1) for s in beside))
        for each in (spec or web(), *beside):
            self.site.serve(each, 1)
        for _ in range(3):
            self.site.plan()
        assert self.site.blueprint is not None and len(self.site.blueprint.servers) == 1 + len(beside)

    @property
    def blueprint(self) -> Blueprint:
        assert self.site.blueprint is not None
        return self.site.blueprint

    def state(self, **changes: Any) -> State:
        policy = self.site.policy
        network = NetworkSpec(
            id=BLUE,
            vni=100,
            cidr="10.1.0.0/24",
            gateway_ip="10.1.0.1",
            gateway_mac="",
            gateway_host=host(1),
            dhcp_ip="10.1.0.2",
        )
        plain = State(
            hosts={name: HostRow(spec=spec, intent=HostIntent.ACTIVE) for name, spec in policy.hosts.items()},
            servers={
                name: ServerRow(
                    spec=spec,
                    created_at=0.0,
                    removed_at=None,
                    placement=host(1),
                    move_requested=False,
                    move_to=None,
                )
                for name, spec in policy.servers.items()
            },
            volumes={name: VolumeRow(spec=spec, removed=False) for name, spec in policy.volumes.items()},
            networks=(network,),
            functions=Topology(),
            promised=Size(),
            parallel_moves=1,
            release=OLD,
            storage_release=None,
            network_release=None,
            campaign=None,
            blueprint=self.blueprint,
            configs={},
            inventories={},
            received={},
            refusals={},
            begun_at={},
            machine_types={},
            release_versions={OLD: "11.1.3"},
            ended=frozenset(),
            experience=Experience(),
        )
        return replace(plain, **changes)

    def inventory(self, **of_web: Any) -> Inventory:
        """`of_web`: as its host reports it."""
        seen = self.site.look()
        here = msgspec.structs.replace(
            seen.hosts[host(1)],
            accelerator=TCG,
            servers=tuple(
                msgspec.structs.replace(s, **of_web) if s.id == WEB else s
                for s in seen.hosts[host(1)].servers
            ),
        )
        return msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): here})

    def set(self, *, state: State | None = None, seen: Inventory | None = None, **asked: Any) -> ServerSpec:
        return self.all(state=state, seen=seen, **asked).server

    def all(self, *, state: State | None = None, seen: Inventory | None = None, **asked: Any) -> Any:
        return changed_server(state or self.state(), seen or self.inventory(), WEB, ServerChange(**asked))


def refusal(call: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    assert caught.value.field and caught.value.remedy, "every refusal says where and what to do"
    return caught.value


# --- from the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "field", "remedy"),
    [
        ({"max_vcpus": 1}, "max_vcpus", "give 2 to 64"),
        ({"max_vcpus": 65}, "max_vcpus", "give 2 to 64"),
        ({"max_vcpus": -2}, "max_vcpus", "give 2 to 64"),
        ({"max_memory_mib": 128}, "max_memory_mib", "give 200 to"),
        ({"max_memory_mib": 2 << 20}, "max_memory_mib", "give 200 to"),
        ({"max_memory_mib": 1024}, "max_memory_mib", "give 968 or 1096"),
        ({"max_memory_mib": 201}, "max_memory_mib", "give 328"),
        ({"cpu": CpuShare(quota=201)}, "cpu_quota", "give 1 to 200"),
        ({"cpu": CpuShare(quota=-1)}, "cpu_quota", "give 1 to 200"),
        ({"cpu": CpuShare(weight=0)}, "cpu_weight", "give 1 to 10000"),
        ({"cpu": CpuShare(weight=10001)}, "cpu_weight", "give 1 to 10000"),
    ],
)
def test_what_no_machine_can_be(asked: dict[str, Any], field: str, remedy: str) -> None:
    plain = msgspec.structs.replace(server("new", "new-disk"), size=Size(vcpus=2, memory_mib=200))
    error = refusal(lambda: with_hardware(ServerRequest(name="new", **asked), plain))
    assert (error.field, remedy in error.remedy) == (field, True), error


def test_what_is_there_from_the_start_is_what_it_was_created_with() -> None:
    plain = msgspec.structs.replace(server("new", "new-disk"), size=Size(vcpus=2, memory_mib=200))
    asked = ServerRequest(name="new", max_vcpus=8, max_memory_mib=968, cpu=CpuShare(quota=150, weight=20))
    made = with_hardware(asked, plain)
    assert (made.max_vcpus, made.boot_memory_mib, made.max_memory_mib) == (8, 200, 968)
    assert made.cpu == CpuShare(quota=150, weight=20)
    assert with_hardware(ServerRequest(name="new"), plain) == plain, "nothing can be plugged unless asked for"
    assert with_hardware(ServerRequest(name="new", max_memory_mib=200), plain) == plain


# --- while it runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({}, "server", "nothing to change"),
        ({"vcpus": 5}, "vcpus", "more vCPUs than the machine's shape allows"),
        ({"vcpus": 0}, "vcpus", "0 vCPUs"),
        ({"memory_mib": 255}, "memory_mib", "less than the 256 MiB that are there from the start"),
        ({"memory_mib": 1284}, "memory_mib", "more memory than the machine's shape allows"),
        ({"memory_mib": 514}, "memory_mib", "blocks of 4 MiB"),
        ({"cpu_quota": 201}, "cpu_quota", "201% of a processor for 2 vCPUs"),
        ({"cpu_quota": -5}, "cpu_quota", "-5%"),
        ({"cpu_quota": 101, "vcpus": 1}, "cpu_quota", "101% of a processor for 1 vCPU"),
        ({"cpu_weight": 0}, "cpu_weight", "weight of 0"),
        ({"net_in": Rate(bits_per_second=5)}, "net_in", "5 bit/s cannot be shaped"),
        ({"net_out": Rate(bits_per_second=10**12)}, "net_out", "cannot be shaped"),
        ({"iops": -1}, "iops", "web-disk: iops of -1"),
        ({"bytes_per_second": -1}, "bytes_per_second", "web-disk: bytes of -1"),
    ],
)
def test_what_it_cannot_be_given(asked: dict[str, Any], field: str, message: str) -> None:
    error = refusal(lambda: Stage().set(**asked))
    assert (error.field, message in error.message) == (field, True), error


def test_a_host_without_control_groups_is_asked_for_no_share_and_another_one_is_named() -> None:
    stage = Stage()
    seen = stage.inventory()
    without = msgspec.structs.replace(seen.hosts[host(1)], no_shares="there is no cpu controller")
    seen = msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): without})
    for asked, field in (({"cpu_quota": 50}, "cpu_quota"), ({"cpu_weight": 200}, "cpu_weight")):
        error = refusal(lambda asked=asked: stage.set(seen=seen, **asked))
        assert (error.kind, error.field) == ("conflict", field)
        assert "host-1 cannot give" in error.message and "there is no cpu controller" in error.message
        assert "nahtlos server move web --to host-2" in error.remedy
    assert stage.set(seen=seen, cpu_quota=0, vcpus=3).cpu == CpuShare(), "the default needs none"
    share = CpuShare(weight=300)
    check_shares_somewhere(seen, share, None)
    assert refusal(lambda: check_shares_somewhere(seen, share, host(1))).field == "cpu_weight"
    nowhere = {name: msgspec.structs.replace(each, no_shares="none") for name, each in seen.hosts.items()}
    everywhere = msgspec.structs.replace(seen, hosts=nowhere)
    assert refusal(lambda: check_shares_somewhere(everywhere, share, None)).field == "cpu_weight"
    check_shares_somewhere(everywhere, CpuShare(), None)


def test_hardware_without_places_says_how_to_have_them() -> None:
    stage = Stage(web(max_vcpus=0, boot_memory_mib=0, max_memory_mib=0))
    assert "--max-vcpus" in refusal(lambda: stage.set(vcpus=3)).remedy
    assert "--max-memory" in refusal(lambda: stage.set(memory_mib=640)).remedy
    assert stage.set(vcpus=2, memory_mib=512, cpu_weight=50).cpu.weight == 50, "what it has is no change"


def test_everything_in_one_call_and_what_is_left_out_stays() -> None:
    rate = Rate(bits_per_second=50_000_000)
    changed = Stage().all(
        vcpus=4, memory_mib=1280, cpu_quota=400, net_in=rate, iops=500, bytes_per_second=10 << 20
    )
    assert changed.server.size == Size(vcpus=4, memory_mib=1280)
    assert changed.server.cpu == CpuShare(quota=400, weight=100)
    assert [(p.bandwidth.ingress, p.bandwidth.egress) for p in changed.server.ports] == [(rate, None)] * 2
    assert {v.id: v.limits for v in changed.volumes} == {
        WEB_DISK: DiskLimits(iops=500, bytes=10 << 20),
        WEB_DATA: DiskLimits(iops=500, bytes=10 << 20),
    }
    assert (changed.server.boot_memory_mib, changed.server.max_memory_mib) == (256, 1280)


def test_limits_are_taken_away_with_their_bursts_and_parts_are_named() -> None:
    stage = Stage()
    burst = DiskLimits(iops=100, iops_burst=200, bytes_read=5)
    stage.site.want(volume("web-disk", 1, limits=burst))
    changed = stage.all(iops=0)
    assert changed.volumes[0].limits == DiskLimits(bytes_read=5)
    error = refusal(lambda: stage.all(bytes_per_second=10))
    assert error.field == "bytes_per_second" and "web-disk" in error.message


def test_what_the_host_cannot_give_is_refused_with_what_it_could() -> None:
    beside = msgspec.structs.replace(server("db", "db-disk"), size=Size(vcpus=5, memory_mib=3328))
    stage = Stage(web(), beside)
    seen = stage.inventory()
    quick = msgspec.structs.replace(seen.hosts[host(1)], accelerator=KVM)
    seen = msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): quick})
    error = refusal(lambda: stage.set(seen=seen, vcpus=4, memory_mib=1024))
    assert error.kind == "conflict" and error.field == "vcpus"
    assert "host-1 can give web 1 vCPU and 256 MiB more" in error.message
    assert "at most 3 vCPU and 768 MiB" in error.remedy
    assert "nahtlos server move web --to host-2" in error.remedy
    emulated = refusal(lambda: stage.set(vcpus=4, memory_mib=1024))
    assert "server move" not in emulated.remedy, "with places for memory it cannot be moved there"
    assert stage.set(vcpus=3, memory_mib=768).size == Size(vcpus=3, memory_mib=768)


def test_a_host_that_has_too_little_memory_may_give_vcpus() -> None:
    """As after a loss of capacity: it has given away more than it has."""
    beside = msgspec.structs.replace(server("db", "db-disk"), size=Size(vcpus=1, memory_mib=3584))
    stage = Stage(web(), beside)
    seen = stage.inventory()
    short = msgspec.structs.replace(seen.hosts[host(1)], capacity=Size(vcpus=8, memory_mib=4000))
    seen = msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): short})
    assert stage.set(seen=seen, vcpus=3).size.vcpus == 3
    assert "0 MiB more" in refusal(lambda: stage.set(seen=seen, memory_mib=516)).message


def test_what_a_guest_has_not_given_back_is_no_one_elses() -> None:
    beside = msgspec.structs.replace(
        server("db", "db-disk"),
        size=Size(vcpus=1, memory_mib=2560),
        boot_memory_mib=2560,
        max_memory_mib=3584,
    )
    stage = Stage(web(), beside)
    held = stage.inventory(compute=ComputeStatus(vcpus=2, memory_mib=1280))

    def grow(seen: Inventory) -> ServerSpec:
        return changed_server(stage.state(), seen, DB, ServerChange(memory_mib=3584)).server

    assert grow(stage.inventory()).size.memory_mib == 3584
    assert "can give db 0 vCPU and 256 MiB more" not in refusal(lambda: grow(held)).message
    assert "256 MiB more" in refusal(lambda: grow(held)).message
    assert stage.set(seen=held, memory_mib=1280).size.memory_mib == 1280, "it may have back what it holds"


def test_its_shape_stays_while_it_moves_and_the_rest_may_change() -> None:
    stage = Stage()
    move = PlannedMove(
        id=OperationId("move-1"), server=WEB, source=host(1), destination=host(2), epoch=2, reason="asked"
    )
    state = stage.state(blueprint=msgspec.structs.replace(stage.blueprint, moves=(move,)))
    error = refusal(lambda: stage.set(state=state, vcpus=3))
    assert error.kind == "conflict" and "moving to host-2 (move-1)" in error.message
    assert "moving" in refusal(lambda: stage.set(state=state, memory_mib=768)).message
    assert stage.set(state=state, cpu_quota=50, iops=5).cpu.quota == 50


def test_an_old_hypervisor_does_not_take_vcpus_back_under_tcg() -> None:
    stage = Stage()
    seen = stage.inventory(release=OLD)
    for version in ("7.2.18", "10.0.2", "10.1.0"):
        old = stage.state(release_versions={OLD: version})
        assert "--cpu-quota" in refusal(lambda old=old: stage.set(state=old, seen=seen, vcpus=1)).remedy
        assert stage.set(state=old, seen=seen, vcpus=3).size.vcpus == 3
    for version in ("10.2.0", "11.1.3"):
        new = stage.state(release_versions={OLD: version})
        assert stage.set(state=new, seen=seen, vcpus=1).size.vcpus == 1


def test_an_old_hypervisor_does_not_save_the_memory_of_what_runs_under_tcg() -> None:
    """It would miss what the guest writes meanwhile, and nothing could tell afterwards."""
    stage = Stage()
    seen = stage.inventory(release=OLD)
    here = msgspec.structs.replace(seen.hosts[host(1)], knows=(MEMORY_SNAPSHOTS,))
    seen = msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): here})
    asked = ServerSnapshotRequest(name="then", server=WEB)
    error = refusal(lambda: taking(stage.state(release_versions={OLD: "7.2.18"}), seen, asked))
    assert ("misses" in error.message, "suspend" in error.remedy, error.field) == (True, True, "server")
    later = refusal(lambda: taking(stage.state(release_versions={OLD: "10.0.2"}), seen, asked))
    assert "misses" not in later.message, "its places for memory are what is in the way then"
    quick = msgspec.structs.replace(here, accelerator=KVM)
    under_kvm = msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): quick})
    group, _ = taking(stage.state(release_versions={OLD: "7.2.18"}), under_kvm, asked)
    assert group.memory is not None


def test_servers_in_total_stay_within_what_was_promised() -> None:
    stage = Stage()
    state = stage.state(promised=Size(vcpus=3, memory_mib=768))
    assert stage.set(state=state, vcpus=3, memory_mib=768).size.vcpus == 3
    assert refusal(lambda: stage.set(state=state, vcpus=4)).field == "vcpus"


def test_a_server_that_is_not_there_or_not_any_more() -> None:
    stage = Stage()
    with pytest.raises(NotFound):
        changed_server(stage.state(), stage.inventory(), ServerId("nobody"), ServerChange(vcpus=1))
    state = stage.state()
    gone = replace(state.servers[WEB], removed_at=1.0)
    with pytest.raises(Conflict, match="being deleted"):
        stage.set(state=replace(state, servers={WEB: gone}), vcpus=1)


# --- projects ----------------------------------------------------------------------------------------


def limited(stage: Stage, **limits: int) -> State:
    return stage.state(project_limits={DEFAULT_PROJECT: ProjectLimits(**limits)})


def test_a_project_has_its_limits_and_says_what_is_left() -> None:
    stage = Stage()
    state = limited(stage, vcpus=3, memory_mib=600)
    assert stage.set(state=state, vcpus=3, memory_mib=600).size == Size(vcpus=3, memory_mib=600)
    error = refusal(lambda: stage.set(state=state, vcpus=4))
    assert error.field == "vcpus" and "1 are left" in error.remedy
    assert "88 are left" in refusal(lambda: stage.set(state=state, memory_mib=1024)).remedy
    new = msgspec.structs.replace(server("new", "new-disk"), size=Size(vcpus=2, memory_mib=64))
    error = refusal(lambda: check_project(state, DEFAULT_PROJECT, servers={new.id: new}))
    assert "may have 3 vCPUs and would have 4" in error.message
    check_project(state, ProjectId("another"), servers={new.id: new})


def test_a_project_that_has_too_much_may_still_be_given_less() -> None:
    stage = Stage()
    assert stage.set(state=limited(stage, vcpus=1), memory_mib=256).size.memory_mib == 256


def test_disks_of_a_limited_project_are_limited() -> None:
    stage = Stage()
    state = limited(stage, iops=1000)
    error = refusal(lambda: stage.set(state=state, cpu_weight=5))
    assert error.field == "iops" and "web-disk of web is not limited" in error.message
    assert len(stage.all(state=state, iops=500).volumes) == 2
    assert "500 are left" not in refusal(lambda: stage.all(state=state, iops=501)).remedy
    assert "would have 1002" in refusal(lambda: stage.all(state=state, iops=501)).message


def test_volumes_of_a_group_share_and_are_counted_once() -> None:
    stage = Stage()
    parts = DiskLimits(iops_read=300, iops_write=200)
    stage.site.want(
        volume("web-disk", 1, limits=parts, limits_group="all"),
        volume("web-data", 2, limits_group="all"),
    )
    view = project_view(limited(stage, iops=500), DEFAULT_PROJECT)
    assert (view.used.iops, view.servers) == (500, 1)
    check_project(limited(stage, iops=500), DEFAULT_PROJECT)


def test_a_project_is_not_limited_below_what_it_has() -> None:
    stage = Stage()
    state = stage.state()
    assert known_projects(state) == (DEFAULT_PROJECT,)
    assert changed_limits(state, DEFAULT_PROJECT, ProjectChange(vcpus=2)) == ProjectLimits(vcpus=2)
    error = refusal(lambda: changed_limits(state, DEFAULT_PROJECT, ProjectChange(memory_mib=511)))
    assert error.field == "memory_mib" and "at least 512" in error.remedy
    assert (
        "not limited"
        in refusal(lambda: changed_limits(state, DEFAULT_PROJECT, ProjectChange(iops=5))).message
    )
    for bad in (ProjectChange(), ProjectChange(vcpus=-1)):
        refusal(lambda bad=bad: changed_limits(state, DEFAULT_PROJECT, bad))
    kept = limited(stage, vcpus=4)
    assert changed_limits(kept, DEFAULT_PROJECT, ProjectChange(vcpus=0)) == ProjectLimits()
    with pytest.raises(NotFound):
        project_view(state, ProjectId("nobody"))
