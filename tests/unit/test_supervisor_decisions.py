"""The supervisor's decisions that need no process: numbers in a command line, pauses between starts, and
what the journal says after a reboot of the host."""

from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import Unit
from nahtlos.physical.supervisor.journal import FdKind, FdRecord, Journal, ProcessRecord, UnitRecord, Units
from nahtlos.physical.supervisor.protocol import Request, Start, encoder, request_decoder
from nahtlos.physical.supervisor.units import next_backoff, substituted


def test_descriptor_names_become_numbers_wherever_they_stand() -> None:
    argv = ("run", "fd={fd:tap.a},x", "{fd:nbd}{fd:tap.a}", "{other}")
    assert substituted(argv, {"tap.a": 3, "nbd": 4}) == ["run", "fd=3,x", "43", "{other}"]


def test_unknown_descriptor_name_is_refused() -> None:
    with pytest.raises(Refused, match=r"\{fd:missing\}"):
        substituted(("{fd:missing}",), {})


def test_what_ran_is_started_at_once_and_pauses_double_to_two_seconds() -> None:
    pauses = [next_backoff(None, ran_for=0.5)]
    for _ in range(9):
        pauses.append(next_backoff(pauses[-1], ran_for=0.5))
    assert pauses == [0.0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.0, 2.0]
    assert next_backoff(2.0, ran_for=1.0) == 0.0


def test_packets_survive_the_wire_with_their_paths() -> None:
    unit = Unit(name="u", argv=("a",), fds=("nbd",), log=Path("/var/log/u"), restart=True)
    request = Request(id=7, call=Start(unit))
    assert request_decoder.decode(encoder.encode(request)) == request


def test_journal_of_another_boot_names_no_process_and_keeps_what_can_be_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    unit = Unit(name="u", argv=("a",), log=Path("/x"), restart=True)
    journal.save_units({"u": UnitRecord(unit=unit, process=ProcessRecord(pid=1, start_time=1))})
    fds = {
        "nbd": FdRecord(kind=FdKind.TCP, identity="socket:[1]", address="127.0.0.1", port=1),
        "tap.a": FdRecord(kind=FdKind.STORED, identity="/dev/net/tun tap-a"),
    }
    journal.save_descriptors(fds)
    assert journal.load_units()["u"].process is not None
    assert journal.load_descriptors() == fds

    for name in ("units.json", "descriptors.json"):
        path = tmp_path / name
        found = msgspec.json.decode(path.read_bytes())
        path.write_bytes(msgspec.json.encode({**found, "boot_id": "of another boot"}))
    assert journal.load_units() == {"u": UnitRecord(unit=unit, ended=True)}
    assert set(journal.load_descriptors()) == {"nbd"}


def test_journal_is_replaced_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save_units({})
    assert [path.name for path in tmp_path.iterdir()] == ["units.json"]
    assert msgspec.json.decode((tmp_path / "units.json").read_bytes())["units"] == {}
    assert Units(boot_id="").units == {}
