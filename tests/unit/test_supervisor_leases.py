"""A supervisor ends what runs under a lease when its deadline has passed, and starts none without one."""

import asyncio
from pathlib import Path

import pytest

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import Unit
from nahtlos.physical.supervisor.descriptors import DescriptorStore
from nahtlos.physical.supervisor.journal import Journal
from nahtlos.physical.supervisor.units import UnitTable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def table(folder: Path, clock: Clock) -> UnitTable:
    journal = Journal(folder)
    made = UnitTable(journal, DescriptorStore(journal), str(folder), clock)
    made.adopt()
    return made


def sleeper(folder: Path, name: str, *, leased: bool) -> Unit:
    return Unit(name=name, argv=("sleep", "600"), log=folder / "log", leased=leased)


async def ended(units: UnitTable, name: str) -> None:
    async with asyncio.timeout(20):
        while units.statuses()[name].pid is not None:
            await asyncio.sleep(0.01)


async def test_what_is_leased_ends_with_the_lease_and_other_units_do_not(tmp_path: Path) -> None:
    clock = Clock()
    units = table(tmp_path, clock)
    with pytest.raises(Refused):
        await units.start(sleeper(tmp_path, "early", leased=True))
    units.arm(110.0, {})
    await units.start(sleeper(tmp_path, "leased", leased=True))
    await units.start(sleeper(tmp_path, "free", leased=False))
    await units.start(sleeper(tmp_path, "later", leased=False))
    units.arm(112.0, {"later": True})
    clock.now = 113.0
    units.arm(112.5, {})
    await ended(units, "leased")
    await ended(units, "later")
    assert units.statuses()["free"].pid is not None
    with pytest.raises(Refused):
        await units.start(sleeper(tmp_path, "late", leased=True))
    await units.stop("free", 0)


async def test_the_next_supervisor_keeps_to_the_deadline(tmp_path: Path) -> None:
    clock = Clock()
    first = table(tmp_path, clock)
    first.arm(110.0, {})
    await first.start(sleeper(tmp_path, "leased", leased=True))
    clock.now = 111.0
    second = table(tmp_path, clock)
    await ended(second, "leased")
