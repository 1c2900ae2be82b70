"""Switching hosts off that are lost: by the command an operator gave for each, while this orchestrator leads.

Only once the host gets no lease any more: else it could come up again and have one, without anybody's seeing
it. That a command returned 0 is recorded, and then it is as if an operator vouched for it. Decides nothing
about servers.
"""

import asyncio
import logging
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Sequence

from nahtlos.model.availability import Off
from nahtlos.model.ids import HostId
from nahtlos.planner.failure import is_silenced
from nahtlos.runtime.controllers.look import Look, Looks
from nahtlos.runtime.store import availability
from nahtlos.runtime.store.store import Store

LOOK_SECONDS = 1.0
COMMAND_SECONDS = 60.0
AGAIN_SECONDS = 10.0

_log = logging.getLogger("nahtlos.runtime.power")
Said = Callable[[str, str, str], None]


def to_switch_off(look: Look) -> tuple[HostId, ...]:
    state = look.state
    off, power = state.policy().off, state.availability.settings.power
    return tuple(
        host
        for host, plan in sorted(state.blueprint.hosts.items() if state.blueprint else ())
        if host in power
        and host not in off
        and not plan.fenced
        and host not in look.inventory.connected
        and is_silenced(look.inventory, plan)
    )


class PowerFence:
    def __init__(self, store: Store, looks: Looks, *, said: Said, wake: Callable[[], None]) -> None:
        self._store = store
        self._looks = looks
        self._said = said
        self._wake = wake

    async def run(self, epoch: int) -> None:
        """Until cancelled, under `epoch`."""
        tried: dict[HostId, float] = {}
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                look = await self._looks.now()
                due = [h for h in to_switch_off(look) if loop.time() >= tried.get(h, 0.0)]
                for host in due:
                    await self._switch_off(epoch, host, look.state.availability.settings.power[host])
                    tried[host] = loop.time() + AGAIN_SECONDS
            except Exception:
                _log.exception("hosts could not be looked at")

    async def _switch_off(self, epoch: int, host: HostId, command: Sequence[str]) -> None:
        self._said("host.power", host, f"{host} is lost: it is switched off")
        failed = await run_command(command)
        if failed:
            self._said("host.power", host, f"{host} could not be switched off: {failed}")
            return
        async with self._store.deciding(epoch) as tx:
            off = Off(by="its power was cut", at=self._store.clock())
            await availability.set_off(tx, host, off)
        self._said("host.power", host, f"{host} is switched off")
        self._wake()


async def run_command(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str:
    """Empty if it returned 0 within its time, else why not."""
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        async with asyncio.timeout(seconds):
            _, complaint = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"{command[0]} did not end within {seconds:g} s"
    if process.returncode == 0:
        return ""
    last = complaint.decode(errors="replace").strip().splitlines()[-1:]
    return f"{command[0]} returned {process.returncode}" + (f": {last[0]}" if last else "")
