"""What a VMM looks like, what its answers mean, and which bundles may run: all without a QEMU."""

import hashlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import NetworkId, PortId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.manifest import MANIFEST_NAME, ROOT_NAME, BundleFile, Manifest, digest_of
from nahtlos.model.networking import PortSpec
from nahtlos.model.nouns import Component, Release, ServerSpec, Size
from nahtlos.physical.hypervisor.bundle import Bundles
from nahtlos.physical.hypervisor.commandline import VmmPaths, VmmShape, server_arguments
from nahtlos.physical.hypervisor.keymap import keymap
from nahtlos.physical.hypervisor.migration import progress_of
from nahtlos.physical.hypervisor.vmm import run_state, tail_of, vmm_of_unit
from nahtlos.physical.ports import MigrationPhase, VmmId


def shape(*, ports: int = 2, incoming: bool = False, version: tuple[int, ...] = (10, 0, 2)) -> VmmShape:
    spec = ServerSpec(
        id=ServerId("web"),
        size=Size(vcpus=2, memory_mib=512),
        volume=VolumeId("web-root"),
        ports=tuple(
            PortSpec(id=PortId(f"p{i}"), network=NetworkId("n"), mac=f"52:54:00:00:00:0{i}", ip=f"10.0.0.{i}")
            for i in range(ports)
        ),
        machine="pc-q35-10.0",
    )
    volume = VolumeAttachment(
        volume=VolumeId("web-root"), address="10.1.1.1", port=10809, export="web-root.e3"
    )
    run = Path("/run/x")
    return VmmShape(
        server=ServerConfig(spec=spec, epoch=7, volume=volume),
        paths=VmmPaths(
            qmp=run / "q",
            qmp_emergency=run / "e",
            stream=run / "s",
            console=run / "c",
            console_log=run / "cl",
            log=run / "l",
            ram=Path("/dev/shm/web.7.ram"),
            record=run / "r",
        ),
        pki_dir=Path("/pki"),
        accelerator="tcg",
        version=version,
        incoming=incoming,
    )


def after(arguments: tuple[str, ...], option: str) -> list[str]:
    return [value for name, value in pairwise(arguments) if name == option]


