"""Runs one program of a release's bundle on one file, confined (`jail`), and ends it when it has taken too
long or whoever waits for it has gone. Never interprets what it says.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.storage.jail import BUNDLE, SET_UP_FAILED, Spec

SAID_BYTES = 1 << 20
QUOTED = 400
WATCH_SECONDS = 0.1
ENDED_WITHIN = 5.0


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """What a confined process may use."""

    seconds: float = 60.0
    memory_bytes: int = 1 << 30
    cpu_seconds: int = 60
    file_bytes: int = 0
    """How large the file it writes may become; with 0 it cannot write any."""


class Confined(msgspec.Struct, frozen=True, kw_only=True):
    """How one ended."""

    exit_code: int
    output: str
    complaints: str


class TooMuch(Refused):
    """It was ended because it used more than it was allowed."""

    kind = "refused"


async def run_confined(
    bundle: Bundle,
    argv: tuple[str, ...],
    *,
    folder: Path,
    read: int,
    write: int | None = None,
    secret: int | None = None,
    allowance: Allowance,
    watch: Callable[[], None] | None = None,
) -> Confined:
    """`argv`: what `Bundle` makes of a program. `folder`: an empty folder to put its root on. `watch` is
    called now and then and may raise, which ends the process. TooMuch if it passed its allowance,
    Unavailable if it could not be confined."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = os.fstat(read)
    spec = Spec(
        argv=tuple(inside(bundle, word) for word in argv),
        folder=str(folder),
        bundle=str(bundle.root.resolve()),
        read=read,
        write=write,
        secret=secret,
        environment={name: inside(bundle, value) for name, value in bundle.environment.items()},
        uid=owner.st_uid,
        gid=owner.st_gid,
        memory_bytes=allowance.memory_bytes,
        cpu_seconds=allowance.cpu_seconds,
        file_bytes=allowance.file_bytes,
    )
    descriptors = tuple(each for each in (read, write, secret) if each is not None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", "nahtlos.physical.storage.jail", msgspec.json.encode(spec).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=descriptors,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(allowance.seconds):
            return await _attended(process, allowance, watch)
    except TimeoutError:
        raise TooMuch(
            f"it was not read within {allowance.seconds:g} s",
            field="image",
            remedy="send a smaller or simpler image",
        ) from None
    finally:
        await _end(process)


def inside(bundle: Bundle, word: str) -> str:
    """Paths of the bundle as they are in the jail."""
    return word.replace(str(bundle.root), BUNDLE)


async def _attended(
    process: asyncio.subprocess.Process, allowance: Allowance, watch: Callable[[], None] | None
) -> Confined:
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(_bounded(process.stdout))
        complaints = tasks.create_task(_bounded(process.stderr))
        watching = tasks.create_task(_watch(watch)) if watch else None
        code = await process.wait()
        if watching:
            watching.cancel()
    said = complaints.result()
    if code == SET_UP_FAILED:
        raise Unavailable(f"no process could be confined here: {said[-QUOTED:]}", field="host")
    if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXFSZ):
        raise TooMuch(
            f"reading it took more than is allowed ({signal.Signals(code - 128).name})",
            field="image",
            remedy="send a smaller or simpler image",
        )
    return Confined(exit_code=code, output=output.result(), complaints=said)


async def _watch(watch: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        watch()


async def _bounded(stream: asyncio.StreamReader) -> str:
    """What is said beyond the bound is thrown away; the process is not held up by it."""
    kept = bytearray()
    while part := await stream.read(1 << 16):
        kept += part[: SAID_BYTES - len(kept)]
    return kept.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDED_WITHIN):
                await process.wait()
