"""Doctor: findings of machines that are described, not had."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import Refused
from nahtlos.model.inventory import Accelerator
from nahtlos.ops.doctor import examine, fit, installed_packages, require_lab, wanted_packages
from nahtlos.ops.examined import Level, Machine


class Described(Machine):
    """A machine made of a few files; trials fail if they contain one of `lacks`."""

    def __init__(self, root: Path, lacks: Sequence[str] = (), *, superuser: bool = True) -> None:
        super().__init__(root, checkout=root / "checkout")
        self._lacks = lacks
        self._superuser = superuser
        self.free = self.total = 1 << 20

    def is_root(self) -> bool:
        return self._superuser

    def free_mib(self, path: Path) -> int:
        return self.free

    def total_mib(self, path: Path) -> int:
        return self.total

    def trial(self, argv: Sequence[str], stdin: str = "") -> str:
        said = " ".join(argv) + stdin
        return next((f"no {word}" for word in self._lacks if word in said), "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12"\nID=debian\nVERSION_ID="12"\n',
        "proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n",
        "proc/sys/kernel/random/boot_id": "boot-1\n",
        "dev/net/tun": "",
        "var/lib/dpkg/status": "Package: gcc\nStatus: install ok installed\n\nPackage: mtools\n"
        "Status: deinstall ok config-files\n",
        "checkout/packaging/debian-packages.txt": "# tools\ngcc\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def failing(root: Path, machine: Machine) -> dict[str, str]:
    """Required findings that are not in order, by name; what must be built is none of these tests."""
    return {
        finding.name: finding.detail
        for finding in examine(root / "build", machine)
        if finding.level is Level.REQUIRED
        and not finding.ok
        and finding.name[:7] not in ("release", "guest i")
    }


def test_a_machine_that_has_all_it_needs(root: Path) -> None:
    assert failing(root, Described(root)) == {}


def test_nothing_built_says_what_to_run(root: Path) -> None:
    findings = {finding.name: finding for finding in examine(root / "build", Described(root))}
    assert findings["release 10.0"].remedy == "make releases"
    assert "make image" in findings["guest image"].remedy
    assert not fit(list(findings.values()))


@pytest.mark.parametrize(
    ("lacks", "name"),
    [
        ("vxlan", "vxlan devices"),
        ("netdev", "nftables netdev"),
        ("inet", "nftables inet"),
        ("link show", "network namespaces"),
    ],
)
def test_what_a_trial_shows_missing_is_named(root: Path, lacks: str, name: str) -> None:
    assert name in failing(root, Described(root, [lacks]))


def test_what_is_optional_does_not_keep_the_demo_from_running(root: Path) -> None:
    machine = Described(root, ["netem", "flower", "ct state"])
    findings = {finding.name: finding for finding in examine(root / "build", machine)}
    assert not findings["netem"].ok
    assert not findings["bridge conntrack"].ok
    assert failing(root, machine) == {}


def test_no_root_no_packages_no_memory_no_room(root: Path) -> None:
    (root / "checkout/packaging/debian-packages.txt").write_text("gcc\nmtools\nsyslinux\n")
    (root / "proc/meminfo").write_text("MemAvailable: 1000 kB\n")
    machine = Described(root, superuser=False)
    machine.free = 10
    found = failing(root, machine)
    assert set(found) == {"root", "packages", "memory", "shared memory", "disk"}
    assert found["packages"] == "missing: mtools, syslinux"


def test_a_host_whose_shared_memory_is_small_is_told_what_it_can_offer(root: Path) -> None:
    (root / "dev/shm").mkdir()
    machine = Described(root)
    findings = {finding.name: finding for finding in examine(root / "build", machine)}
    assert findings["memory for servers"].ok
    machine.total = 4394
    findings = {finding.name: finding for finding in examine(root / "build", machine)}
    found = findings["memory for servers"]
    assert not found.ok
    assert "4394 of this machine's 8789 MiB" in found.detail
    assert found.remedy == "mount -o remount,size=7910m /dev/shm"
    assert "memory for servers" not in failing(root, machine)


def test_another_system_is_refused(root: Path) -> None:
    (root / "etc/os-release").write_text("ID=other\nVERSION_ID=41\n")
    assert "debian" in failing(root, Described(root))


def test_the_accelerator_of_this_boot_is_remembered(root: Path) -> None:
    cache = root / "build/cache"
    cache.mkdir(parents=True)
    for boot, name in (("boot-0", "kvm"), ("boot-1", "tcg")):
        chosen = Accelerator(name=name, reason="because")
        (cache / f"accelerator-x-{boot}-y.json").write_bytes(msgspec.json.encode(chosen))
    findings = {finding.name: finding for finding in examine(root / "build", Described(root))}
    assert findings["accelerator"].detail == "tcg: because"
    assert not findings["accelerator"].ok


def test_package_lists() -> None:
    assert wanted_packages("# a\n\ngcc # compiler\n") == ["gcc"]
    assert installed_packages("Package: a\nStatus: install ok installed\n") == {"a"}


def test_trials_report_what_went_wrong() -> None:
    machine = Machine()
    assert machine.trial(["true"]) == ""
    assert machine.trial(["no-such-tool"]) == "no-such-tool is not installed"
    assert "ended with 1" in machine.trial(["false"])


@pytest.mark.parametrize(
    ("lacks", "field"),
    [
        ("--net ip link show", "network namespaces"),
        ("type vxlan", "vxlan devices"),
        ("table netdev", "nftables netdev"),
    ],
)
def test_a_lab_is_refused_by_what_the_machine_lacks(root: Path, lacks: str, field: str) -> None:
    require_lab(Described(root))
    with pytest.raises(Refused) as refused:
        require_lab(Described(root, [lacks]))
    assert refused.value.field == field
    assert refused.value.remedy


def test_a_lab_is_refused_by_root_first_then_by_packages(root: Path) -> None:
    (root / "var/lib/dpkg/status").write_text("")
    with pytest.raises(Refused, match="missing: gcc") as refused:
        require_lab(Described(root))
    assert "apt-get install gcc" in refused.value.remedy
    with pytest.raises(Refused, match="not root"):
        require_lab(Described(root, superuser=False))