def devices(arguments: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {d["id"]: d for d in (msgspec.json.decode(value) for value in after(arguments, "-device"))}


def test_hardware_is_named_versioned_and_at_fixed_addresses() -> None:
    arguments = server_arguments(shape())
    assert after(arguments, "-machine") == ["pc-q35-10.0,memory-backend=ram0,sata=off,smbus=off,vmport=off"]
    assert after(arguments, "-cpu") == ["qemu64"]
    assert after(arguments, "-smp") == ["2"]
    assert {"-nodefaults", "-no-user-config"} <= set(arguments)
    addresses = {name: device["addr"] for name, device in devices(arguments).items()}
    assert addresses["disk"] == "0x3"
    assert (addresses["nic0"], addresses["nic1"]) == ("0x4", "0x5")
    assert [addresses[f"slot{i}"] for i in range(2)] == ["0x10.0x0", "0x10.0x1"]


def test_guest_sees_the_same_hardware_wherever_it_arrives() -> None:
    here, there = shape(), shape(incoming=True, version=(11, 1, 3))
    assert devices(server_arguments(here)) == devices(server_arguments(there))
    assert after(server_arguments(here), "-uuid") == after(server_arguments(there), "-uuid")


def test_arriving_vmm_waits_and_does_not_run() -> None:
    arguments = server_arguments(shape(incoming=True))
    assert after(arguments, "-incoming") == ["defer"]
    assert "-S" in arguments
    assert "-incoming" not in server_arguments(shape())


def test_taps_come_by_descriptor_and_disk_by_credential() -> None:
    arguments = server_arguments(shape())
    assert after(arguments, "-netdev") == ["tap,id=net0,fd={fd:tap.p0}", "tap,id=net1,fd={fd:tap.p1}"]
    volume, top = (msgspec.json.decode(value) for value in after(arguments, "-blockdev"))
    assert (volume["export"], volume["reconnect-delay"]) == ("web-root.e3", 30)
    credentials = [msgspec.json.decode(value) for value in after(arguments, "-object")]
    client = next(c for c in credentials if c["id"] == volume["tls-creds"])
    assert (client["endpoint"], client["verify-peer"], client["dir"]) == ("client", True, "/pki")
    assert (top["node-name"], top["file"]) == ("top", volume["node-name"])
    assert devices(arguments)["disk"]["drive"] == "top"


@pytest.mark.parametrize(
    ("version", "told"), [((10, 0, 2), False), ((11, 0, 9), False), ((11, 1), True), ((12, 0, 0), True)]
)
def test_later_versions_are_told_to_wait_for_an_acknowledgement(version: tuple[int, ...], told: bool) -> None:
    arguments = server_arguments(shape(version=version))
    assert ("migration.switchover-ack-legacy=on" in arguments) is told


def test_more_ports_than_addresses_are_refused() -> None:
    with pytest.raises(Refused, match="at most 8"):
        server_arguments(shape(ports=9))


@pytest.mark.parametrize(
    ("answer", "phase"),
    [
        ({}, MigrationPhase.NONE),
        ({"status": "setup"}, MigrationPhase.ACTIVE),
        ({"status": "cancelling"}, MigrationPhase.ACTIVE),
        ({"status": "failing"}, MigrationPhase.ACTIVE),
        ({"status": "completed", "ram": {"total": 5, "remaining": 0}}, MigrationPhase.COMPLETED),
        ({"status": "completed"}, MigrationPhase.NONE),
        ({"status": "failed", "error-desc": "why"}, MigrationPhase.FAILED),
        ({"status": "cancelled"}, MigrationPhase.CANCELLED),
    ],
)
def test_what_qemu_says_of_a_migration(answer: dict[str, object], phase: MigrationPhase) -> None:
    found = progress_of(answer)
    assert found.phase is phase
    assert found.error == answer.get("error-desc", "")


def test_progress_carries_the_figures() -> None:
    ram = {"remaining": 1, "total": 2, "transferred": 3, "dirty-sync-count": 4}
    found = progress_of({"status": "active", "ram": ram})
    assert (found.remaining, found.total, found.transferred, found.passes) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("running", RunState.RUNNING),
        ("inmigrate", RunState.INCOMING),
        ("paused", RunState.PAUSED),
        ("postmigrate", RunState.PAUSED),
        ("io-error", RunState.PAUSED),
    ],
)
def test_run_states(word: str, state: RunState) -> None:
    assert run_state(word) is state


@pytest.mark.parametrize(
    ("name", "vmm"),
    [
        ("vmm.web-1.12", VmmId(ServerId("web-1"), 12)),
        ("qsd", None),
        ("vmm.web", None),
        ("vmm..1", None),
        ("vmm.web.x", None),
    ],
)
def test_units_of_vmms_are_recognised(name: str, vmm: VmmId | None) -> None:
    assert vmm_of_unit(name) == vmm
    assert vmm is None or vmm.unit == name


def test_console_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "console"
    assert tail_of(path, 3, 10) == (b"", 3)
    path.write_bytes(b"hello world")
    assert tail_of(path, 0, 5) == (b"hello", 5)
    assert tail_of(path, 5, 100) == (b" world", 11)
    assert tail_of(path, 11, 100) == (b"", 11)


