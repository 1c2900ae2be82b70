"""What every supervisor must do, shown on the one of plain processes: the promises of
`physical.ports.Supervisor`, and that its units and descriptors survive the supervisor itself."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.ports import Unit
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import RunningSupervisor, launch_supervisor

ACCEPTOR = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
while True:
    conn, _ = listener.accept()
    conn.sendall(b"served\\n")
    conn.close()
"""


class Host:
    """A supervisor that tests may kill and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running = self._launch()
        self.client = SupervisorClient(self.running.socket)

    def _launch(self) -> RunningSupervisor:
        return launch_supervisor(
            self.folder / "s.sock", self.folder / "state", environment={"NAHTLOS_LAB": "contract"}
        )

    def crash(self) -> None:
        self.running.kill()

    def recover(self) -> None:
        self.running = self._launch()

    def unit(self, name: str, *argv: str, fds: tuple[str, ...] = (), restart: bool = False) -> Unit:
        return Unit(name=name, argv=argv, fds=fds, log=self.folder / f"{name}.log", restart=restart)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    async def until_logged(self, name: str, text: str, path: Path | None = None) -> None:
        path = path or self.folder / f"{name}.log"
        async with asyncio.timeout(10):
            while True:
                if path.exists() and text in path.read_text():
                    return
                await asyncio.sleep(0.01)

    async def until_restarted(self, name: str, times: int) -> None:
        async with asyncio.timeout(10):
            while True:
                if (await self.client.units())[name].restarts >= times:
                    return
                await asyncio.sleep(0.02)

    async def until_ended(self, name: str) -> int | None:
        async with asyncio.timeout(10):
            while True:
                status = (await self.client.units())[name]
                if status.pid is None:
                    return status.exit_code
                await asyncio.sleep(0.01)

    async def until_pid_other_than(self, name: str, pid: int | None) -> int:
        async with asyncio.timeout(10):
            while True:
                found = (await self.client.units())[name].pid
                if found is not None and found != pid:
                    return found
                await asyncio.sleep(0.005)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host(tmp_path)
    try:
        yield host
    finally:
        if host.running.process.poll() is not None:
            host.recover()
        host.client.close()
        await host.running.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def killed(pid: int) -> None:
    """Gone, not only signalled: dying, it may still take one connection out of the queue with it."""
    os.kill(pid, 9)
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.001)


async def fetched(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_unit_runs_in_its_own_session_with_both_environments_and_its_log(host: Host) -> None:
    unit = Unit(
        name="env",
        argv=("sh", "-c", "echo $NAHTLOS_LAB $OWN; exec sleep 60"),
        environment={"OWN": "mine"},
        log=host.folder / "logs" / "env.log",
    )
    status = await host.client.start(unit)
    assert status.pid is not None
    assert os.getsid(status.pid) == status.pid
    await host.until_logged("env", "mine", unit.log)
    assert unit.log.read_text() == "contract mine\n"


async def test_starting_a_running_unit_changes_nothing(host: Host) -> None:
    first = await host.client.start(host.unit("one", "sleep", "60"))
    again = await host.client.start(host.unit("one", "sleep", "61"))
    assert first.pid == again.pid


async def test_definition_given_while_running_is_used_from_the_next_start_on(host: Host) -> None:
    first = await host.client.start(host.unit("one", "sh", "-c", "echo old; exec sleep 60", restart=True))
    await host.client.start(host.unit("one", "sh", "-c", "echo new; exec sleep 60", restart=True))
    assert first.pid is not None
    os.kill(first.pid, 9)
    await host.until_pid_other_than("one", first.pid)
    await host.until_logged("one", "new")


async def test_ended_unit_stays_listed_with_its_exit_code_until_it_is_stopped(host: Host) -> None:
    await host.client.start(host.unit("brief", "sh", "-c", "exit 7"))
    assert await host.until_ended("brief") == 7
    await host.client.stop("brief")
    assert "brief" not in await host.client.units()


async def test_signalled_unit_reports_the_signal(host: Host) -> None:
    status = await host.client.start(host.unit("victim", "sleep", "60"))
    assert status.pid is not None
    os.kill(status.pid, 9)
    assert await host.until_ended("victim") == -9


async def test_stop_is_gentle_then_firm_and_repeatable(host: Host) -> None:
    stubborn = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    status = await host.client.start(host.unit("stubborn", "sh", "-c", stubborn))
    await host.until_logged("stubborn", "ready")
    began = time.monotonic()
    await host.client.stop("stubborn", grace=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    assert status.pid is not None
    assert not alive(status.pid)
    await host.client.stop("stubborn")


async def test_restart_with_growing_pauses_and_a_count(host: Host) -> None:
    await host.client.start(host.unit("flapping", "sh", "-c", "date +%s%N; exit 1", restart=True))
    await host.until_restarted("flapping", 5)
    times = [int(line) / 1e9 for line in host.log("flapping").split()]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses[1] >= 0.02
    assert pauses[3] >= 0.08


async def test_unknown_program_is_refused_and_leaves_nothing(host: Host) -> None:
    with pytest.raises(Refused, match="cannot start"):
        await host.client.start(host.unit("nothing", "/nonexistent/program"))
    assert "nothing" not in await host.client.units()


async def test_unit_that_needs_a_missing_descriptor_is_refused(host: Host) -> None:
    with pytest.raises(Refused, match="no descriptor 'absent'"):
        await host.client.start(host.unit("needy", "sleep", "1", fds=("absent",)))


async def test_descriptors_are_stored_fetched_replaced_and_dropped(
    host: Host, pipe: tuple[int, int], tmp_path: Path
) -> None:
    await host.client.store_fd("thing", pipe[1])
    with (tmp_path / "file").open("wb") as file:
        await host.client.store_fd("thing", file.fileno())
    assert await host.client.stored() == {"thing"}
    fd = await host.client.fetch_fd("thing")
    assert fd is not None
    os.write(fd, b"through")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"through"
    await host.client.drop_fd("thing")
    assert await host.client.stored() == frozenset()
    assert await host.client.fetch_fd("thing") is None


async def test_listening_socket_outlives_the_unit_that_serves_it(host: Host) -> None:
    port = await host.client.listen_tcp("web", "127.0.0.1", 0)
    assert port == await host.client.listen_tcp("web", "127.0.0.1", 0)
    unit = host.unit("web", sys.executable, "-c", ACCEPTOR, "{fd:web}", fds=("web",), restart=True)
    status = await host.client.start(unit)
    assert await fetched(port) == b"served\n"
    assert status.pid is not None
    await killed(status.pid)
    assert await fetched(port) == b"served\n"


async def test_unix_socket_has_its_mode(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "door.sock"
    await host.client.listen_unix("door", path, mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    await host.client.listen_unix("door", path, mode=0o600)
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.connect(str(path))
    assert host.running.socket.stat().st_mode & 0o777 == 0o600


async def test_port_in_use_is_refused_by_name(host: Host) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(Refused, match="cannot listen") as refusal,
    ):
        await host.client.listen_tcp("web", "127.0.0.1", taken.getsockname()[1])
    assert refusal.value.field == "port"


async def test_successor_adopts_running_units_and_takes_descriptors_back_from_them(host: Host) -> None:
    port = await host.client.listen_tcp("web", "127.0.0.1", 0)
    unit = host.unit("web", sys.executable, "-c", ACCEPTOR, "{fd:web}", fds=("web",), restart=True)
    before = await host.client.start(unit)
    assert await fetched(port) == b"served\n"
    host.crash()
    assert await fetched(port) == b"served\n"
    host.recover()
    after = (await host.client.units())["web"]
    assert after.pid == before.pid
    assert await host.client.stored() == {"web"}
    assert before.pid is not None
    await killed(before.pid)  # now the successor must hold the socket and start the unit again
    assert await fetched(port) == b"served\n"
    assert await host.until_pid_other_than("web", before.pid) != before.pid


async def test_successor_starts_again_what_ended_meanwhile(host: Host) -> None:
    kept = await host.client.start(host.unit("kept", "sleep", "60", restart=True))
    left = await host.client.start(host.unit("left", "sleep", "60"))
    host.crash()
    for status in (kept, left):
        assert status.pid is not None
        os.kill(status.pid, 9)
    host.recover()
    assert await host.until_pid_other_than("kept", kept.pid) != kept.pid
    assert (await host.client.units())["left"].pid is None


async def test_successor_listens_again_where_no_unit_held_the_socket(host: Host, tmp_path: Path) -> None:
    port = await host.client.listen_tcp("idle", "127.0.0.1", 0)
    await host.client.listen_unix("door", tmp_path / "d.sock", mode=0o600)
    host.crash()
    host.recover()
    assert await host.client.stored() == {"idle", "door"}
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


async def test_call_made_while_the_supervisor_is_down_is_answered_by_its_successor(host: Host) -> None:
    await host.client.units()
    host.crash()
    async with asyncio.TaskGroup() as group:
        call = group.create_task(host.client.units())
        await asyncio.sleep(0.1)
        group.create_task(asyncio.to_thread(host.recover))
    assert call.result() == {}


async def test_second_supervisor_of_a_folder_is_refused_and_the_first_serves_on(host: Host) -> None:
    with pytest.raises(Unavailable, match="already"):
        launch_supervisor(host.running.socket, host.folder / "state")
    assert await host.client.units() == {}


async def test_units_without_supervisor_run_on(host: Host) -> None:
    status = await host.client.start(host.unit("daemon", "sleep", "60"))
    host.crash()
    assert status.pid is not None
    assert alive(status.pid)


async def test_a_lease_runs_out_without_a_supervisor_too(host: Host) -> None:
    await host.client.arm(host.client.clock() + 600, {})
    leased = msgspec.structs.replace(host.unit("vmm", "sleep", "600"), leased=True)
    vmm = await host.client.start(leased)
    free = await host.client.start(host.unit("daemon", "sleep", "600"))
    await host.client.arm(host.client.clock() + 1.0, {})
    host.crash()
    assert vmm.pid is not None and free.pid is not None
    async with asyncio.timeout(10):
        while alive(vmm.pid):
            await asyncio.sleep(0.01)
    assert alive(free.pid)
