"""Makes the disk of the Debian image out of a folder: written as files, nothing mounted, no loop device.

    1 MiB   boot partition, FAT: syslinux, kernel, initramfs
    96 MiB  root, ext4; cloud-init grows it to the disk

File systems have fixed identities, so that they tell nothing of where they were made.
"""

import struct
from pathlib import Path

from nahtlos.model.errors import Refused
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.debian_contents import loader_configuration
from nahtlos.runtime.releases.guest_layout import MIB, SECTOR
from nahtlos.runtime.releases.image import SYSLINUX

BOOT_OFFSET, BOOT_SIZE = 1 * MIB, 95 * MIB
ROOT_OFFSET = 96 * MIB
SPARE_MIB = 200
"""Free in the root file system, beyond what it holds."""
ROOT_UUID = "6e616874-6c6f-4465-8269-616e00000001"
EPOCH = "1700000000"
KERNEL_NAME, INITRD_NAME = "00000000.krn", "00000000.ird"
"""As the image's own `boot-kernel` names them, which removes these in their turn."""
_DEADLINE = 600.0
_ENVIRONMENT = {
    "SOURCE_DATE_EPOCH": EPOCH,
    "E2FSPROGS_FAKE_TIME": EPOCH,
    "MTOOLS_SKIP_CHECK": "1",
    "TZ": "UTC",
}


def make_disk(raw: Path, root: Path, staging: Path) -> None:
    """`raw` holds all that `root` does, and boots."""
    code = SYSLINUX / "mbr/mbr.bin"
    if not code.is_file():
        raise Refused("syslinux-common is not installed", field="packages", remedy="run `make setup`")
    boot, system = staging / "boot", staging / "system"
    _boot_partition(boot, root, staging)
    size = _root_partition(system, root)
    with raw.open("wb") as disk:
        disk.truncate(ROOT_OFFSET + size)
        disk.write(boot_record(code.read_bytes(), size))
    for offset, part in ((BOOT_OFFSET, boot), (ROOT_OFFSET, system)):
        place = (f"seek={offset // MIB}", "bs=1M", "conv=notrunc,sparse", "status=none")
        run(["dd", f"if={part}", f"of={raw}", *place], timeout=_DEADLINE)
        part.unlink()


def root_size(used_mib: int) -> int:
    """Bytes of a file system that holds so much, with room."""
    return (used_mib + used_mib // 10 + SPARE_MIB) * MIB


def _root_partition(system: Path, root: Path) -> int:
    used = run(["du", "--summarize", "--block-size=1M", root], timeout=_DEADLINE)
    size = root_size(int(used.split()[0]))
    _hole(system, size)
    options = f"hash_seed={ROOT_UUID},lazy_itable_init=1,nodiscard"
    identity = ("-U", ROOT_UUID, "-L", "root", "-E", options)
    argv = ["mke2fs", "-q", "-t", "ext4", *identity, "-d", root, system]
    run(argv, timeout=_DEADLINE, environment=_ENVIRONMENT)
    return size


def _boot_partition(partition: Path, root: Path, staging: Path) -> None:
    kernel, initrd = (_only(root / "boot", f"{name}-*") for name in ("vmlinuz", "initrd.img"))
    configuration = staging / "syslinux.cfg"
    configuration.write_text(loader_configuration(KERNEL_NAME, INITRD_NAME))
    _hole(partition, BOOT_SIZE)
    hidden = str(BOOT_OFFSET // SECTOR)
    for command in (
        ["mkfs.vfat", "--invariant", "-F", "16", "-s", "8", "-h", hidden, "-n", "BOOT", partition],
        ["syslinux", "--install", partition],
        ["mcopy", "-i", partition, kernel, f"::{KERNEL_NAME}"],
        ["mcopy", "-i", partition, initrd, f"::{INITRD_NAME}"],
        ["mcopy", "-i", partition, configuration, "::syslinux.cfg"],
    ):
        run(command, timeout=_DEADLINE, environment=_ENVIRONMENT)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Refused(
            f"the packages brought {len(found)} of {pattern}", field="packages", remedy="build it anew"
        )
    return found[0]


def _hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def boot_record(code: bytes, size: int) -> bytes:
    """The first sector: boot code, the boot partition (active), the root partition of `size` bytes."""
    return code[:440].ljust(446, b"\0") + b"".join(
        (
            _partition(0x80, 0x0E, BOOT_OFFSET, BOOT_SIZE),
            _partition(0x00, 0x83, ROOT_OFFSET, size),
            bytes(32),
            b"\x55\xaa",
        )
    )


def _partition(flag: int, kind: int, offset: int, size: int) -> bytes:
    """Addressed by sector numbers; the cylinder fields say that they do not count."""
    nowhere = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", flag, nowhere, kind, nowhere, offset // SECTOR, size // SECTOR)