def built(folder: Path) -> ReleaseId:
    """A bundle of two files and a link."""
    contents = {"bin/qemu": b"qemu", "lib/libc": b"libc"}
    files = [
        BundleFile(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data), mode=0o755)
        for path, data in contents.items()
    ]
    target = "libc"
    files.append(
        BundleFile(
            path="lib/libc.so",
            sha256=hashlib.sha256(target.encode()).hexdigest(),
            size=len(target),
            mode=0o777,
            link=target,
        )
    )
    digest = digest_of(tuple(files))
    release = ReleaseId(f"qemu-10.0.2-{digest[:12]}")
    manifest = Manifest(
        release=Release(
            id=release,
            component=Component.HYPERVISOR,
            version="10.0.2",
            suite="s",
            digest=digest,
            machine_types=("pc-q35-10.0",),
        ),
        loader="lib/ld.so",
        library_path=("lib",),
        system="bin/qemu",
        storage_daemon="bin/qsd",
        image_tool="bin/img",
        data_path=("share",),
        module_dir="modules",
        files=tuple(files),
    )
    root = folder / release / ROOT_NAME
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        (root / path).chmod(0o755)
    (root / "lib/libc.so").symlink_to(target)
    (folder / release / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return release


async def test_sound_bundle_runs_through_its_own_loader(tmp_path: Path) -> None:
    release = built(tmp_path)
    bundle = await Bundles(tmp_path).checked(release)
    root = str(tmp_path / release / "root")
    assert bundle.system() == (
        f"{root}/lib/ld.so", "--library-path", f"{root}/lib", f"{root}/bin/qemu", "-L", f"{root}/share"
    )  # fmt: skip
    assert bundle.environment == {"QEMU_MODULE_DIR": f"{root}/modules"}
    assert await Bundles(tmp_path).available() == (release,)


async def test_changed_bundle_is_refused_with_the_file_and_not_available(tmp_path: Path) -> None:
    release = built(tmp_path)
    changes = {
        "sha256": lambda: (tmp_path / release / "root/bin/qemu").write_bytes(b"evil"),
        "mode": lambda: (tmp_path / release / "root/bin/qemu").chmod(0o777),
        "points": lambda: _link(tmp_path / "l").replace(tmp_path / release / "root/lib/libc.so"),
        "is missing": (tmp_path / release / "root/lib/libc").unlink,
    }
    for words, change in changes.items():
        for path in (tmp_path / release / "root/bin/qemu", tmp_path / release / "root/lib/libc"):
            path.unlink(missing_ok=True)
        (tmp_path / release / "root/lib/libc.so").unlink(missing_ok=True)
        built(tmp_path)
        change()
        with pytest.raises(Refused, match=words) as refusal:
            await Bundles(tmp_path).checked(release)
        assert "root/" in refusal.value.field
        assert await Bundles(tmp_path).available() == ()


def _link(path: Path) -> Path:
    path.symlink_to("/etc/passwd")
    return path


async def test_bundle_is_hashed_once_until_its_manifest_changes(tmp_path: Path) -> None:
    release = built(tmp_path)
    bundles = Bundles(tmp_path)
    await bundles.checked(release)
    (tmp_path / release / "root/bin/qemu").write_bytes(b"evil")
    await bundles.checked(release)
    os.utime(tmp_path / release / MANIFEST_NAME, ns=(1, 1))
    with pytest.raises(Refused, match="sha256"):
        await bundles.checked(release)


async def test_broken_missing_and_misplaced_bundles_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        await Bundles(tmp_path).checked(ReleaseId("absent"))
    release = built(tmp_path)
    (tmp_path / release).rename(tmp_path / "other")
    with pytest.raises(Refused, match="belongs to"):
        await Bundles(tmp_path).checked(ReleaseId("other"))
    (tmp_path / "other" / MANIFEST_NAME).write_bytes(b"{")
    with pytest.raises(Refused, match="broken"):
        await Bundles(tmp_path).checked(ReleaseId("other"))


def test_only_a_server_that_was_made_with_one_has_a_display() -> None:
    plain = shape()
    shown = msgspec.structs.replace(
        plain,
        server=msgspec.structs.replace(
            plain.server, spec=msgspec.structs.replace(plain.server.spec, display=True)
        ),
    )
    before, after_it = server_arguments(plain), server_arguments(shown)
    added = [part for part in after_it if part not in before]
    assert added == [
        "-vnc",
        "unix:/run/x/c.vnc",
        "-k",
        "/run/x/c.keys",
        '{"driver":"VGA","id":"display0","bus":"pcie.0","addr":"0x1","vgamem_mb":8}',
    ]
    assert [part for part in after_it if part in before] != []
    assert [part for part in before if part not in after_it] == []


def test_the_keymap_names_every_character_of_a_keyboard_once() -> None:
    lines = [line.split() for line in keymap().splitlines()]
    symbols = [line[0] for line in lines]
    assert len(set(symbols)) == len(symbols)
    assert {f"U{code:04x}" for code in range(0x21, 0x7F)} <= set(symbols)
    assert ["U0061", "0x1e"] in lines
    assert ["U0041", "0x1e", "shift"] in lines
