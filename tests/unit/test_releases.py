"""Release bundles: apt's sources, the choice of files, what a bundle must withstand. No network, no QEMU."""

import hashlib
import json
import zlib
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.manifest import Manifest, digest_of
from nahtlos.model.nouns import Component, Release
from nahtlos.runtime.releases import apt, builder, guest_layout, image, selection
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.lock import exclusive
from nahtlos.wire import bundle

# --- apt ----------------------------------------------------------------------------------------------

DEB822 = """
Types: deb
# a comment
URIs: ftp://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: ftp://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: ftp://elsewhere.example/debian
Suites: bookworm
Components: main
"""


def test_deb822_and_one_line_sources_say_the_same() -> None:
    stanzas = list(apt.parse_deb822(DEB822))
    lines = list(
        apt.parse_one_line(
            "# deb ftp://old.example/debian bookworm main\n"
            "deb [arch=amd64 signed-by=/x.gpg] ftp://mirror.example/debian bookworm main # note\n"
            "deb-src ftp://mirror.example/debian bookworm main\n"
            "deb ftp://mirror.example/debian bookworm-updates main\n"
            "deb ftp://mirror.example/debian-security bookworm-security main\n"
        )
    )
    assert stanzas == lines
    assert len(stanzas) == 3


def test_sources_are_read_from_both_places(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb ftp://a.example/debian bookworm main\n")
    (tmp_path / "sources.list.d/b.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/c.list.disabled").write_text("deb ftp://c.example/debian bookworm main\n")
    uris = [source.uri for source in apt.machine_sources(tmp_path)]
    assert uris[0] == "ftp://a.example/debian"
    assert "ftp://c.example/debian" not in uris


@pytest.mark.parametrize(
    ("lines", "mirror"),
    [
        ("deb ftp://m.example/debian/ bookworm main", "ftp://m.example/debian"),
        ("deb ftp://s.example/s bookworm-security main\ndeb ftp://m.example/d bookworm main", "ftp://m.example/d"),
        ("deb cdrom:[Debian]/ bookworm main\ndeb https://m.example/d stable main contrib", "https://m.example/d"),
    ],
)  # fmt: skip
def test_mirror_is_where_the_machine_gets_debian(lines: str, mirror: str) -> None:
    assert apt.choose_mirror(apt.parse_one_line(lines), "bookworm") == mirror


@pytest.mark.parametrize(
    "lines", ["", "deb ftp://x.example/tools nodistro main", "deb ftp://s.example bookworm-security main"]
)
def test_no_mirror_is_refused_with_a_remedy(lines: str) -> None:
    with pytest.raises(Refused) as refused:
        apt.choose_mirror(apt.parse_one_line(lines), "bookworm")
    assert refused.value.field == "/etc/apt"
    assert "bookworm" in refused.value.remedy


def test_only_settings_for_reaching_the_mirror_are_taken_over() -> None:
    dump = (
        'APT::Update::Post-Invoke:: "rm x";\nAcquire::http::Proxy "http://p:1";\nAcquire::Languages "none";\n'
    )
    assert apt.kept_settings(dump) == ['Acquire::http::Proxy "http://p:1";']


def test_simulation_gives_file_names() -> None:
    text = (
        "Inst libgcc-s1 (14.2.0-19 Debian:13.7/stable [amd64]) []\n"
        "Inst qemu-utils [1:7.2] (1:10.0.13+ds-0+deb13u1 Debian:13.7/stable [amd64])\n"
        "Conf qemu-utils (1:10.0.13+ds-0+deb13u1 Debian:13.7/stable [amd64])\n"
    )
    (gcc, utils) = apt.parse_simulation(text)
    assert gcc == ("libgcc-s1", "14.2.0-19", "amd64")
    assert apt.archive_name(*utils) == "qemu-utils_1%3a10.0.13+ds-0+deb13u1_amd64.deb"


def test_versions() -> None:
    assert builder.upstream_version("1:10.0.13+ds-0+deb13u1") == "10.0.13"
    assert builder.upstream_version("1:11.1.3+ds-1~bpo13+1") == "11.1.3"
    assert bundle.version_key("10.0.9") < bundle.version_key("10.0.13") < bundle.version_key("11.1.0")
    with pytest.raises(Refused, match="unknown track"):
        builder.find_track("9.9")


# --- selection ----------------------------------------------------------------------------------------


def test_only_what_a_server_needs_is_kept() -> None:
    modules = selection.MODULES
    code, other = selection.named(
        [
            *selection.PROGRAMS,
            f"{modules}/block-rbd.so",
            f"{modules}/ui-curses.so",
            "usr/share/seabios/bios-256k.bin",
            "usr/share/qemu/skiboot.lid",
            selection.LOADERS[0],
        ]
    )
    assert code == sorted([*selection.PROGRAMS, f"{modules}/block-rbd.so"])
    assert other == sorted(["usr/share/seabios/bios-256k.bin", selection.LOADERS[0]])


def test_a_bundle_without_the_storage_daemon_is_refused() -> None:
    with pytest.raises(Refused, match="qemu-storage-daemon"):
        selection.named([selection.SYSTEM, selection.IMAGE_TOOL])


def test_libraries_must_come_from_the_bundle(tmp_path: Path) -> None:
    listing = f"\tlinux-vdso.so.1 (0x7)\n\tliba.so => {tmp_path}/usr/lib/liba.so (0x7)\n"
    assert selection.resolved_libraries(listing, tmp_path) == ["usr/lib/liba.so"]
    with pytest.raises(Refused, match=r"/lib/libb\.so"):
        selection.resolved_libraries(listing + "\tlibb.so => /lib/libb.so (0x7)\n", tmp_path)
    with pytest.raises(Refused, match=r"libc\.so"):
        selection.resolved_libraries(listing + "\tlibc.so => not found\n", tmp_path)


def test_links_bring_their_targets(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/x.so.1.2").write_text("x")
    (tmp_path / "lib/x.so.1").symlink_to("x.so.1.2")
    (tmp_path / "x").symlink_to("lib/../lib/x.so.1")
    (tmp_path / "out").symlink_to("../../etc/passwd")
    assert selection.with_link_targets(["x"], tmp_path) == {"x", "lib/x.so.1", "lib/x.so.1.2"}
    with pytest.raises(Refused, match="out of the bundle"):
        selection.with_link_targets(["out"], tmp_path)


def test_machine_types_without_aliases() -> None:
    answer = "Supported machines are:\nmicrovm   microvm\npc   Standard (alias of pc-i440fx-10.0)\n"
    answer += "pc-q35-10.0   Standard PC\npc-i440fx-10.0  Standard PC (default)\nnone   empty\n"
    assert selection.machine_types(answer) == ("pc-i440fx-10.0", "pc-q35-10.0")


def test_a_bundle_of_network_functions_has_its_programs_and_nothing_of_a_hypervisor() -> None:
    loader = selection.LOADERS[0]
    paths = ["usr/sbin/dnsmasq", "usr/sbin/haproxy", "usr/bin/qemu-img", "usr/share/seabios/bios.bin", loader]
    assert selection.named(paths, selection.NETWORK) == (["usr/sbin/dnsmasq", "usr/sbin/haproxy"], [loader])
    with pytest.raises(Refused, match="haproxy"):
        selection.named(["usr/sbin/dnsmasq"], selection.NETWORK)


def test_versions_with_and_without_an_epoch() -> None:
    assert builder.upstream_version("1:10.0.13+ds-0+deb13u1") == "10.0.13"
    assert builder.upstream_version("2.6.12-1+deb12u3") == "2.6.12"


def test_releases_of_network_functions_are_apart_from_those_of_the_hypervisor(tmp_path: Path) -> None:
    hypervisor = make_bundle(tmp_path)
    functions = make_bundle(tmp_path, "2.6.12", component=Component.NETWORK)
    assert [r.id for r in bundle.list_releases(tmp_path)] == [hypervisor]
    assert [r.id for r in bundle.list_releases(tmp_path, Component.NETWORK)] == [functions]
    assert {r.id for r in bundle.list_releases(tmp_path, None)} == {hypervisor, functions}
    assert builder.find_track("network-13").component is Component.NETWORK


# --- bundles on disk ----------------------------------------------------------------------------------


def make_bundle(
    releases: Path,
    version: str = "10.0.1",
    suite: str = builder.TRACKS["10.0"].suite,
    component: Component = Component.HYPERVISOR,
) -> ReleaseId:
    staging = releases / ".staging"
    root = staging / "root"
    (root / "usr").mkdir(parents=True)
    (root / "usr/program").write_text(version)
    (root / "usr/program").chmod(0o755)
    (root / "usr/link").symlink_to("program")
    files = tuple(bundle.describe(root, path) for path in bundle.files_under(root))
    digest = digest_of(files)
    release = Release(
        id=bundle.release_id(component, version, digest), component=component, version=version,
        suite=suite, digest=digest, machine_types=("pc-q35-10.0",),
    )  # fmt: skip
    manifest = Manifest(
        release=release, loader="l", library_path=(), system="s", storage_daemon="d", image_tool="i",
        data_path=(), module_dir="m", files=files,
    )  # fmt: skip
    (staging / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    staging.rename(releases / release.id)
    return release.id


def point(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


def test_a_sound_bundle_is_found_and_loaded(tmp_path: Path) -> None:
    newer, older = make_bundle(tmp_path, "10.0.13"), make_bundle(tmp_path, "10.0.9")
    assert [release.id for release in bundle.list_releases(tmp_path)] == [older, newer]
    assert bundle.load_release(tmp_path, newer).version == "10.0.13"
    assert bundle.broken_releases(tmp_path) == ()


@pytest.mark.parametrize(
    ("damage", "field", "message"),
    [
        (lambda f: (f / "root/usr/program").write_text("other"), "usr/program", "sha256"),
        (lambda f: (f / "root/usr/program").unlink(), "usr/program", "missing"),
        (lambda f: (f / "root/usr/program").chmod(0o644), "usr/program", "mode"),
        (lambda f: point(f / "root/usr/link", "x"), "usr/link", "points"),
        (lambda f: (f / "manifest.json").write_text('{"release": '), "manifest.json", "broken"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json", "broken"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json", "no manifest"),
    ],
)  # fmt: skip
def test_damage_is_named_with_file_and_remedy(tmp_path: Path, damage, field: str, message: str) -> None:
    release = make_bundle(tmp_path)
    damage(tmp_path / release)
    with pytest.raises(Refused, match=message) as refused:
        bundle.load_release(tmp_path, release)
    assert refused.value.field.endswith(field)
    assert "build the release again" in refused.value.remedy


def test_a_manifest_that_was_rewritten_is_refused(tmp_path: Path) -> None:
    release = make_bundle(tmp_path)
    path = tmp_path / release / "manifest.json"
    manifest = json.loads(path.read_text())
    (tmp_path / release / "root/usr/program").write_text("evil")
    for file in manifest["files"]:
        if file["path"] == "usr/program":
            file["sha256"] = hashlib.sha256(b"evil").hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="digest"):
        bundle.load_release(tmp_path, release)


def test_a_bundle_under_another_name_is_refused(tmp_path: Path) -> None:
    release = make_bundle(tmp_path)
    (tmp_path / release).rename(tmp_path / "qemu-10.0.1-000000000000")
    (problem,) = bundle.broken_releases(tmp_path)
    assert "belongs to" in problem.message
    assert bundle.list_releases(tmp_path) == ()


@pytest.mark.parametrize("name", ["qemu-1-0", "../x", ".lock-10.0", "a/b"])
def test_an_unknown_release_is_not_found(tmp_path: Path, name: str) -> None:
    built = make_bundle(tmp_path)
    with pytest.raises(NotFound) as missing:
        bundle.load_release(tmp_path, ReleaseId(name))
    assert built in missing.value.message


# --- building -----------------------------------------------------------------------------------------


def test_a_built_track_is_answered_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_bundle(tmp_path)

    def no_network(*_: object) -> None:
        raise AssertionError("asked for packages")

    monkeypatch.setattr(builder, "PrivateApt", no_network)
    assert builder.build_release("10.0", tmp_path, tmp_path / "downloads").id == release
    (tmp_path / release / "root/usr/program").write_text("damaged")
    with pytest.raises(AssertionError, match="asked for packages"):
        builder.build_release("10.0", tmp_path, tmp_path / "downloads")


def test_putting_in_place_replaces_a_damaged_bundle(tmp_path: Path) -> None:
    release = make_bundle(tmp_path / "new")
    old = tmp_path / release
    old.mkdir()
    (old / "junk").write_text("x")
    builder._put_in_place(tmp_path / "new" / release, old)  # pyright: ignore[reportPrivateUsage]
    assert bundle.load_release(tmp_path, release).id == release
    assert not list(tmp_path.glob(".old*"))


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock"):
        second = exclusive(tmp_path / "lock", timeout=0.05)
        with pytest.raises(Unavailable, match="another build"):
            second.__enter__()
    with exclusive(tmp_path / "lock", timeout=0.05):
        pass


def test_tools_that_fail_hang_or_are_missing_become_errors() -> None:
    assert run(["cat"], timeout=5, stdin=b"hello") == "hello"
    with pytest.raises(Unavailable, match="failed with 1"):
        run(["false"], timeout=5)
    with pytest.raises(Unavailable, match="did not end within"):
        run(["sleep", "5"], timeout=0.1, while_running=lambda: None)
    with pytest.raises(Refused, match="not installed"):
        run(["no-such-tool-here"], timeout=1)


# --- guest --------------------------------------------------------------------------------------------


def block(number: int, boot: int = 7) -> bytes:
    filler = guest_layout.filler(number)
    return guest_layout.BLOCK_HEADER.pack(guest_layout.BLOCK_MAGIC, number, boot, zlib.crc32(filler)) + filler


def test_blocks_are_told_apart() -> None:
    good = block(3)
    assert len(good) == guest_layout.BLOCK_SIZE
    assert guest_layout.block_is_right(good, 3)
    assert not guest_layout.block_is_right(good, 4)
    assert not guest_layout.block_is_right(good[:-1] + b"\0", 3)
    assert not guest_layout.block_is_right(bytes(guest_layout.BLOCK_SIZE), 1)


def test_boot_record_names_both_partitions() -> None:
    record = guest_layout.master_boot_record(b"\x33" * 440)
    assert len(record) == guest_layout.SECTOR
    assert record[510:] == b"\x55\xaa"
    assert record[446] == 0x80
    assert int.from_bytes(record[470:474], "little") * 512 == guest_layout.DATA_PARTITION_OFFSET


def test_boot_number_is_the_first_eight_bytes() -> None:
    number = guest_layout.boot_number("00112233-4455-6677-8899-aabbccddeeff")
    assert number.to_bytes(8, "little") == bytes.fromhex("0011223344556677")


def test_initramfs_can_be_unpacked(tmp_path: Path) -> None:
    init = tmp_path / "init"
    init.write_bytes(b"program")
    module = tmp_path / "virtio.ko"
    module.write_bytes(b"module")
    archive = image._initramfs(init, [module])  # pyright: ignore[reportPrivateUsage]
    assert archive.startswith(b"070701")
    assert b"modules/00-virtio.ko\0" in archive
    assert archive.index(b"program") < archive.index(b"TRAILER!!!")


def test_images_count_only_when_complete(tmp_path: Path) -> None:
    assert image.list_images(tmp_path / "none") == ()
    made = image.GuestImage(
        id=image.ImageId("guest-1"), recipe="r", kernel_version="k", sha256={"guest-1.raw": "0"}
    )
    (tmp_path / "guest-1.json").write_bytes(msgspec.json.encode(made))
    (tmp_path / "guest-2.json").write_text("{")
    assert image.list_images(tmp_path) == ()
    made.raw(tmp_path).write_bytes(b"")
    assert image.list_images(tmp_path) == (made,)
