"""What this machine can and cannot do for the cloud, with remedies.

Every check is a small function of a `Machine`, which stands for the outside: files, tools, resources. Trials
(of network devices, of packet rules) run in a network namespace that ends with the command that made it, so
nothing is changed and nothing can be left behind. The command line prints the findings; nothing here does.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nahtlos.model.errors import Refused
from nahtlos.ops.doctor_builds import accelerator, image, releases, version_pairs
from nahtlos.ops.doctor_network import bridge_tracking, link_kind, namespaces, optional, packet_rules
from nahtlos.ops.examined import Finding, Level, Machine, required

NEEDED_MEMORY_MIB = 3 * 1024
"""Six servers of 256 MiB, a second copy of those that move, and the processes around them."""
NEEDED_SHM_MIB = 2 * 1024
"""RAM files of six servers, and of the copies of those that move."""
RAM_SHARE = 0.9
"""Of the machine's memory, what servers may want; the rest is the host's own."""
NEEDED_DISK_MIB = 4 * 1024
"""Downloads, two unpacked releases, volumes."""


def examine(build: Path, machine: Machine | None = None) -> list[Finding]:
    """All findings, those that must be in order first."""
    machine = machine or Machine()
    findings = [
        _root(machine),
        _debian(machine),
        _packages(machine),
        *_devices(machine),
        namespaces(machine),
        *(link_kind(machine, kind) for kind in ("veth", "bridge", "vxlan")),
        *packet_rules(machine),
        _memory(machine),
        _shm(machine),
        *_ram_room(machine),
        _disk(machine, build),
        *releases(build),
        *version_pairs(build),
        image(build),
        accelerator(machine, build / "cache"),
        bridge_tracking(machine),
        _cgroups(machine),
        *optional(machine),
    ]
    order = list(Level)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def require_lab(machine: Machine | None = None) -> None:
    """Refused by what a lab lacks first on this machine, before anything is made. Quick: nothing is read
    that was built."""
    machine = machine or Machine()
    checks: tuple[Callable[[], list[Finding]], ...] = (
        lambda: [_root(machine)],
        lambda: [_packages(machine), *_devices(machine)],
        lambda: [namespaces(machine)],
        lambda: [link_kind(machine, kind) for kind in ("veth", "bridge", "vxlan")],
        lambda: packet_rules(machine),
    )
    for check in checks:
        for finding in check():
            if not finding.ok and finding.level is Level.REQUIRED:
                raise Refused(finding.detail, field=finding.name, remedy=finding.remedy)


def fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing that is required is missing."""
    return all(finding.ok for finding in findings if finding.level is Level.REQUIRED)


# --- the machine ----------------------------------------------------------------------------------------


def _root(machine: Machine) -> Finding:
    ok = machine.is_root()
    return required(
        "root", ok, "running as root" if ok else "not root: namespaces and taps need it", "run it with sudo"
    )


def _debian(machine: Machine) -> Finding:
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', machine.text("/etc/os-release"), re.MULTILINE))
    ok = release.get("ID") == "debian" and release.get("VERSION_ID", "0").isdigit()
    ok = ok and int(release["VERSION_ID"]) >= 12
    return required(
        "debian", ok, release.get("PRETTY_NAME") or "unknown system", "use Debian 12: nothing else is tested"
    )


def wanted_packages(text: str) -> list[str]:
    """Names in `packaging/debian-packages.txt`."""
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.partition("#")[0].strip()]


def installed_packages(status: str) -> set[str]:
    """Names of packages that dpkg's status file says are installed."""
    found: set[str] = set()
    for stanza in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status): (.*)$", stanza, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found.add(fields.get("Package", ""))
    return found


def _packages(machine: Machine) -> Finding:
    try:
        wanted = wanted_packages((machine.checkout / "packaging/debian-packages.txt").read_text())
    except OSError:
        return required("packages", False, "the list of packages is not there", "use a full clone")
    missing = sorted(set(wanted) - installed_packages(machine.text("/var/lib/dpkg/status")))
    detail = f"missing: {', '.join(missing)}" if missing else f"all {len(wanted)} are installed"
    return required("packages", not missing, detail, f"apt-get install {' '.join(missing)}, or make setup")


def _devices(machine: Machine) -> list[Finding]:
    tun = machine.exists("/dev/net/tun")
    kvm = machine.exists("/dev/kvm")
    return [
        required("taps", tun, "/dev/net/tun" if tun else "/dev/net/tun does not exist", "modprobe tun"),
        Finding(
            name="kvm",
            ok=kvm,
            level=Level.USEFUL,
            detail="/dev/kvm exists; whether guests boot on it is found out by booting one"
            if kvm
            else "no /dev/kvm: guests run by software emulation, several times slower",
            remedy="" if kvm else "enable (nested) virtualisation for this machine",
        ),
    ]


def _memory(machine: Machine) -> Finding:
    available = _in_meminfo(machine, "MemAvailable")
    ok = available >= NEEDED_MEMORY_MIB
    return required(
        "memory",
        ok,
        f"{available} MiB available, {NEEDED_MEMORY_MIB} needed by the demo",
        "end other programs, or use fewer servers (--servers)",
    )


def _shm(machine: Machine) -> Finding:
    free = machine.free_mib(machine.path("/dev/shm"))
    ok = free >= NEEDED_SHM_MIB
    return required(
        "shared memory",
        ok,
        f"{free} MiB free in /dev/shm, {NEEDED_SHM_MIB} needed by the demo",
        f"mount -o remount,size={2 * NEEDED_SHM_MIB}m /dev/shm",
    )


def _ram_room(machine: Machine) -> list[Finding]:
    """A host's servers have their memory there: it offers no more than that holds."""
    found, shm = _in_meminfo(machine, "MemTotal"), machine.path("/dev/shm")
    if not found or not shm.exists():
        return []
    room = machine.total_mib(shm)
    ok = room >= RAM_SHARE * found
    finding = Finding(
        name="memory for servers",
        ok=ok,
        level=Level.USEFUL,
        detail=f"/dev/shm holds {room} of this machine's {found} MiB: hosts offer no more than that",
        remedy="" if ok else f"mount -o remount,size={int(RAM_SHARE * found)}m /dev/shm",
    )
    return [finding]


def _in_meminfo(machine: Machine, name: str) -> int:
    """MiB; 0 if it is not told."""
    found = re.search(rf"^{name}:\s+(\d+)", machine.text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def _disk(machine: Machine, build: Path) -> Finding:
    free = machine.free_mib(build)
    ok = free >= NEEDED_DISK_MIB
    return required(
        "disk", ok, f"{free} MiB free, {NEEDED_DISK_MIB} needed", f"make room on the file system of {build}"
    )


def _cgroups(machine: Machine) -> Finding:
    if machine.exists("/sys/fs/cgroup/cgroup.controllers"):
        kind = "version 2"
    elif machine.exists("/sys/fs/cgroup/cpu"):
        kind = "version 1"
    else:
        kind = ""
    return Finding(
        name="cgroups",
        ok=bool(kind),
        level=Level.OPTIONAL,
        detail=kind or "not mounted: servers' shares of CPU cannot be limited",
        remedy="" if kind else "mount -t cgroup2 none /sys/fs/cgroup",
    )
