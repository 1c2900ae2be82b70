"""What the Debian image is made of and how its disk is laid out; what is taken for built; its two scripts."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.ids import ImageId
from nahtlos.runtime.releases import debian_contents as contents
from nahtlos.runtime.releases import debian_disk, debian_image
from nahtlos.runtime.releases.guest_layout import MIB

DATASOURCE = "etc/cloud/cloud.cfg.d/91_seed.cfg"


def test_boot_record_names_a_boot_partition_and_a_root_behind_it() -> None:
    size = debian_disk.root_size(411)
    record = debian_disk.boot_record(b"\x33" * 512, size)
    assert len(record) == 512
    assert record[:440] == b"\x33" * 440
    assert record[510:] == b"\x55\xaa"
    entries = [record[446 + 16 * n : 462 + 16 * n] for n in range(4)]
    assert [entry[0] for entry in entries] == [0x80, 0, 0, 0]
    assert [entry[4] for entry in entries] == [0x0E, 0x83, 0, 0]
    places = [
        tuple(512 * int.from_bytes(entry[at : at + 4], "little") for at in (8, 12)) for entry in entries[:2]
    ]
    assert places == [(1 * MIB, 95 * MIB), (96 * MIB, size)]


def test_root_has_room_beyond_what_it_holds() -> None:
    assert debian_disk.root_size(411) == (411 + 41 + 200) * MIB


def test_packages_come_without_recommended_ones_and_are_mounted_for_nobody_else() -> None:
    argv = [
        str(word)
        for word in debian_image.bootstrap_command(Path("/r"), Path("/h"), Path("/s"), "deb somewhere main")
    ]
    assert argv[-3:] == ["bookworm", "/r", "deb somewhere main"]
    assert argv[0] == "unshare"
    assert {"--mount", "--pid", "--kill-child"} < set(argv[: argv.index("mmdebstrap")])
    assert '--aptopt=APT::Install-Recommends "false"' in argv
    (included,) = (word for word in argv if word.startswith("--include="))
    assert {"cloud-init", "qemu-guest-agent", "openssh-server"} < set(included.split("=")[1].split(","))


def test_packages_are_named_once_each() -> None:
    assert len(set(contents.PACKAGES)) == len(contents.PACKAGES)


def test_root_is_the_same_for_kernel_and_fstab() -> None:
    assert f"root={contents.ROOT_DEVICE} " in contents.KERNEL_ARGUMENTS
    assert contents.files()["etc/fstab"].split()[0] == contents.ROOT_DEVICE
    told = contents.loader_configuration("k", "i")
    assert "  KERNEL /k\n  INITRD /i\n" in told
    assert contents.KERNEL_ARGUMENTS in told


def hooked(root: Path, tmp_path: Path) -> None:
    """As mmdebstrap runs it; what would be done inside the root is only noted."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    chroot = programs / "chroot"
    chroot.write_text(f'#!/bin/sh\nshift\necho "$*" >> {tmp_path / "inside"}\n')
    chroot.chmod(0o755)
    script = tmp_path / "hook"
    script.write_text(contents.hook())
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["sh", script, root], check=True, env=environment, timeout=20)


def test_the_hook_writes_every_file_and_leaves_no_keys_and_may_run_twice(tmp_path: Path) -> None:
    root = tmp_path / "a root"
    for left in ("etc/ssh/ssh_host_ed25519_key.pub", "etc/apt/apt.conf.d/99mmdebstrap", "var/lib/x"):
        (root / left).parent.mkdir(parents=True, exist_ok=True)
        (root / left).write_text("how the mirror is reached")
    hooked(root, tmp_path)
    hooked(root, tmp_path)
    for path, text in contents.files().items():
        assert (root / path).read_text() == text, path
        assert os.access(root / path, os.X_OK) is path.startswith("usr/local"), path
    assert not list((root / "etc/ssh").iterdir())
    assert not (root / "etc/apt/apt.conf.d/99mmdebstrap").exists()
    for hook in ("kernel/postinst.d", "kernel/postrm.d", "initramfs/post-update.d"):
        assert (root / "etc" / hook / "zz-nahtlos").readlink() == Path("/usr/local/lib/nahtlos/boot-kernel")
    inside = (tmp_path / "inside").read_text()
    assert "systemctl enable systemd-networkd " in inside
    assert "update-initramfs -u" in inside


