"""Starting a supervisor as the lab and the tests do: a process of its own that outlives who started it."""

import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, SO_PEERCRED, SOCK_SEQPACKET, SOL_SOCKET
from socket import socket as socket_of

from nahtlos.model.errors import Unavailable
from nahtlos.physical.supervisor.client import SupervisorClient

READY_WITHIN = 10.0


class RunningSupervisor:
    """A supervisor process this process started."""

    def __init__(self, socket: Path, process: subprocess.Popen[bytes]) -> None:
        self.socket = socket
        self.process = process

    def kill(self) -> None:
        """As a crash would; its units run on."""
        self.process.kill()
        self.process.wait(timeout=READY_WITHIN)

    async def close(self) -> None:
        """End every unit, then the supervisor."""
        client = SupervisorClient(self.socket)
        try:
            for name in await client.units():
                await client.stop(name, grace=0)
        finally:
            client.close()
            self.process.terminate()
            self.process.wait(timeout=READY_WITHIN)


def launch_supervisor(
    socket: Path,
    state_dir: Path,
    *,
    namespace: str | None = None,
    environment: dict[str, str] | None = None,
    inherit: tuple[int, ...] = (),
) -> RunningSupervisor:
    """Returns when it answers. Blocks for the time a Python process takes to start. `inherit`: descriptors
    the supervisor keeps open as long as it lives."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    entry = [
        sys.executable,
        "-m",
        "nahtlos.entry.supervisor",
        "--socket",
        str(socket),
        "--state",
        str(state_dir),
    ]
    inside = ["nsenter", f"--net=/run/netns/{namespace}"] if namespace else []
    with (state_dir / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            inside + entry,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            pass_fds=inherit,
        )
    until = time.monotonic() + READY_WITHIN
    while not _answers(socket, process.pid):
        if process.poll() is not None or time.monotonic() > until:
            process.send_signal(signal.SIGKILL)
            process.wait()
            tail = (state_dir / "supervisor.log").read_text(errors="replace")[-500:]
            raise Unavailable(f"the supervisor did not start: {tail}")
        time.sleep(0.01)
    return RunningSupervisor(socket, process)


def _answers(path: Path, pid: int) -> bool:
    """Whether it is this process that listens there: a path may be left over, or another's."""
    with suppress(OSError), socket_of(AF_UNIX, SOCK_SEQPACKET) as sock:
        sock.connect(str(path))
        credentials = sock.getsockopt(SOL_SOCKET, SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", credentials)[0] == pid
    return False
