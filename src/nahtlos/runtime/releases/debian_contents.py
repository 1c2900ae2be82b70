"""What is in the Debian image beside Debian's own packages: which of them, and the few files that differ.

Pure: names and texts. Network by DHCP on every interface; cloud-init takes NoCloud data from a disk labelled
`cidata` or, if there is none, from the network's own service (docs/network.md, "What a guest is told"). What
cloud-init does is cut to what people ask of it, since all of it is felt where guests are emulated.
"""

import shlex
from collections.abc import Mapping

SUITE = "bookworm"
VERSION = "12"
PACKAGES = (
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "cloud-init",
    "cloud-guest-utils",
    "fdisk",
    "qemu-guest-agent",
    "openssh-server",
    "sudo",
    "iproute2",
    "netbase",
    "procps",
    "kmod",
    "e2fsprogs",
    "ca-certificates",
)
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
LICENCES = "/usr/share/doc/*/copyright"
BOOT_DEVICE, ROOT_DEVICE = "/dev/vda1", "/dev/vda2"
"""By place: a copy of the disk, attached as a data volume, has the same labels and identities."""
KERNEL_ARGUMENTS = (
    f"root={ROOT_DEVICE} rw console=tty0 console=ttyS0 quiet panic=1 net.ifnames=0 no_timer_check audit=0"
)
METADATA = "http://169.254.169.254/nocloud/"
EARLY_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ext4", "crc32c_generic")
ENABLED = ("systemd-networkd", "systemd-resolved", "ssh", "serial-getty@ttyS0.service")
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "systemd-pstore.service",
    "cloud-init-hotplugd.socket",
)
"""What a server that is looked after from outside does not need, least of all at its first boot."""

CLOUD_CONFIG = """\
datasource_list: [NoCloud, None]
ssh_genkeytypes: [ed25519]
cloud_init_modules:
 - bootcmd
 - write-files
 - growpart
 - resizefs
 - disk_setup
 - mounts
 - set_hostname
 - update_hostname
 - users-groups
 - ssh
cloud_config_modules:
 - set-passwords
 - timezone
 - runcmd
cloud_final_modules:
 - package-update-upgrade-install
 - scripts-per-once
 - scripts-per-boot
 - scripts-per-instance
 - scripts-user
 - final-message
 - power-state-change
"""
"""No apt-configure: it would look for mirrors that a server need not reach."""

CHOOSE_SEED = f"""\
#!/bin/sh
# Before cloud-init looks: data on a disk are complete; without one they are asked for over the network, which
# is then set up by DHCP alone. A seed named in the configuration would hide a disk's.
file=/etc/cloud/cloud.cfg.d/91_seed.cfg
if [ -n "$(blkid -o device -t LABEL=cidata; blkid -o device -t LABEL=CIDATA)" ]; then
    rm -f "$file"
else
    printf '%s\\n' 'datasource: {{NoCloud: {{seedfrom: "{METADATA}"}}}}' > "$file"
    printf '%s\\n' 'network: {{config: disabled}}' >> "$file"
fi
"""

BOOT_KERNEL = f"""\
#!/bin/sh
# Puts the newest kernel where the boot loader reads it; run after a kernel or an initramfs was written. The
# new files are whole before the boot loader is told of them, and those it was told of before go last.
set -eu
[ -b {BOOT_DEVICE} ] || exit 0
version=$(linux-version list | linux-version sort | tail -n 1)
[ -f "/boot/vmlinuz-$version" ] && [ -f "/boot/initrd.img-$version" ] || exit 0
at=$(mktemp -d)
mount -t vfat {BOOT_DEVICE} "$at"
trap 'umount "$at"; rmdir "$at"' EXIT
mark=$(cat "/boot/vmlinuz-$version" "/boot/initrd.img-$version" | sha256sum | cut -c1-8)
[ -f "$at/$mark.krn" ] && [ -f "$at/$mark.ird" ] && grep -q "/$mark.krn" "$at/syslinux.cfg" && exit 0
cp "/boot/vmlinuz-$version" "$at/$mark.krn"
cp "/boot/initrd.img-$version" "$at/$mark.ird"
sync -f "$at"
sed -e "s,KERNEL .*,KERNEL /$mark.krn," -e "s,INITRD .*,INITRD /$mark.ird," "$at/syslinux.cfg" > "$at/new.cfg"
sync -f "$at"
mv "$at/new.cfg" "$at/syslinux.cfg"
sync -f "$at"
for file in "$at"/*.krn "$at"/*.ird; do
    case $file in */"$mark".*) ;; *) rm -f "$file" ;; esac
done
"""