@pytest.mark.parametrize("label", ["cidata", "CIDATA", ""])
def test_a_seed_on_a_disk_goes_before_the_networks(tmp_path: Path, label: str) -> None:
    program = tmp_path / "blkid"
    program.write_text(f'#!/bin/sh\ncase "$*" in *LABEL={label or "none"}*) echo /dev/vdb ;; esac\n')
    program.chmod(0o755)
    file = tmp_path / "91_seed.cfg"
    file.write_text("of the boot before")
    script = contents.CHOOSE_SEED.replace(f"/{DATASOURCE}", str(file))
    assert str(file) in script
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", script], check=True, env=environment, timeout=20)
    if label:
        assert not file.exists()
    else:
        assert file.read_text() == (
            'datasource: {NoCloud: {seedfrom: "http://169.254.169.254/nocloud/"}}\n'
            "network: {config: disabled}\n"
        )


def kernel_put(tmp_path: Path, *, fails: str = "") -> int:
    """Runs the image's `boot-kernel` over folders: `boot`, and `firmware` for the boot partition."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    stand_ins = {
        "mount": 'rmdir "$4" && ln -s "$FIRMWARE" "$4"',
        "umount": 'rm "$1" && mkdir "$1"',
        "linux-version": 'if [ "$1" = list ]; then ls "$BOOT" | sed -n s/^vmlinuz-//p; else sort -V; fi',
        "sync": "true",
    }
    for name, does in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{'exit 1' if name == fails else does}\n")
        (programs / name).chmod(0o755)
    script = contents.BOOT_KERNEL.replace("[ -b /dev/vda1 ]", "true").replace("/boot/", f"{tmp_path}/boot/")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "BOOT": str(tmp_path / "boot"),
        "FIRMWARE": str(tmp_path / "firmware"),
    }
    return subprocess.run(["sh", "-c", script], env=environment, check=False, timeout=20).returncode


def booted_by(firmware: Path) -> tuple[bytes, bytes]:
    """Kernel and initramfs that the boot loader would take."""
    lines = (firmware / "syslinux.cfg").read_text().split("\n")
    names = [line.split("/")[1] for line in lines if line.startswith(("  KERNEL ", "  INITRD "))]
    kernel, initrd = ((firmware / name).read_bytes() for name in names)
    return kernel, initrd


def test_a_newer_kernel_is_booted_and_a_failure_in_between_leaves_the_older_one(tmp_path: Path) -> None:
    boot, firmware = tmp_path / "boot", tmp_path / "firmware"
    boot.mkdir()
    firmware.mkdir()
    names = (debian_disk.KERNEL_NAME, debian_disk.INITRD_NAME)
    (firmware / "syslinux.cfg").write_text(contents.loader_configuration(*names))
    for name, content in zip(names, (b"k9", b"i9"), strict=True):
        (firmware / name).write_bytes(content)
    for version in ("6.1.0-9", "6.1.0-10"):
        (boot / f"vmlinuz-{version}").write_bytes(b"k" + version[6:].encode())
    (boot / "initrd.img-6.1.0-9").write_bytes(b"i9")
    assert kernel_put(tmp_path) == 0, "the newest has no initramfs yet"
    assert booted_by(firmware) == (b"k9", b"i9")

    (boot / "initrd.img-6.1.0-10").write_bytes(b"i10")
    assert kernel_put(tmp_path, fails="sync") != 0
    assert booted_by(firmware) == (b"k9", b"i9")

    for _ in range(2):
        assert kernel_put(tmp_path) == 0
        assert booted_by(firmware) == (b"k10", b"i10")
        assert len(list(firmware.iterdir())) == 3
    assert contents.KERNEL_ARGUMENTS in (firmware / "syslinux.cfg").read_text()


def test_only_a_whole_image_of_this_recipe_is_found(tmp_path: Path) -> None:
    assert debian_image.find_debian(tmp_path) is None
    image = debian_image.DebianImage(
        id=ImageId("debian-12-aa"),
        recipe=debian_image.recipe(),
        suite="bookworm",
        sha256="9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0",  # of "aaa"
        packages={"cloud-init": "22.4.2-1"},
    )
    record = tmp_path / "debian-12-aa.json"
    record.write_bytes(msgspec.json.encode(image))
    assert debian_image.find_debian(tmp_path) is None, "without its content"
    image.raw(tmp_path).write_bytes(b"aaa")
    assert debian_image.find_debian(tmp_path) == image
    assert debian_image.build_debian(tmp_path) == image
    image.raw(tmp_path).write_bytes(b"aab")
    assert debian_image.find_debian(tmp_path) is None, "damaged"
    image.raw(tmp_path).write_bytes(b"aaa")
    record.write_bytes(msgspec.json.encode(msgspec.structs.replace(image, recipe="another")))
    assert debian_image.find_debian(tmp_path) is None
