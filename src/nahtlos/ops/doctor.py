"""What this machine can and cannot do for the cloud, with remedies.

Every check is a small function of a `Machine`, which stands for the outside: files, tools, resources. Trials
(of network devices, of packet rules) run in a network namespace that ends with the command that made it, so
nothing is changed and nothing can be left behind. The command line prints the findings; nothing here does.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from nahtlos.model.errors import Error, Refused
from nahtlos.model.inventory import Accelerator
from nahtlos.model.nouns import Release
from nahtlos.model.values import Value
from nahtlos.ops.version_rows import rows_that_matter
from nahtlos.runtime.releases import TRACKS, broken_releases, list_images, list_releases, load_release

MIB = 1 << 20
NEEDED_MEMORY_MIB = 3 * 1024
"""Six servers of 256 MiB, a second copy of those that move, and the processes around them."""
NEEDED_SHM_MIB = 2 * 1024
"""RAM files of six servers, and of the copies of those that move."""
RAM_SHARE = 0.9
"""Of the machine's memory, what servers may want; the rest is the host's own."""
NEEDED_DISK_MIB = 4 * 1024
"""Downloads, two unpacked releases, volumes."""
TRIAL_SECONDS = 10.0


class Level(StrEnum):
    REQUIRED = "required"
    """Without it the demo cannot run."""
    USEFUL = "useful"
    """Without it something is slower or less complete; the detail says what."""
    OPTIONAL = "optional"
    """Not used today; named because people ask."""


class Finding(Value, frozen=True, kw_only=True):
    name: str
    ok: bool
    level: Level
    detail: str
    remedy: str = ""


class Machine:
    """The outside, as the checks see it. Tests replace `root` and `trial`."""

    def __init__(self, root: Path = Path("/"), checkout: Path | None = None) -> None:
        self.root = root
        self.checkout = checkout or Path(__file__).resolve().parents[3]

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def exists(self, path: str) -> bool:
        return self.path(path).exists()

    def text(self, path: str) -> str:
        """Content of a file; empty if it cannot be read."""
        try:
            return self.path(path).read_text(errors="replace")
        except OSError:
            return ""

    def is_root(self) -> bool:
        return os.geteuid() == 0

    def free_mib(self, path: Path) -> int:
        """Of the file system that holds `path`, or would."""
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free // MIB

    def total_mib(self, path: Path) -> int:
        """Of the file system that holds `path`, which exists."""
        return shutil.disk_usage(path).total // MIB

    def trial(self, argv: Sequence[str], stdin: str = "") -> str:
        """Empty if the command succeeds, else why not."""
        try:
            done = subprocess.run(
                argv, input=stdin, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
            )
        except FileNotFoundError:
            return f"{argv[0]} is not installed"
        except subprocess.TimeoutExpired:
            return f"{argv[0]} did not end within {TRIAL_SECONDS:g} s"
        except OSError as error:
            return f"{argv[0]}: {error.strerror}"
        if done.returncode == 0:
            return ""
        said = (done.stderr or done.stdout).strip().splitlines()
        return said[0] if said else f"{argv[0]} ended with {done.returncode}"

    def isolated(self, argv: Sequence[str], stdin: str = "") -> str:
        """`trial` in a network namespace of its own."""
        return self.trial(["unshare", "--net", *argv], stdin)


def examine(build: Path, machine: Machine | None = None) -> list[Finding]:
    """All findings, those that must be in order first."""
    machine = machine or Machine()
    findings = [
        _root(machine),
        _debian(machine),
        _packages(machine),
        *_devices(machine),
        _namespaces(machine),
        *(_link_kind(machine, kind) for kind in ("veth", "bridge", "vxlan")),
        *_packet_rules(machine),
        _memory(machine),
        _shm(machine),
        *_ram_room(machine),
        _disk(machine, build),
        *_releases(build),
        *_version_pairs(build),
        _image(build),
        _accelerator(machine, build / "cache"),
        _bridge_tracking(machine),
        _cgroups(machine),
        *_optional(machine),
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
        lambda: [_namespaces(machine)],
        lambda: [_link_kind(machine, kind) for kind in ("veth", "bridge", "vxlan")],
        lambda: _packet_rules(machine),
    )
    for check in checks:
        for finding in check():
            if not finding.ok and finding.level is Level.REQUIRED:
                raise Refused(finding.detail, field=finding.name, remedy=finding.remedy)


def fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing that is required is missing."""
    return all(finding.ok for finding in findings if finding.level is Level.REQUIRED)