def loader_configuration(kernel: str, initrd: str) -> str:
    """Of syslinux; `BOOT_KERNEL` replaces the two names in it."""
    return (
        "SERIAL 0 115200\nDEFAULT debian\nPROMPT 0\nLABEL debian\n"
        f"  KERNEL /{kernel}\n  INITRD /{initrd}\n  APPEND {KERNEL_ARGUMENTS}\n"
    )


def files() -> Mapping[str, str]:
    """By path below the root; those below `usr/local` are programs. Units are given time: where guests are
    emulated and many boot at once, what takes a second elsewhere takes minutes."""
    return {
        "etc/fstab": f"{ROOT_DEVICE} / ext4 defaults 0 1\n",
        "etc/hostname": "localhost\n",
        "etc/default/locale": "LANG=C.UTF-8\n",
        "etc/machine-id": "",
        "etc/apt/sources.list": "",
        "etc/initramfs-tools/modules": "".join(f"{name}\n" for name in EARLY_MODULES),
        "etc/initramfs-tools/conf.d/nahtlos": "MODULES=list\nRESUME=none\n",
        "etc/cloud/cloud.cfg.d/90_nahtlos.cfg": CLOUD_CONFIG,
        "etc/systemd/network/80-dhcp.network": (
            "[Match]\nType=ether\n\n[Link]\nRequiredFamilyForOnline=ipv4\n\n"
            "[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n\n[DHCPv4]\nClientIdentifier=mac\n"
        ),
        "etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf": (
            "[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=60\n"
        ),
        "etc/systemd/system.conf.d/slow.conf": (
            "[Manager]\nDefaultTimeoutStartSec=600s\nDefaultDeviceTimeoutSec=600s\n"
        ),
        "etc/systemd/system/cloud-init-local.service.d/seed.conf": (
            "[Service]\nExecStartPre=/usr/local/lib/nahtlos/choose-seed\n"
        ),
        "usr/local/lib/nahtlos/choose-seed": CHOOSE_SEED,
        "usr/local/lib/nahtlos/boot-kernel": BOOT_KERNEL,
    }


def hook() -> str:
    """The script that is given the root once all packages are in it. Repeatable."""
    lines = ["#!/bin/sh", "set -eu", 'root="$1"']
    lines.append('rm -f "$root"/etc/ssh/ssh_host_*_key* "$root"/etc/apt/apt.conf.d/99mmdebstrap')
    for path, text in files().items():
        target = f'"$root"/{shlex.quote(path)}'
        lines.append(f'mkdir -p "$root"/{shlex.quote(path.rpartition("/")[0])}')
        lines.append(f"printf %s {shlex.quote(text)} > {target}")
        lines.append(f"chmod {'755' if path.startswith('usr/local') else '644'} {target}")
    for folder in ("kernel/postinst.d", "kernel/postrm.d", "initramfs/post-update.d"):
        lines.append(f'mkdir -p "$root"/etc/{folder}')
        lines.append(f'ln -sf /usr/local/lib/nahtlos/boot-kernel "$root"/etc/{folder}/zz-nahtlos')
    lines.append(f'chroot "$root" systemctl enable {" ".join(ENABLED)} >&2')
    lines.append(f'chroot "$root" systemctl mask {" ".join(MASKED)} >&2')
    lines.append('chroot "$root" update-initramfs -u >&2')
    lines.append('touch "$root"/etc/.updated "$root"/var/.updated')
    return "\n".join(lines) + "\n"
