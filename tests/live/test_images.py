"""Images from people nobody trusts, with the release's own qemu-img behind a closed door: what is not fit
is refused by field and remedy, what is fit becomes a raw image whose digest is right, killed in between or
not."""

import asyncio
import hashlib
import os
import struct
import subprocess
from pathlib import Path

import msgspec
import pytest
from physical_host import RELEASES

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import ImageId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle, read_bundle
from nahtlos.physical.storage import images as images_module
from nahtlos.physical.storage.confinement import Allowance, Confined, run_confined
from nahtlos.physical.storage.images import ImageFolder, image_tool
from nahtlos.physical.storage.probe import ImageLimits

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
MIB = 1 << 20
NAME = ImageId("taken")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return max((read_bundle(path) for path in RELEASES.glob("qemu-*")), key=lambda each: each.version)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path / "images", tmp_path / "jail")


def tool(bundle: Bundle, *arguments: str | Path) -> None:
    words = (*image_tool(bundle), *map(str, arguments))
    subprocess.run(words, check=True, capture_output=True, env=bundle.environment, timeout=60)


def content(path: Path, *, size: int = 24 * MIB) -> bytes:
    """Data, holes and written zeros."""
    data = bytearray(size)
    data[0:MIB] = os.urandom(MIB)
    data[7 * MIB : 9 * MIB] = os.urandom(2 * MIB)
    data[size - 512 :] = b"\x55" * 512
    path.write_bytes(data)
    return bytes(data)


