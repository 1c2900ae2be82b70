"""Builds the guest image: a disk that boots the probe guest, and its kernel and initramfs beside it.

    compile init -> fetch kernel -> initramfs -> disk -> rename into place

Nothing is mounted and nothing needs a loop device: the boot partition is filled by mtools, everything else
is written here. As with release bundles, work happens in a hidden folder, so a build may be killed at any
time, and an image that is built already is found by what it was made of, without network.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import ImageId
from nahtlos.model.values import Value
from nahtlos.runtime.releases import guest_layout as layout
from nahtlos.runtime.releases.apt import PrivateApt
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.lock import exclusive
from nahtlos.runtime.releases.progress import OnProgress, Progress, silent

KERNEL_SUITE = "bookworm"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = (
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/net/virtio_net",
    "drivers/virtio/virtio_mem",
    "drivers/char/virtio_console",
)
"""In the order in which they need each other."""
SYSLINUX = Path("/usr/lib/syslinux")
_TOOL_DEADLINE = 60.0
_COMPILE_DEADLINE = 120.0
_EPOCH = "1700000000"
"""Every file on the boot partition carries this time, so that the same content is the same image."""


class GuestImage(Value, frozen=True, kw_only=True):
    """A built image. `recipe` is the sha256 over all it was made of that lies in this repository."""

    id: ImageId
    recipe: str
    kernel_version: str
    sha256: dict[str, str]
    """By file name."""

    def raw(self, images_dir: Path) -> Path:
        return images_dir / f"{self.id}.raw"

    def kernel(self, images_dir: Path) -> Path:
        return images_dir / f"{self.id}.vmlinuz"

    def initrd(self, images_dir: Path) -> Path:
        return images_dir / f"{self.id}.initrd"


def build_image(
    guest_dir: Path, images_dir: Path, downloads_dir: Path, on_progress: OnProgress = silent
) -> GuestImage:
    """The image of the guest whose sources lie in `guest_dir`, built if it is not there yet."""
    sources = _sources(guest_dir)
    recipe = _recipe(sources)
    images_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(images_dir / ".lock"):
        image = _already_built(images_dir, recipe)
        if image is None:
            image = _build(sources, recipe, images_dir.resolve(), downloads_dir.resolve(), on_progress)
        on_progress(Progress(step="done", text=image.id, done=1, total=1))
        return image


def list_images(images_dir: Path) -> tuple[GuestImage, ...]:
    """Images that are there completely, oldest first; their content is not hashed."""
    found: list[tuple[float, GuestImage]] = []
    for path in sorted(images_dir.glob("guest-*.json")):
        with contextlib.suppress(msgspec.MsgspecError, OSError):
            image = msgspec.json.decode(path.read_bytes(), type=GuestImage)
            if all((images_dir / name).is_file() for name in image.sha256):
                found.append((path.stat().st_mtime, image))
    return tuple(image for _, image in sorted(found, key=lambda pair: pair[0]))


def _sources(guest_dir: Path) -> tuple[Path, ...]:
    sources = tuple(sorted([*guest_dir.glob("src/*.c"), *guest_dir.glob("src/*.h")]))
    if not sources:
        raise Refused("the guest's sources are not there", field=str(guest_dir), remedy="use a full clone")
    return sources


def _recipe(sources: tuple[Path, ...]) -> str:
    own = [Path(__file__), Path(layout.__file__)]
    digest = hashlib.sha256()
    for path in [*sources, *own]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _already_built(images_dir: Path, recipe: str) -> GuestImage | None:
    for image in reversed(list_images(images_dir)):
        intact = all(_sha256(images_dir / name) == digest for name, digest in image.sha256.items())
        if image.recipe == recipe and intact:
            return image
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(
    sources: tuple[Path, ...], recipe: str, images_dir: Path, downloads_dir: Path, on_progress: OnProgress
) -> GuestImage:
    staging = images_dir / ".building"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    on_progress(Progress(step="compile", text="the guest's init"))
    init = _compile(sources, staging / "init")
    kernel_version, unpacked = _kernel(downloads_dir, staging, on_progress)
    on_progress(Progress(step="disk", text=f"kernel {kernel_version}"))
    kernel = next(unpacked.glob("boot/vmlinuz-*"))
    initrd = staging / "initrd"
    initrd.write_bytes(_initramfs(init, _modules(unpacked)))
    raw = staging / "raw"
    _disk(raw, kernel, initrd, staging)
    image_id = ImageId(f"guest-{_sha256(raw)[:12]}")
    parts = {f"{image_id}.raw": raw, f"{image_id}.vmlinuz": kernel, f"{image_id}.initrd": initrd}
    image = GuestImage(
        id=image_id,
        recipe=recipe,
        kernel_version=kernel_version,
        sha256={name: _sha256(path) for name, path in parts.items()},
    )
    for name, path in parts.items():
        path.touch()
        path.rename(images_dir / name)
    _write_record(image, staging, images_dir)
    _retire_others(image, images_dir)
    shutil.rmtree(staging)
    return image


def _write_record(image: GuestImage, staging: Path, images_dir: Path) -> None:
    """Last: an image without its record is not an image."""
    os.sync()
    record = staging / "record"
    record.write_bytes(msgspec.json.format(msgspec.json.encode(image)))
    record.rename(images_dir / f"{image.id}.json")


def _retire_others(image: GuestImage, images_dir: Path) -> None:
    """One image remains: servers that name none get the only one there is. Volumes are copies and stay."""
    for path in sorted(images_dir.glob("guest-*")):
        if path.stem != image.id:
            path.unlink(missing_ok=True)


def _compile(sources: tuple[Path, ...], target: Path) -> Path:
    units = [path for path in sources if path.suffix == ".c"]
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s"]
    run(["gcc", *options, "-o", target, *units], timeout=_COMPILE_DEADLINE)
    return target


def _kernel(downloads_dir: Path, staging: Path, on_progress: OnProgress) -> tuple[str, Path]:
    """Version of the kernel's package, and the folder it was unpacked in."""
    with PrivateApt(downloads_dir / "apt" / "kernel", (KERNEL_SUITE,), on_progress) as apt:
        name = apt.dependency(KERNEL_PACKAGE, "linux-image-")
        package = apt.download_alone(name)
    unpacked = staging / "kernel"
    run(["dpkg-deb", "--extract", package.path, unpacked], timeout=_TOOL_DEADLINE)
    return f"{name.removeprefix('linux-image-')} ({package.version})", unpacked


