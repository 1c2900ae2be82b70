"""What a backup's map and manifest say, and which chains can be restored."""

import threading
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import BackupId, VolumeId
from nahtlos.model.storage import BackupSpec
from nahtlos.physical.storage.backup_targets import (
    GRANULE,
    BackupManifest,
    FolderTarget,
    NbdTarget,
    Range,
    checked_chain,
    packed,
    target_of,
    unpacked,
)
from nahtlos.physical.storage.backups import Pace, pieces
from nahtlos.physical.storage.nbd import Address, parsed
from nahtlos.physical.storage.points import GRANULARITY, bitmap_name

SIZE = 100 * GRANULE + 512


def manifest(name: str, base: BackupManifest | None = None) -> BackupManifest:
    return BackupManifest(
        backup=BackupId(name),
        volume=VolumeId("v"),
        base=base.backup if base else None,
        base_sha256=base.digest() if base else "",
        created_at=1.0,
        size=SIZE,
        map=packed((), SIZE),
        sha256="",
        stored_bytes=0,
    )


@given(
    st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5 * GRANULE)).map(
            lambda pair: Range(pair[0], min(pair[1], SIZE - pair[0]))
        )
    )
)
def test_map_holds_at_least_what_was_put_in_and_whole_granules(ranges: list[Range]) -> None:
    found = tuple(unpacked(packed(ranges, SIZE), SIZE))
    held = {
        byte // GRANULE for each in found for byte in range(each.offset, each.offset + each.length, GRANULE)
    }
    wanted = {
        granule
        for each in ranges
        for granule in range(each.offset // GRANULE, (each.offset + each.length - 1) // GRANULE + 1)
    }
    assert held == wanted
    for before, after in pairwise(found):
        assert before.offset + before.length < after.offset, "neighbours are one range"
    assert all(each.offset % GRANULE == 0 for each in found)
    assert all(each.offset + each.length <= SIZE for each in found)


def test_map_that_is_none_is_refused() -> None:
    for text in ("?", "AAAA", ""):
        with pytest.raises(Refused):
            tuple(unpacked(text, SIZE))


def test_pieces_cover_ranges_in_requests() -> None:
    assert list(pieces([Range(0, 9 << 20)])) == [(0, 4 << 20), (4 << 20, 4 << 20), (8 << 20, 1 << 20)]


def test_chain_is_followed_from_the_last_to_what_it_rests_on() -> None:
    one = manifest("one")
    two = manifest("two", one)
    three = manifest("three", two)
    assert checked_chain((one, two, three)) == (one, two, three)
    assert checked_chain((two, one, two)) == (one, two)
    assert checked_chain((manifest("other"), one)) == (one,), "a full one needs nothing before it"
    with pytest.raises(NotFound, match="two"):
        checked_chain((one, three))
    with pytest.raises(Refused, match="is not what"):
        checked_chain((msgspec.structs.replace(one, size=SIZE + 512), two))
    with pytest.raises(NotFound):
        checked_chain(())


def test_targets_are_folders_and_nbd_addresses() -> None:
    def at(target: str) -> BackupSpec:
        return BackupSpec(id=BackupId("b"), volume=VolumeId("v"), target=target)

    pki = Path("/none")
    assert isinstance(target_of(at("/srv/backups"), pki), FolderTarget)
    assert isinstance(target_of(at("nbds://store/disk"), pki), NbdTarget)
    for target in ("relative", "https://store", "", "nbdx://store/disk", "nbd:///disk", "nbd://store:x/disk"):
        with pytest.raises(Refused) as refusal:
            target_of(at(target), pki)
        assert refusal.value.field == "target"
    assert parsed("nbd://store:20000/a%20b") == Address("store", 20000, "a b")
    assert parsed("nbds://[fd00::1]/x") == Address("fd00::1", 10809, "x", tls=True)


def test_names_of_bitmaps_sort_by_time_and_end_by_what_they_follow() -> None:
    early, late = bitmap_name("b", 5.0), bitmap_name("a", 1e9)
    assert early < late and len(late) < 64
    assert bitmap_name("b", 7.0)[-16:] == early[-16:] != late[-16:]


def test_pace_keeps_to_its_rate_and_ends_when_told() -> None:
    pace, stop = Pace(1 << 20), threading.Event()
    began = time.monotonic()
    for _ in range(4):
        pace.wait(1 << 16, stop)
    assert time.monotonic() - began > 0.1
    Pace(0).wait(1 << 40, stop)
    stop.set()
    Pace(1).wait(1 << 40, stop)
    assert time.monotonic() - began < 60


def test_map_is_as_fine_as_the_bitmaps_it_is_made_of() -> None:
    assert GRANULE == GRANULARITY
