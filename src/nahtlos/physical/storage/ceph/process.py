"""The process that carries out requests on images, asked many things side by side, each with a deadline.

A process that lets a deadline pass is ended (by SIGKILL, as it may hang in the cluster's libraries); what
else it was asked ends with it as Unavailable, and the next call starts another one. What it says of itself
goes to the agent's log. Never decides what is asked.
"""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import cast

from nahtlos.model.errors import Conflict, Error, NotFound, Unavailable
from nahtlos.physical.settings import CephSettings

PYTHON = "/usr/bin/python3"
"""The system's: the bindings are its packages."""
WORKER = Path(__file__).with_name("worker.py")
ANSWER_WITHIN = 30.0
WORK_WITHIN = 3600.0
SHORTLY = 1.0
LINE = 8 << 20


class HasSnapshots(Conflict):
    """An image cannot be removed while snapshots of it are there, hidden ones included."""

    kind = "conflict"


class Exists(Conflict):
    kind = "conflict"


class _Call:
    def __init__(self) -> None:
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.part = 0.0


class RbdProcess:
    def __init__(self, settings: CephSettings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, _Call] = {}
        self._long: dict[str, _Call] = {}
        self._number = 0
        self._starting = asyncio.Lock()

    async def ask(self, verb: str, **arguments: object) -> object:
        """Of what takes no time: answered within a fixed deadline."""
        return await self._ask(verb, arguments, ANSWER_WITHIN)

    async def work(self, verb: str, **arguments: object) -> object:
        """Of what takes as long as it takes and says nothing meanwhile."""
        return await self._ask(verb, arguments, WORK_WITHIN)

    async def go_on(self, key: str, verb: str, **arguments: object) -> bool:
        """Of what may take longer than whoever asks can wait: begins it unless it goes on already, and says
        whether it is finished. Ask again with the same `key` until it is; raises what it failed by."""
        call = self._long.get(key)
        if call is None or call.answer.get_loop() is not asyncio.get_running_loop():
            call = self._long[key] = await self._begin(verb, arguments)
        with suppress(TimeoutError):
            async with asyncio.timeout(SHORTLY):
                await asyncio.shield(call.answer)
        if not call.answer.done():
            return False
        del self._long[key]
        call.answer.result()
        return True

    def goes_on(self, key: str) -> bool:
        return key in self._long

    def progress(self, key: str) -> float:
        """Of what goes on under this key, 0 to 1."""
        call = self._long.get(key)
        return call.part if call else 0.0

    async def close(self) -> None:
        process, self._process = self._process, None
        reading, self._reading = self._reading, None
        if process is None or self._loop is not asyncio.get_running_loop():
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if reading is not None:
            await reading

    async def _begin(self, verb: str, arguments: dict[str, object]) -> _Call:
        process = await self._running()
        self._number += 1
        call = self._calls[self._number] = _Call()
        request = json.dumps({"id": self._number, "verb": verb, "arguments": arguments})
        assert process.stdin is not None
        process.stdin.write(request.encode() + b"\n")
        return call

    async def _ask(self, verb: str, arguments: dict[str, object], within: float) -> object:
        call = await self._begin(verb, arguments)
        try:
            async with asyncio.timeout(within):
                return await call.answer
        except TimeoutError:
            await self.close()
            raise Unavailable(
                f"the Ceph cluster did not answer '{verb}' within {within:g} s",
                remedy="see `ceph status` on a host that administers the cluster",
            ) from None

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            process = self._process
            ours = self._loop is asyncio.get_running_loop()
            if process is not None and process.returncode is None and ours:
                return process
            await self.close()
            settings = self._settings
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    *(PYTHON, "-I", str(WORKER), str(settings.configuration), settings.user, settings.pool),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE,
                )
            except OSError as error:
                raise Unavailable(f"{PYTHON} cannot be run: {error}") from error
            self._loop = asyncio.get_running_loop()
            self._reading = asyncio.ensure_future(self._read(process))
            return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Until the process ends. The one task that hands answers over."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._take(cast("dict[str, object]", json.loads(line)))
        code = await process.wait()
        left, self._calls = self._calls, {}
        for call in left.values():
            if not call.answer.done():
                call.answer.set_exception(
                    Unavailable(
                        f"the process that speaks to Ceph ended ({code})",
                        remedy="see that python3-rbd and python3-rados are installed on this host",
                    )
                )
                call.answer.exception()  # nobody may be waiting for it

    def _take(self, answer: dict[str, object]) -> None:
        number = cast("int", answer["id"])
        call = self._calls[number]
        if "done" in answer:
            call.part = cast("int", answer["done"]) / max(cast("int", answer["total"]), 1)
            return
        del self._calls[number]
        if call.answer.done():
            return  # whoever asked has given up
        if "error" in answer:
            call.answer.set_exception(_error(cast("dict[str, str]", answer["error"])))
            call.answer.exception()
        else:
            call.answer.set_result(answer.get("value"))


def _error(said: dict[str, str]) -> Exception:
    kinds: dict[str, type[Error]] = {
        "not-found": NotFound,
        "exists": Exists,
        "has-snapshots": HasSnapshots,
        "busy": Conflict,
        "unavailable": Unavailable,
    }
    kind = kinds.get(said["kind"])
    return AssertionError(said["message"]) if kind is None else kind(f"Ceph: {said['message']}")
