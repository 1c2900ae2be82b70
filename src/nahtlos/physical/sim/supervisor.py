"""`physical.ports.Supervisor` over the simulated world. What it holds belongs to the host and outlives the
agent; descriptors are real ones, so that callers handle them as they would."""

import os
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import Unit, UnitStatus
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.leases import arm, clock_of

TAP = -1
"""Stands for a tap's descriptor: the tap itself is in `sim.paths`."""


class SimSupervisor(SimDriver):
    name = "supervisor"

    async def start(self, unit: Unit) -> UnitStatus:
        async with self.verb("start", unit.name):
            for fd in unit.fds:
                if fd not in self.host.fds:
                    raise Refused(f"no descriptor is stored as {fd}", field="fds")
            held = self.host.units.get(unit.name)
            if held is None or held[1].pid is None:
                status = UnitStatus(name=unit.name, pid=self.world.new_pid())
                held = self.host.units[unit.name] = (unit, status)
            return held[1]

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        async with self.verb("stop", name):
            self.host.units.pop(name, None)

    async def units(self) -> dict[str, UnitStatus]:
        async with self.verb("units"):
            own = {name: status for name, (_, status) in self.host.units.items()}
            vmms = {
                v.id.unit: UnitStatus(name=v.id.unit, pid=None if v.ended else v.pid)
                for v in self.host.vmms.values()
            }
            return own | vmms

    async def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        async with self.verb("arm"):
            arm(self.world, self.host, deadline, leased)

    def clock(self) -> float:
        return clock_of(self.world, self.host)

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        async with self.verb("listen_tcp", name):
            return self.host.listening.setdefault(name, port or self.world.new_port())

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None:
        async with self.verb("listen_unix", name):
            self.host.listening.setdefault(name, 0)

    async def store_fd(self, name: str, fd: int) -> None:
        async with self.verb("store_fd", name):
            duplicate = os.dup(fd)
            self._close(name)
            self.host.fds[name] = duplicate

    async def fetch_fd(self, name: str) -> int | None:
        async with self.verb("fetch_fd", name):
            fd = self.host.fds.get(name)
            if fd is None:
                return None
            return os.open(os.devnull, os.O_RDWR) if fd == TAP else os.dup(fd)

    async def drop_fd(self, name: str) -> None:
        async with self.verb("drop_fd", name):
            self._close(name)
            self.host.listening.pop(name, None)

    async def stored(self) -> frozenset[str]:
        async with self.verb("stored"):
            return frozenset(self.host.fds) | frozenset(self.host.listening)

    def _close(self, name: str) -> None:
        fd = self.host.fds.pop(name, None)
        if fd is not None and fd != TAP:
            os.close(fd)

    def end_unit(self, name: str, exit_code: int) -> None:
        """A daemon ended by itself: it stays listed, or is started again if its unit says so."""
        unit, status = self.host.units[name]
        if unit.restart:
            status = msgspec.structs.replace(status, pid=self.world.new_pid(), restarts=status.restarts + 1)
        else:
            status = msgspec.structs.replace(status, pid=None, exit_code=exit_code)
        self.host.units[name] = (unit, status)