def _required(name: str, ok: bool, detail: str, remedy: str) -> Finding:
    return Finding(name=name, ok=ok, level=Level.REQUIRED, detail=detail, remedy="" if ok else remedy)


# --- the machine ----------------------------------------------------------------------------------------


def _root(machine: Machine) -> Finding:
    ok = machine.is_root()
    return _required(
        "root", ok, "running as root" if ok else "not root: namespaces and taps need it", "run it with sudo"
    )


def _debian(machine: Machine) -> Finding:
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', machine.text("/etc/os-release"), re.MULTILINE))
    ok = release.get("ID") == "debian" and release.get("VERSION_ID", "0").isdigit()
    ok = ok and int(release["VERSION_ID"]) >= 12
    return _required(
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
        return _required("packages", False, "the list of packages is not there", "use a full clone")
    missing = sorted(set(wanted) - installed_packages(machine.text("/var/lib/dpkg/status")))
    detail = f"missing: {', '.join(missing)}" if missing else f"all {len(wanted)} are installed"
    return _required("packages", not missing, detail, f"apt-get install {' '.join(missing)}, or make setup")


def _devices(machine: Machine) -> list[Finding]:
    tun = machine.exists("/dev/net/tun")
    kvm = machine.exists("/dev/kvm")
    return [
        _required("taps", tun, "/dev/net/tun" if tun else "/dev/net/tun does not exist", "modprobe tun"),
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
    return _required(
        "memory",
        ok,
        f"{available} MiB available, {NEEDED_MEMORY_MIB} needed by the demo",
        "end other programs, or use fewer servers (--servers)",
    )


def _shm(machine: Machine) -> Finding:
    free = machine.free_mib(machine.path("/dev/shm"))
    ok = free >= NEEDED_SHM_MIB
    return _required(
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
    return _required(
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


# --- network --------------------------------------------------------------------------------------------

_GATE = """table netdev probe {
  set moving { type ether_addr; }
  chain ingress { type filter hook ingress device "lo" priority 0; ether daddr @moving fwd to "lo"; }
}
"""
_BRIDGE = """table bridge probe {
  chain forward { type filter hook forward priority 0; }
}
"""
_BRIDGE_TRACKING = """table bridge probe {
  chain forward { type filter hook forward priority 0; ct state established accept; }
}
"""
_INET = "table inet probe { set addresses { type ipv4_addr; }; }\n"
_FLOWER = """qdisc add dev lo clsact
filter add dev lo ingress protocol ip flower dst_ip 192.0.2.1 action pass
"""


def _trial_finding(name: str, level: Level, problem: str, works: str, remedy: str) -> Finding:
    return Finding(
        name=name, ok=not problem, level=level, detail=problem or works, remedy=remedy if problem else ""
    )


def _namespaces(machine: Machine) -> Finding:
    problem = machine.isolated(["ip", "link", "show", "lo"])
    return _trial_finding(
        "network namespaces",
        Level.REQUIRED,
        problem,
        "can be made",
        "use a kernel with CONFIG_NET_NS, as root",
    )


def _link_kind(machine: Machine, kind: str) -> Finding:
    extra = ["id", "1", "dstport", "4789", "nolearning"] if kind == "vxlan" else []
    problem = machine.isolated(["ip", "link", "add", "probe0", "type", kind, *extra])
    return _trial_finding(
        f"{kind} devices",
        Level.REQUIRED,
        problem,
        "can be made",
        f"modprobe {kind}, or use a kernel that has them",
    )


def _packet_rules(machine: Machine) -> list[Finding]:
    return [
        _trial_finding(
            "nftables netdev",
            Level.REQUIRED,
            machine.isolated(["nft", "-f", "-"], _GATE),
            "sets and forwarding at ingress: moves lose no packet",
            "use a kernel with CONFIG_NF_TABLES_NETDEV and CONFIG_NFT_FWD_NETDEV",
        ),
        _trial_finding(
            "nftables inet",
            Level.REQUIRED,
            machine.isolated(["nft", "-f", "-"], _INET),
            "rules for what enters and leaves a host",
            "use a kernel with CONFIG_NF_TABLES_INET",
        ),
        _trial_finding(
            "nftables bridge",
            Level.OPTIONAL,
            machine.isolated(["nft", "-f", "-"], _BRIDGE),
            "rules within a bridge",
            "use a kernel with CONFIG_NF_TABLES_BRIDGE",
        ),
    ]


def _bridge_tracking(machine: Machine) -> Finding:
    problem = machine.isolated(["nft", "-f", "-"], _BRIDGE_TRACKING)
    fallback = machine.exists("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not problem:
        detail = "connections can be tracked within a bridge (nf_conntrack_bridge)"
    elif fallback:
        detail = "not within a bridge, but by way of br_netfilter"
    else:
        detail = f"connections cannot be tracked within a bridge: {problem}"
    return Finding(
        name="bridge conntrack",
        ok=not problem or fallback,
        level=Level.OPTIONAL,
        detail=detail,
        remedy="modprobe nf_conntrack_bridge or br_netfilter" if problem and not fallback else "",
    )


def _optional(machine: Machine) -> list[Finding]:
    return [
        _trial_finding(
            "netem",
            Level.OPTIONAL,
            machine.isolated(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]),
            "links can be made slow and lossy by tc",
            "modprobe sch_netem, or use a kernel that has it",
        ),
        _trial_finding(
            "flower",
            Level.OPTIONAL,
            machine.isolated(["tc", "-batch", "-"], _FLOWER),
            "tc can match flows",
            "modprobe cls_flower, or use a kernel that has it",
        ),
        _present(
            machine,
            "openvswitch",
            "/sys/module/openvswitch",
            "modprobe openvswitch, or use a kernel that has it",
        ),
        _present(machine, "vhost-net", "/dev/vhost-net", "modprobe vhost_net, or use a kernel that has it"),
    ]


def _present(machine: Machine, name: str, path: str, remedy: str) -> Finding:
    ok = machine.exists(path)
    return Finding(
        name=name,
        ok=ok,
        level=Level.OPTIONAL,
        detail="present; not used" if ok else "absent; not needed",
        remedy="" if ok else remedy,
    )


# --- what was built -------------------------------------------------------------------------------------


def _releases(build: Path) -> list[Finding]:
    folder = build / "releases"
    built = list_releases(folder)
    findings = [_track(name, [r for r in built if r.suite == track.suite], folder)
                for name, track in TRACKS.items()]  # fmt: skip
    findings.extend(
        _required("release", False, str(error), error.remedy or "build it again")
        for error in broken_releases(folder)
    )
    return findings


def _track(name: str, built: list[Release], folder: Path) -> Finding:
    title = f"release {name}"
    if not built:
        return _required(title, False, "not built", "make releases")
    release = built[-1]
    try:
        load_release(folder, release.id)
    except Error as error:
        return _required(title, False, f"{error.field}: {error.message}", error.remedy)
    return _required(title, True, f"{release.id}, every file as in its manifest", "")


def _version_pairs(build: Path) -> list[Finding]:
    """What the table says of those that were built, as guests run here."""
    known = _newest(build / "cache", lambda _: True)
    rows = rows_that_matter(list_releases(build / "releases"), known.name if known is not None else "tcg")
    return [
        Finding(
            name=f"hypervisor {row.title}",
            ok=row.ok,
            level=Level.USEFUL,
            detail=row.detail,
            remedy="" if row.ok else "go by a release between them: docs/version-pairs.md",
        )
        for row in rows
    ]


def _image(build: Path) -> Finding:
    images = list_images(build / "images")
    return _required(
        "guest image", bool(images), images[-1].id if images else "not built", "build it: make image"
    )


def _accelerator(machine: Machine, cache: Path) -> Finding:
    """What the last probe that booted a guest on this machine, since it was started, found."""
    boot = machine.text("/proc/sys/kernel/random/boot_id").strip()
    remembered = _newest(cache, lambda path: not boot or boot in path.name)
    if remembered is None:
        return Finding(
            name="accelerator",
            ok=True,
            level=Level.USEFUL,
            detail="not known yet: the first host that starts boots a probe to find out",
        )
    slow = remembered.name == "tcg"
    return Finding(
        name="accelerator",
        ok=not slow,
        level=Level.USEFUL,
        detail=f"{remembered.name}: {remembered.reason}",
        remedy="use a machine whose KVM works, for figures near those of production" if slow else "",
    )


def _newest(cache: Path, wanted: Callable[[Path], bool]) -> Accelerator | None:
    paths = [path for path in cache.glob("accelerator-*.json") if wanted(path)] if cache.is_dir() else []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            return msgspec.json.decode(path.read_bytes(), type=Accelerator)
        except (msgspec.MsgspecError, OSError):
            continue
    return None
