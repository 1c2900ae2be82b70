"""What a clean-up ends and what it leaves alone: real processes, files in a temporary folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nahtlos.lab import cleanup as subject
from nahtlos.lab import topology
from nahtlos.lab.cleanup import LabLock, Roots, cleanup, lab_is_running, processes_of
from nahtlos.model.errors import Conflict
from nahtlos.physical.network.routing.namespaces import Namespaces

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ONE = f"c{os.getpid() % 100000}"
OTHER = f"{ONE}-b"
SUPERVISOR = """
import subprocess, sys, time
while True:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
"""


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(run=tmp_path / "run", state=tmp_path / "state", ram=tmp_path / "ram")


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(lab: str, code: str = "import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "NAHTLOS_LAB": lab})


def until_listed(lab: str, count: int) -> None:
    deadline = time.monotonic() + 5
    while len(processes_of(lab)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def folders(lab: str, roots: Roots) -> list[Path]:
    made = [roots.run_dir(lab) / "host-1", roots.state_dir(lab), roots.ram_dir(lab)]
    for folder in made:
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    return made


def test_a_supervisor_that_starts_its_children_again_is_ended_with_them(
    roots: Roots, started: list[subprocess.Popen[bytes]]
) -> None:
    started.append(start(ONE, SUPERVISOR))
    until_listed(ONE, 2)
    removed = cleanup(ONE, roots=roots)
    assert len(removed.processes) >= 2
    assert removed.left == ()
    assert started[0].wait(5) == -signal.SIGKILL
    assert processes_of(ONE) == ()


def test_a_lab_whose_name_begins_alike_is_left_alone(
    roots: Roots, started: list[subprocess.Popen[bytes]]
) -> None:
    started += [start(ONE), start(OTHER)]
    mine, others = folders(ONE, roots), folders(OTHER, roots)
    until_listed(ONE, 1)
    until_listed(OTHER, 1)
    cleanup(ONE, roots=roots)
    assert started[0].wait(5) == -signal.SIGKILL
    assert started[1].poll() is None
    assert not any(folder.exists() for folder in mine)
    assert all((folder / "file").exists() for folder in others)
    cleanup(OTHER, roots=roots)
    assert started[1].wait(5) == -signal.SIGKILL


def test_parents_come_before_what_they_started(started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start(ONE, SUPERVISOR))
    until_listed(ONE, 2)
    found = processes_of(ONE)
    assert found[0].pid == started[0].pid
    assert found[1].parent == found[0].pid
    for process in found:
        os.kill(process.pid, signal.SIGKILL)


def test_supervisors_come_first_even_if_what_they_adopted_is_older(
    started: list[subprocess.Popen[bytes]],
) -> None:
    started += [start(ONE), start(ONE, "import time; time.sleep(60)  # nahtlos.entry.supervisor")]
    until_listed(ONE, 2)
    assert [p.pid for p in processes_of(ONE)] == [started[1].pid, started[0].pid]


def test_dnsmasq_inside_a_namespace_of_the_lab_is_ended_by_its_place(
    roots: Roots, started: list[subprocess.Popen[bytes]]
) -> None:
    """It may have lost its environment; a person's shell in the same place is not ours to end."""
    lab = topology.create(ONE, 1)
    environment = {k: v for k, v in os.environ.items() if k != "NAHTLOS_LAB"}
    serving = ["/usr/sbin/dnsmasq", "-C", "/dev/null", "-k", "--port=0", "--pid-file="]
    both = ([*lab.control.enter, *command] for command in (serving, ["sleep", "60"]))
    started.extend(subprocess.Popen(command, env=environment) for command in both)
    until_listed(ONE, 1)
    removed = cleanup(ONE, roots=roots)
    assert ["dnsmasq" in text for text in removed.processes] == [True]
    assert set(removed.namespaces) == {n.namespace for n in lab.nodes}
    assert started[1].poll() is None


def test_we_do_not_end_ourselves(roots: Roots) -> None:
    code = (
        "import sys; from pathlib import Path; from nahtlos.lab.cleanup import *\n"
        f"root = Path({str(roots.run)!r})\n"
        f"print(cleanup({ONE!r}, roots=Roots(run=root, state=root, ram=root)).processes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NAHTLOS_LAB": ONE},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.strip() == "()"


def test_a_process_that_took_over_a_pid_is_not_ended(started: list[subprocess.Popen[bytes]]) -> None:
    started.append(start(ONE))
    until_listed(ONE, 1)
    (found,) = processes_of(ONE)
    earlier = subject.Process(found.pid, found.parent, found.started - 1, found.command)
    assert not subject._kill(earlier)
    assert started[0].poll() is None


def test_state_can_be_kept_and_repeating_finds_nothing(roots: Roots) -> None:
    run, state, ram = folders(ONE, roots)
    removed = cleanup(ONE, keep_state=True, roots=roots)
    assert set(removed.directories) == {str(run.parent), str(ram)}
    assert state.exists()
    assert cleanup(ONE, roots=roots).directories == (str(state),)
    assert not cleanup(ONE, roots=roots)


def test_the_lock_tells_a_running_lab_from_one_left_over(roots: Roots) -> None:
    assert not lab_is_running(ONE, roots)
    with LabLock(ONE, roots) as held:
        assert lab_is_running(ONE, roots)
        assert not lab_is_running(OTHER, roots)
        assert roots.lock_file(ONE).read_text() == f"{os.getpid()}\n"
        with pytest.raises(Conflict, match=str(os.getpid())) as conflict, LabLock(ONE, roots):
            pass
        assert conflict.value.remedy
        assert held.fileno() >= 0
    assert not lab_is_running(ONE, roots), "the file is left, its holder is gone"


def test_the_lock_of_a_killed_process_is_free(roots: Roots, started: list[subprocess.Popen[bytes]]) -> None:
    code = (
        "import sys, time; from pathlib import Path; from nahtlos.lab.cleanup import *\n"
        f"root = Path({str(roots.run)!r})\n"
        f"LabLock({ONE!r}, Roots(run=root, state=root, ram=root)).acquire()\n"
        "time.sleep(60)"
    )
    started.append(start("unrelated", code))
    deadline = time.monotonic() + 10
    while not lab_is_running(ONE, roots):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started[0].kill()
    started[0].wait()
    assert not lab_is_running(ONE, roots)
    LabLock(ONE, roots).acquire()


def test_namespaces_of_its_routers_go_with_it_and_those_of_others_stay(roots: Roots) -> None:
    folders = [roots.run_dir(lab) / "host-1" / "run" for lab in (ONE, OTHER)]
    one, other = map(Namespaces, folders)
    for held, folder in zip((one, other), folders, strict=True):
        folder.mkdir(parents=True)
        held.create("router-1")
    try:
        removed = cleanup(ONE, roots=roots)
        assert removed.namespaces == ("router-1 of run",)
        assert not removed.left
        assert not one.exists("router-1")
        assert other.exists("router-1")
    finally:
        other.destroy("router-1")
