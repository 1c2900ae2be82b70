"""What a server is given of its host, decided without one: command lines, what has no way, what the kernel is
told, what is read back."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ServerId, VolumeId
from nahtlos.model.inventory import ComputeStatus, RunState
from nahtlos.model.nouns import CpuShare, ServerSpec, Size
from nahtlos.physical.agent.giving import has, wanted_compute, with_vcpus
from nahtlos.physical.hypervisor.cgroups import (
    CpuGroup,
    Hierarchy,
    Version,
    mounted,
    quota_us,
    share_of,
    wanted_files,
)
from nahtlos.physical.hypervisor.commandline import VmmPaths, VmmShape, server_arguments
from nahtlos.physical.hypervisor.compute import Seen, check_change, check_threads, places_of, waits_for
from nahtlos.physical.ports import VmmId, VmmStatus

FIXED = ServerSpec(
    id=ServerId("web"),
    size=Size(vcpus=2, memory_mib=512),
    volume=VolumeId("web-root"),
    ports=(),
    machine="pc-q35-10.0",
)
GROWING = msgspec.structs.replace(FIXED, max_vcpus=4, boot_memory_mib=256, max_memory_mib=1024)
VOLUME = VolumeAttachment(volume=VolumeId("web-root"), address="10.1.1.1", port=10809, export="web-root.e1")


def changed(spec: ServerSpec, **fields: Any) -> ServerSpec:
    size = {name: fields.pop(name) for name in ("vcpus", "memory_mib") if name in fields}
    return msgspec.structs.replace(spec, size=msgspec.structs.replace(spec.size, **size), **fields)


def config(spec: ServerSpec) -> ServerConfig:
    return ServerConfig(spec=spec, epoch=7, volume=VOLUME)


def arguments(spec: ServerSpec, *, incoming: bool = False) -> tuple[str, ...]:
    run = Path("/run/x")
    paths = VmmPaths(
        qmp=run / "q",
        qmp_emergency=run / "e",
        stream=run / "s",
        console=run / "c",
        console_log=run / "cl",
        log=run / "l",
        ram=Path("/dev/shm/web.7.ram"),
        record=run / "r",
    )
    shape = VmmShape(
        server=config(spec),
        paths=paths,
        pki_dir=Path("/pki"),
        accelerator="tcg",
        version=(10, 0, 2),
        incoming=incoming,
    )
    return server_arguments(shape)


def after(argv: tuple[str, ...], option: str) -> list[str]:
    return [value for name, value in pairwise(argv) if name == option]


def parts(argv: tuple[str, ...], option: str) -> dict[str, dict[str, Any]]:
    return {part["id"]: part for part in map(msgspec.json.decode, after(argv, option))}


# --- command lines ---


def test_a_server_without_places_to_plug_is_the_machine_it_always_was() -> None:
    argv = arguments(FIXED)
    assert (after(argv, "-smp"), after(argv, "-m")) == (["2"], ["512M"])
    assert not {"vcpu1", "mem0"} & parts(argv, "-device").keys()
    assert set(parts(argv, "-object")) & {"ram0", "plug0"} == {"ram0"}


def test_a_server_with_places_has_one_socket_a_vcpu_and_plugged_memory_beside_its_own() -> None:
    argv = arguments(GROWING)
    assert after(argv, "-smp") == ["1,maxcpus=4,sockets=4,cores=1,threads=1"]
    assert after(argv, "-m") == ["256M,maxmem=1024M"]
    devices, objects = parts(argv, "-device"), parts(argv, "-object")
    assert devices["vcpu1"] == {
        "driver": "qemu64-x86_64-cpu",
        "id": "vcpu1",
        "socket-id": 1,
        "core-id": 0,
        "thread-id": 0,
    }
    assert "vcpu2" not in devices
    assert (devices["mem0"]["addr"], devices["mem0"]["requested-size"]) == ("0xc", 256 << 20)
    assert (objects["ram0"]["size"], objects["plug0"]["size"]) == (256 << 20, 768 << 20)
    assert objects["plug0"]["mem-path"] == "/dev/shm/web.7.plug"


def test_what_arrives_brings_its_plugged_memory_itself_in_the_same_machine() -> None:
    booted, waiting = (parts(arguments(GROWING, incoming=i), "-device") for i in (False, True))
    assert waiting["mem0"].pop("requested-size") == 0
    booted["mem0"].pop("requested-size")
    assert booted == waiting


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"vcpus": 5}, "max_vcpus"),
        ({"max_vcpus": 1000}, "max_vcpus"),
        ({"memory_mib": 255}, "max_memory_mib"),
        ({"memory_mib": 2048}, "max_memory_mib"),
        ({"boot_memory_mib": 0}, "max_memory_mib"),
        ({"boot_memory_mib": 1024, "memory_mib": 1024}, "max_memory_mib"),
        ({"memory_mib": 258}, "memory_mib"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as refused:
        arguments(changed(GROWING, **wrong))
    assert refused.value.field == field
    assert refused.value.remedy


# --- changes ---


@pytest.mark.parametrize(
    ("now", "wanted", "field"),
    [
        (FIXED, {"vcpus": 3}, "vcpus"),
        (FIXED, {"memory_mib": 1024}, "memory_mib"),
        (FIXED, {"max_vcpus": 8}, "max_vcpus"),
        (GROWING, {"vcpus": 0}, "vcpus"),
        (GROWING, {"vcpus": 5}, "vcpus"),
        (GROWING, {"memory_mib": 252}, "memory_mib"),
        (GROWING, {"memory_mib": 1028}, "memory_mib"),
        (GROWING, {"memory_mib": 514}, "memory_mib"),
        (GROWING, {"max_memory_mib": 2048}, "max_memory_mib"),
    ],
)
def test_what_a_machine_has_no_way_to_is_refused(now: ServerSpec, wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as refused:
        check_change(now, changed(now, **wanted))
    assert refused.value.field == field
    assert refused.value.remedy


@pytest.mark.parametrize("size", [(1, 256), (4, 1024), (2, 512)])
def test_what_it_has_places_for_is_not(size: tuple[int, int]) -> None:
    check_change(GROWING, changed(GROWING, vcpus=size[0], memory_mib=size[1]))


@pytest.mark.parametrize(("wanted", "has", "begun"), [(2, 1, 1), (4, 1, 1), (4, 2, 2), (3, 2, 3), (4, 4, 4)])
def test_an_emulating_process_begins_as_many_vcpus_as_it_has_room_for(
    wanted: int, has: int, begun: int
) -> None:
    check_threads(GROWING, wanted, has, begun)


@pytest.mark.parametrize(("wanted", "has", "begun", "most"), [(4, 2, 3, 3), (2, 1, 4, 1), (3, 1, 3, 2)])
def test_and_no_more_than_that_in_its_life(wanted: int, has: int, begun: int, most: int) -> None:
    with pytest.raises(Refused, match=f"it can have {most} now") as refused:
        check_threads(GROWING, wanted, has, begun)
    assert refused.value.field == "vcpus"


@pytest.mark.parametrize(
    ("vcpus", "mib", "answers", "words"),
    [
        (2, 512, {}, ""),
        (3, 512, {}, "the guest to let go of 1 vCPUs"),
        (3, 512, {"vcpu2": 1}, "the guest to let go of 1 vCPUs, which it refuses"),
        (1, 512, {}, "1 vCPUs to be plugged"),
        (2, 384, {}, "the guest to take 128 MiB"),
        (4, 640, {}, "the guest to let go of 2 vCPUs and the guest to give back 128 MiB"),
    ],
)
def test_what_a_server_waits_for_is_said(vcpus: int, mib: int, answers: dict[str, int], words: str) -> None:
    assert waits_for(Seen(vcpus=vcpus, memory_mib=mib), GROWING, answers) == words


def test_places_for_vcpus_are_told_by_their_sockets() -> None:
    answer = [
        {"type": "c", "props": {"socket-id": 2, "core-id": 0}},
        {"type": "c", "props": {"socket-id": 1}, "qom-path": "/machine/peripheral/vcpu1"},
        {"type": "c", "props": {"socket-id": 0}, "qom-path": "/machine/unattached/device[0]"},
    ]
    found = [(place.socket, place.device, place.taken) for place in places_of(answer)]
    assert found == [(0, "", True), (1, "vcpu1", True), (2, "", False)]


# --- what an agent gives ---


def seen(spec: ServerSpec, *, state: RunState = RunState.RUNNING, **has_now: Any) -> VmmStatus:
    told: dict[str, Any] = {
        "vcpus": spec.size.vcpus,
        "memory_mib": spec.size.memory_mib,
        "cpu": spec.cpu,
        **has_now,
    }
    return VmmStatus(
        id=VmmId(spec.id, 7), state=state, release=None, size=spec.size, compute=ComputeStatus(**told)
    )


def test_only_what_differs_and_runs_is_given_anything() -> None:
    assert has(seen(GROWING), config(GROWING))
    assert not has(seen(GROWING, vcpus=3), config(GROWING))
    assert not has(seen(GROWING, cpu=CpuShare(quota=50)), config(GROWING))
    assert has(seen(GROWING, vcpus=3, state=RunState.PAUSED), config(GROWING))
    silent = msgspec.structs.replace(seen(GROWING), compute=ComputeStatus())
    assert has(silent, config(GROWING))


def test_a_server_keeps_its_hardware_and_is_given_the_rest() -> None:
    wanted = changed(GROWING, vcpus=3, cpu=CpuShare(quota=150), max_vcpus=8)
    given = wanted_compute(config(wanted), config(GROWING)).spec
    assert (given.size, given.cpu, given.max_vcpus) == (wanted.size, wanted.cpu, GROWING.max_vcpus)


def test_the_next_vmm_has_the_vcpus_the_server_has_now() -> None:
    assert with_vcpus(config(GROWING), 3).spec.size == Size(vcpus=3, memory_mib=512)
    assert with_vcpus(config(GROWING), 0) == config(GROWING)
    assert with_vcpus(config(FIXED), 1) == config(FIXED)


# --- control groups ---


def test_the_group_hierarchy_with_the_cpu_controller_is_found() -> None:
    one = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n"
    two = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
    other = "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n"
    assert [found.version for found in mounted(two + other + one)] == [Version.ONE, Version.TWO]
    assert mounted(one)[0].root == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert mounted(other) == ()


@pytest.mark.parametrize("quota", [1, 5, 10, 50, 100, 250])
def test_a_quota_is_exact_and_its_period_no_longer_than_it_must_be(quota: int) -> None:
    limit, period = quota_us(quota)
    assert limit * 100 == period * quota
    assert limit >= 1000
    assert period == 10_000 or limit == 1000


@pytest.mark.parametrize("version", list(Version))
@pytest.mark.parametrize(
    "share", [CpuShare(), CpuShare(quota=35, weight=300), CpuShare(weight=1), CpuShare(weight=10_000)]
)
def test_a_share_is_read_back_as_it_was_written(version: Version, share: CpuShare) -> None:
    files = wanted_files(version, share, 4)
    assert share_of(version, files, 4, share) == share
    if share.weight < 1000:
        assert share_of(version, files, 4, CpuShare(weight=77)) == share


def test_a_server_weighs_as_much_as_its_vcpus() -> None:
    assert wanted_files(Version.ONE, CpuShare(), 3)["cpu.shares"] == str(3 * 1024)
    assert wanted_files(Version.TWO, CpuShare(weight=50), 2)["cpu.weight"] == "100"


FILES = {
    "cgroup.subtree_control": "",
    "nahtlos/cgroup.subtree_control": "",
    "nahtlos/cgroup.procs": "",
    "nahtlos/cpu.weight": "100",
    "nahtlos/vcpus/cgroup.type": "domain",
    "nahtlos/vcpus/cgroup.threads": "",
    "nahtlos/vcpus/cpu.max": "max 100000",
}


def test_of_version_2_the_process_is_in_the_group_and_its_vcpus_in_a_threaded_one(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    group = CpuGroup(Hierarchy(version=Version.TWO, root=tmp_path), "nahtlos")
    wanted = CpuShare(quota=25, weight=300)
    assert group.observe((8,), wanted) == CpuShare()
    assert group.apply(7, (8,), wanted)
    written = {name: (tmp_path / name).read_text() for name in FILES}
    assert written == {
        "cgroup.subtree_control": "+cpu",
        "nahtlos/cgroup.subtree_control": "+cpu",
        "nahtlos/cgroup.procs": "7",
        "nahtlos/cpu.weight": "300",
        "nahtlos/vcpus/cgroup.type": "threaded",
        "nahtlos/vcpus/cgroup.threads": "8",
        "nahtlos/vcpus/cpu.max": "2500 10000",
    }
    assert group.observe((8,), wanted) == wanted
    assert not group.apply(7, (8,), wanted)


def test_a_vcpu_outside_of_the_group_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "nahtlos").mkdir()
    for name, text in wanted_files(Version.ONE, CpuShare(quota=50), 2).items():
        (tmp_path / "nahtlos" / name).write_text(text)
    (tmp_path / "nahtlos/tasks").write_text("11\n12\n")
    group = CpuGroup(Hierarchy(version=Version.ONE, root=tmp_path), "nahtlos")
    assert group.observe((11, 12), CpuShare(quota=50)) == CpuShare(quota=50)
    assert group.observe((11, 13), CpuShare(quota=50)) == CpuShare()


def test_a_group_that_cannot_be_used_is_named_with_a_remedy(tmp_path: Path) -> None:
    group = CpuGroup(Hierarchy(version=Version.ONE, root=tmp_path / "gone"), "nahtlos")
    with pytest.raises(Refused) as refused:
        group.apply(7, (8,), CpuShare(quota=50))
    assert (refused.value.field, bool(refused.value.remedy)) == ("cpu", True)
    assert not group.apply(7, (8,), CpuShare())