async def taken(
    folder: ImageFolder,
    bundle: Bundle,
    source: Path,
    form: VolumeFormat = VolumeFormat.QCOW2,
    limits: ImageLimits = ImageLimits(),  # noqa: B008 - frozen
) -> None:
    await folder.take_in(bundle, NAME, source, form, limits=limits, progress=lambda done, total: None)


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "lazy_refcounts=on",
    ],
)
async def test_every_honest_qcow2_becomes_its_content(
    folder: ImageFolder, bundle: Bundle, tmp_path: Path, options: str
) -> None:
    data = content(tmp_path / "plain")
    source = tmp_path / "source.qcow2"
    compressed = ["-c"] if options == "compat=1.1" else []
    tool(bundle, "convert", *compressed, "-O", "qcow2", "-o", options, tmp_path / "plain", source)
    seen: list[tuple[int, int]] = []
    manifest = await folder.take_in(
        bundle,
        NAME,
        source,
        VolumeFormat.QCOW2,
        limits=ImageLimits(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert manifest.sha256 == hashlib.sha256(data).hexdigest()
    assert folder.path(NAME).read_bytes() == data
    assert folder.manifest(NAME) == manifest
    assert manifest.stored_bytes < 8 * MIB, "holes stay holes"
    assert seen[-1] == (len(data), len(data))
    assert not list(folder.path(NAME).parent.glob(".*")), "nothing is left lying"
    again = await folder.take_in(
        bundle, NAME, source, VolumeFormat.QCOW2, limits=ImageLimits(), progress=lambda done, total: None
    )
    assert again == manifest
    with pytest.raises(Conflict):
        await taken(folder, bundle, tmp_path / "plain", VolumeFormat.RAW)


async def test_raw_image_is_taken_as_it_is(folder: ImageFolder, bundle: Bundle, tmp_path: Path) -> None:
    data = content(tmp_path / "plain")
    await taken(folder, bundle, tmp_path / "plain", VolumeFormat.RAW)
    assert folder.path(NAME).read_bytes() == data


async def test_what_names_other_files_is_refused_and_they_are_not_read(
    folder: ImageFolder, bundle: Bundle, tmp_path: Path
) -> None:
    source = tmp_path / "bomb.qcow2"
    tool(bundle, "create", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", source, "1M")
    with pytest.raises(Refused, match="backing file") as refusal:
        await taken(folder, bundle, source)
    assert refusal.value.field == "image" and refusal.value.remedy
    tool(
        bundle, "create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", tmp_path / "ext.qcow2", "1M"
    )
    with pytest.raises(Refused, match="data file"):
        await taken(folder, bundle, tmp_path / "ext.qcow2")
    assert not (tmp_path / "images").exists()


async def test_files_of_the_host_are_not_there_in_the_jail(
    bundle: Bundle, tmp_path: Path, folder: ImageFolder
) -> None:
    """Although nothing should get past the headers: a backing file that did would not be found."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1024)
    source = tmp_path / "bomb.qcow2"
    tool(bundle, "create", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", source, "1M")
    descriptor = os.open(source, os.O_RDONLY)
    try:
        found = await run_confined(
            bundle,
            (*image_tool(bundle), "check", "-f", "qcow2", "/in"),
            folder=tmp_path / "jail",
            read=descriptor,
            allowance=Allowance(),
        )
        assert found.exit_code != 0
        assert "No such file" in found.complaints
    finally:
        os.close(descriptor)


def patched(source: Path, target: Path, offset: int, form: str, *values: int) -> Path:
    data = bytearray(source.read_bytes())
    struct.pack_into(form, data, offset, *values)
    target.write_bytes(data)
    return target


async def test_lies_are_refused_with_field_and_remedy(
    folder: ImageFolder, bundle: Bundle, tmp_path: Path
) -> None:
    content(tmp_path / "plain")
    good = tmp_path / "good.qcow2"
    tool(bundle, "convert", "-O", "qcow2", tmp_path / "plain", good)
    (l1_offset,) = struct.unpack_from(">Q", good.read_bytes(), 40)
    (l2,) = struct.unpack_from(">Q", good.read_bytes(), l1_offset)
    l2_offset = l2 & 0x00FFFFFFFFFFFE00
    cut = tmp_path / "cut"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size - 3 * 65536])
    entry = struct.unpack_from(">Q", good.read_bytes(), l2_offset)[0]
    odd = tmp_path / "odd"
    odd.write_bytes(b"x" * 1000)
    encrypted = tmp_path / "locked"
    options = ("-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10")
    tool(bundle, "create", "-f", "qcow2", "--object", "secret,id=k,data=abc", *options, encrypted, "1M")
    hostile = {
        "no image": (tmp_path / "plain", "format"),
        "huge": (patched(good, tmp_path / "huge", 24, ">Q", 1 << 60), "size"),
        "odd size": (patched(good, tmp_path / "odd-size", 24, ">Q", 24 * MIB + 1), "size"),
        "larger than its tables": (patched(good, tmp_path / "grown", 24, ">Q", 1 << 40), "image"),
        "unknown feature": (patched(good, tmp_path / "new", 72, ">Q", 1 << 40), "features"),
        "corrupt": (patched(good, tmp_path / "corrupt", 72, ">Q", 2), "image"),
        "cut off": (cut, "image"),
        "table outside": (patched(good, tmp_path / "l1", 40, ">Q", 1 << 50), "image"),
        "second table outside": (patched(good, tmp_path / "l2", l1_offset, ">Q", 1 << 50), "image"),
        "cluster outside": (patched(good, tmp_path / "l3", l2_offset, ">Q", entry + (1 << 40)), "image"),
        "cluster used twice": (patched(good, tmp_path / "twice", l2_offset + 8, ">Q", entry), "image"),
        "encrypted": (encrypted, "encryption"),
    }
    for what, (path, field) in hostile.items():
        with pytest.raises(Refused) as refusal:
            await taken(folder, bundle, path)
        assert refusal.value.field == field, f"{what}: {refusal.value}"
        assert refusal.value.remedy, what
    for path, field in ((odd, "size"), (good, "format"), (tmp_path / "none", "source"), (tmp_path, "source")):
        with pytest.raises(Refused) as refusal:
            await taken(folder, bundle, path, VolumeFormat.RAW)
        assert refusal.value.field == field
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "plain")
    with pytest.raises(Refused):
        await taken(folder, bundle, link, VolumeFormat.RAW)
    with pytest.raises(NotFound):
        await taken(folder, bundle, tmp_path / "none")
    assert folder.manifest(NAME) is None and not folder.path(NAME).exists()


async def test_small_file_that_unpacks_to_a_large_one_is_ended(
    folder: ImageFolder, bundle: Bundle, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"\x01" * (512 * MIB))
    source = tmp_path / "bomb.qcow2"
    tool(bundle, "convert", "-c", "-O", "qcow2", plain, source)
    assert source.stat().st_size < 8 * MIB
    with pytest.raises(Refused, match="unpacked") as refusal:
        await taken(folder, bundle, source, limits=ImageLimits(stored_bytes=32 * MIB))
    assert refusal.value.field == "size"
    assert not folder.path(NAME).exists()
    folder.forget(NAME)
    assert not list((tmp_path / "images").iterdir())


async def test_killed_conversion_goes_on_where_it_was(
    folder: ImageFolder, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "RANGE_BYTES", 4 * MIB)
    data = content(tmp_path / "plain")
    source = tmp_path / "source.qcow2"
    tool(bundle, "convert", "-O", "qcow2", tmp_path / "plain", source)
    cancelled: list[int] = []

    def stop(done: int, total: int) -> None:
        cancelled.append(done)
        if done == 12 * MIB:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await folder.take_in(bundle, NAME, source, VolumeFormat.QCOW2, limits=ImageLimits(), progress=stop)
    assert not folder.path(NAME).exists()
    seen: list[int] = []
    await folder.take_in(
        bundle,
        NAME,
        source,
        VolumeFormat.QCOW2,
        limits=ImageLimits(),
        progress=lambda done, total: seen.append(done),
    )
    assert seen[0] == 12 * MIB
    assert folder.path(NAME).read_bytes() == data


async def confined(bundle: Bundle, tmp_path: Path, source: str) -> Confined:
    """A program of ours in the place of qemu-img, statically linked, with what an image is allowed."""
    program = tmp_path / "program.c"
    program.write_text(source)
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["gcc", "-static", "-o", root / "program", program], check=True, timeout=60)
    (tmp_path / "in").write_bytes(b"x" * 512)
    fake = msgspec.structs.replace(bundle, root=root)
    descriptor = os.open(tmp_path / "in", os.O_RDONLY)
    try:
        return await run_confined(
            fake,
            (str(root / "program"),),
            folder=tmp_path / "jail",
            read=descriptor,
            allowance=Allowance(memory_bytes=images_module.WORKING_MEMORY),
        )
    finally:
        os.close(descriptor)


async def test_limits_of_the_jail_hold_a_pool_of_threads(bundle: Bundle, tmp_path: Path) -> None:
    """QEMU's has 64 while reads are slow, each with a stack and a heap."""
    found = await confined(bundle, tmp_path, THREADS)
    assert (found.output, found.exit_code) == ("64 threads\n", 0), found


async def test_jail_lets_nothing_out(bundle: Bundle, tmp_path: Path) -> None:
    found = await confined(bundle, tmp_path, LOOK)
    lines = found.output.split("\n")
    assert "passwd 2" in lines, found
    assert "write-in 30" in lines and "write-root 30" in lines, found
    assert "pid 1" in lines and "caps 0" in lines and "before-socket" in lines
    assert found.exit_code == 128 + 31, "SIGSYS: making a socket ends it"
    assert "socket-made" not in lines


THREADS = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static void *work(void *unused) {
    volatile char *memory = malloc(1 << 16);
    if (memory) memory[0] = 1;
    pause();
    return NULL;
}
int main(void) {
    pthread_t thread;
    int made = 0;
    while (made < 64 && pthread_create(&thread, NULL, work, NULL) == 0) {
        made++;
        usleep(2000);
    }
    printf("%d threads\n", made);
    fflush(stdout);
    _exit(0);
}
"""
LOOK = r"""
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
static void try_open(const char *what, const char *path, int flags) {
    int fd = open(path, flags, 0600);
    printf("%s %d\n", what, fd < 0 ? errno : 0);
}
int main(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    try_open("passwd", "/etc/passwd", O_RDONLY);
    try_open("write-in", "/in", O_RDWR);
    try_open("write-root", "/new", O_RDWR | O_CREAT);
    printf("pid %d\n", getpid());
    syscall(SYS_capget, &header, data);
    printf("caps %u\n", data[0].effective | data[0].permitted | data[1].effective | data[1].permitted);
    puts("before-socket");
    fflush(stdout);
    socket(AF_UNIX, SOCK_STREAM, 0);
    puts("socket-made");
    return 0;
}
"""