def _modules(unpacked: Path) -> list[Path]:
    (folder,) = unpacked.glob("lib/modules/*/kernel")
    return [folder / f"{name}.ko" for name in MODULES]


def _initramfs(init: Path, modules: list[Path]) -> bytes:
    """Not compressed: unpacking would take the guest longer than reading the few bytes saved."""
    entries = [
        _cpio_entry("dev", b"", stat.S_IFDIR | 0o755),
        _cpio_entry("init", init.read_bytes(), stat.S_IFREG | 0o755),
        _cpio_entry("modules", b"", stat.S_IFDIR | 0o755),
        *(
            _cpio_entry(f"modules/{number:02}-{path.name}", path.read_bytes(), stat.S_IFREG | 0o644)
            for number, path in enumerate(modules)
        ),
        _cpio_entry("TRAILER!!!", b"", 0),
    ]
    return b"".join(entries)


def _cpio_entry(name: str, content: bytes, mode: int) -> bytes:
    """One file in the `newc` form: a header of hexadecimal numbers, name and content padded to 4 bytes."""
    encoded = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _disk(raw: Path, kernel: Path, initrd: Path, staging: Path) -> None:
    partition = staging / "partition"
    _boot_partition(partition, kernel, initrd, staging)
    with raw.open("wb") as disk:
        disk.truncate(layout.IMAGE_MIB * layout.MIB)
        disk.write(layout.master_boot_record((SYSLINUX / "mbr/mbr.bin").read_bytes()))
        disk.seek(layout.BOOT_PARTITION_OFFSET)
        disk.write(partition.read_bytes())


def _boot_partition(partition: Path, kernel: Path, initrd: Path, staging: Path) -> None:
    if not (SYSLINUX / "mbr/mbr.bin").is_file():
        raise Refused("syslinux-common is not installed", field="packages", remedy="run `make setup`")
    environment = {"SOURCE_DATE_EPOCH": _EPOCH, "MTOOLS_SKIP_CHECK": "1", "TZ": "UTC"}
    configuration = staging / "syslinux.cfg"
    configuration.write_text(
        "DEFAULT guest\nPROMPT 0\nLABEL guest\n  KERNEL /vmlinuz\n  INITRD /initrd\n"
        f"  APPEND {layout.KERNEL_ARGUMENTS}\n"
    )
    with partition.open("wb") as file:
        file.truncate(layout.BOOT_PARTITION_SIZE)
    hidden = str(layout.BOOT_PARTITION_OFFSET // layout.SECTOR)
    for command in (
        ["mkfs.vfat", "--invariant", "-F", "16", "-s", "8", "-h", hidden, "-n", "NAHTLOS", partition],
        ["syslinux", "--install", partition],
        ["mcopy", "-i", partition, kernel, "::vmlinuz"],
        ["mcopy", "-i", partition, initrd, "::initrd"],
        ["mcopy", "-i", partition, configuration, "::syslinux.cfg"],
    ):
        run(command, timeout=_TOOL_DEADLINE, environment=environment)
