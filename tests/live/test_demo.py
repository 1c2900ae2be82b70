"""A demo that is interrupted anywhere leaves nothing the next one would trip over, and touches no other lab.

About a minute and a half on two quiet cores. The lab beside it has a name that the demo's begins with.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nahtlos.lab.cleanup import ROOTS, lab_is_running, processes_of
from nahtlos.lab.datacentre import LabShape, opened, unique_name
from nahtlos.lab.paths import LabPaths
from nahtlos.lab.topology import namespaces_of
from nahtlos.model.nouns import Size
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import Status

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
SHAPE = LabShape(hosts=1, capacity=Size(vcpus=2, memory_mib=512), promised=Size())
LATEST_SECONDS = 30.0
ENDS_WITHIN = 60.0


class Demo:
    """A process of its own, as `make demo` starts it."""

    def __init__(self, name: str, out: Path) -> None:
        self.name = name
        self.log = out / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nahtlos.lab.demo", "--name", name, "--hosts", "2", "--servers", "1",
                 "--out", str(out / name)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def interrupted(self, number: signal.Signals, after: float) -> int:
        """Its exit code; it is interrupted once it has begun to make something."""
        deadline = time.monotonic() + ENDS_WITHIN
        while not namespaces_of(self.name):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            await asyncio.sleep(0.01)
        await asyncio.sleep(after)
        assert self.process.poll() is None, self.log.read_text()
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, ENDS_WITHIN)


@pytest.fixture
def name() -> Iterator[str]:
    yield unique_name("dmo")


def left_of(lab: str) -> list[str]:
    paths = LabPaths(lab)
    folders = [str(p) for p in (paths.run, paths.state, paths.ram) if p.exists()]
    return [*(str(p) for p in processes_of(lab)), *namespaces_of(lab), *folders]


async def asked(lab: str) -> Status:
    async with OperatorClient.unix(LabPaths(lab).operator_socket) as client:
        return await client.status()


async def test_a_demo_interrupted_anywhere_leaves_a_name_that_can_be_opened_again(
    name: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("NAHTLOS_SEED", random.SystemRandom().randrange(1 << 32)))
    chance = random.Random(seed)
    print(f"NAHTLOS_SEED={seed}")
    beside = name[:-2]
    async with opened(beside, SHAPE):
        theirs = processes_of(beside)
        assert theirs
        for number, earliest in ((signal.SIGKILL, 0.0), (signal.SIGKILL, 5.0), (signal.SIGINT, 0.0)):
            after = chance.uniform(earliest, LATEST_SECONDS)
            print(f"{number.name} after {after:.2f} s")
            code = await Demo(name, tmp_path).interrupted(number, after)
            if number is signal.SIGINT:
                assert code == 130
                assert not left_of(name)
            else:
                assert code == -signal.SIGKILL
                assert left_of(name)
                assert not lab_is_running(name)
            async with opened(name, SHAPE) as again, again.client as client:
                assert len(await client.hosts()) == 2  # an edge and the one host this lab has
            assert not left_of(name)
            assert set(theirs) <= set(processes_of(beside)), "a process of the other lab was ended"
            assert (await asked(beside)).leader
    assert not left_of(beside)
    for lab in (name, beside):
        ROOTS.lock_file(lab).unlink(missing_ok=True)
