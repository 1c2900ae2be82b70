"""Processes in the simulated world: an agent that can be killed at any moment and is started again.

Owns the life of each incarnation. The agent itself is the real one, over simulated drivers and the
in-memory transport; its ledger is a file that survives it.
"""

import asyncio
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from nahtlos.model.errors import Error
from nahtlos.physical.agent.agent import Agent
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.ports import Crash
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.sim.clock import virtual_loop
from nahtlos.physical.sim.faults import Life
from nahtlos.physical.sim.host import drivers_of
from nahtlos.physical.sim.world import World
from nahtlos.wire.memory import MemoryNetwork
from nahtlos.wire.transport import Channel, Listener, OnChannel, Transport

Dress = Callable[[Transport], Transport]
"""Puts something between an agent and the network: another release's way of speaking."""


class AgentProcess:
    """Runs one host's agent, again and again. `restart_after` is drawn from evenly, in seconds."""

    def __init__(
        self,
        world: World,
        network: MemoryNetwork,
        settings: AgentSettings,
        *,
        restart_after: tuple[float, float] = (0.2, 1.5),
        dress: Dress | None = None,
    ) -> None:
        self.world = world
        self.network = network
        self.settings = settings
        self.host = world.hosts[settings.host]
        self.party = f"host/{settings.host}"
        self.bugs: list[BaseException] = []
        self.starts = 0
        self.held_down = False
        """Killed agents stay dead while this is set."""
        self._restart_after = restart_after
        self._dress: Dress = dress or (lambda transport: transport)
        self._life: Life | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self._life is not None and self._life.alive

    def kill(self, cause: str) -> None:
        if self._life:
            self._life.end(cause)

    def freeze(self) -> None:
        if self._life:
            self._life.freeze()

    def thaw(self) -> None:
        if self._life:
            self._life.thaw()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self.host.powered and not self.held_down:
                await self._live()
            await asyncio.sleep(self.world.random.uniform(*self._restart_after))

    async def _live(self) -> None:
        life = self._life = Life(f"agent of {self.settings.host}")
        self.starts += 1
        self.world.note(self.settings.host, "agent starts", str(self.starts))
        ended = asyncio.Event()
        life.on_end(ended.set)
        life.on_end(lambda: self._vanish(life))
        task = self._task = asyncio.get_running_loop().create_task(
            self._agent(life).run(), name=f"agent {self.settings.host} {self.starts}"
        )
        watch = asyncio.get_running_loop().create_task(ended.wait())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            life.end("stopped")
            task.cancel()
            watch.cancel()
            await asyncio.wait((task, watch))
            self._look_at(task)

    def _agent(self, life: Life) -> Agent:
        ledger = self.world.state_dir / self.settings.host / "ledger.sqlite"
        if not ledger.exists():
            ledger.write_bytes(_new_ledger())
        return Agent(
            self.settings,
            drivers_of(self.world, self.settings.host, life),
            self._dress(LivingTransport(self.network.transport(self.party), life)),
            ledger,
            boot_id=self.host.boot_id,
            now=virtual_loop().wall,
            on_write=lambda text: self.world.crash_point(self.settings.host, text, life),
            on_bug=self.bugs.append,
        )

    def _vanish(self, life: Life) -> None:
        self.world.note(self.settings.host, "agent dies", "", life.cause)
        self.network.vanish(self.party)

    def _look_at(self, task: asyncio.Task[None]) -> None:
        """An agent may end by being killed, or because it cannot begin; anything else is a bug in it."""
        if not task.cancelled():
            error = task.exception()
            if isinstance(error, Error):
                self.world.note(self.settings.host, "agent cannot begin", "", str(error))
            elif error is None:
                self.bugs.append(AssertionError("the agent returned"))
            elif not only_crashes(error):
                self.bugs.append(error)


@functools.cache
def _new_ledger() -> bytes:
    """What a ledger's file is before anything was written to it. Copied, since simulated hosts come up by the
    thousand and making the tables takes longer than many a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger(path).close()
        return path.read_bytes()


def only_crashes(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(only_crashes(e) for e in cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return isinstance(error, Crash | asyncio.CancelledError)


class LivingTransport:
    """The network as a process may use it: not at all once it is dead."""

    def __init__(self, inner: Transport, life: Life) -> None:
        self._inner = inner
        self._life = life

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        self._life.check()
        await self._life.thawed()
        channel = await self._inner.dial(address, port, expect=expect, timeout=timeout)
        await self._life.thawed()
        self._life.check()
        return _LivingChannel(channel, self._life)

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> Listener:
        self._life.check()

        async def on_living(channel: Channel) -> None:
            await self._life.thawed()
            self._life.check()
            await on_channel(_LivingChannel(channel, self._life))

        return await self._inner.listen(address, port, on_living)


class _LivingChannel:
    def __init__(self, inner: Channel, life: Life) -> None:
        self._inner = inner
        self._life = life

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, frame: bytes) -> None:
        await self._life.thawed()
        self._life.check()
        await self._inner.send(frame)

    async def receive(self) -> bytes:
        self._life.check()
        frame = await self._inner.receive()
        await self._life.thawed()
        self._life.check()
        return frame

    async def close(self) -> None:
        await self._inner.close()
