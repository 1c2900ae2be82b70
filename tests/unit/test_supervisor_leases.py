"""A supervisor ends what runs under a lease when its deadline has passed, and starts none without one."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import Unit
from nahtlos.physical.supervisor.descriptors import DescriptorStore
from nahtlos.physical.supervisor.journal import Journal
from nahtlos.physical.supervisor.keeper import keep
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


async def test_without_a_supervisor_its_keeper_ends_what_is_leased(tmp_path: Path) -> None:
    clock = Clock()
    units, journal = table(tmp_path, clock), Journal(tmp_path)
    units.arm(110.0, {})
    await units.start(sleeper(tmp_path, "leased", leased=True))
    await units.start(sleeper(tmp_path, "free", leased=False))
    assert keep(journal, str(tmp_path), clock)
    assert units.statuses()["leased"].pid is not None
    clock.now = 111.0
    keep(journal, str(tmp_path), clock)
    await ended(units, "leased")
    assert units.statuses()["free"].pid is not None
    assert not keep(journal, str(tmp_path), clock), "nothing is left to keep"
    await units.stop("free", 0)


async def test_a_keeper_finds_a_process_whose_start_was_not_noted(tmp_path: Path) -> None:
    """The supervisor died between the spawn and the note of it."""
    clock = Clock()
    units, journal = table(tmp_path, clock), Journal(tmp_path)
    units.arm(110.0, {})
    await units.start(sleeper(tmp_path, "leased", leased=True))
    known = journal.load_units()
    unnoticed = {n: msgspec.structs.replace(r, process=None, ended=False) for n, r in known.items()}
    journal.save_units(unnoticed, journal.load_lease())
    clock.now = 111.0
    keep(journal, str(tmp_path), clock)
    await ended(units, "leased")


async def test_a_host_without_terms_needs_no_keeper(tmp_path: Path) -> None:
    units, journal = table(tmp_path, Clock()), Journal(tmp_path)
    units.arm(None, {})
    assert not keep(journal, str(tmp_path), Clock())
