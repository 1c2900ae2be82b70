"""What a console has said is one line of bytes over all the VMMs that said it, of which the end is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.physical.agent.consoles.pace import Pace
from nahtlos.physical.agent.consoles.past import Past, Piece, piece
from nahtlos.physical.ports import CONSOLE_KEPT

PAST = Past(history="h", epoch=2, end=100, data=b"0123456789")


@pytest.mark.parametrize(
    ("history", "offset", "limit", "wanted"),
    [
        ("h", 95, 64, Piece(95, 5, in_past=True)),  # never past and log at once
        ("h", 95, 2, Piece(95, 2, in_past=True)),
        ("h", 100, 64, Piece(100, 50, in_past=False)),
        ("h", 130, 64, Piece(130, 20, in_past=False)),
        ("h", 150, 64, Piece(150, 0, in_past=False)),
        ("h", 7, 64, Piece(90, 10, in_past=True)),  # given up: the oldest that is kept
        ("h", 9000, 64, Piece(150, 0, in_past=False)),
        ("", 0, 64, Piece(90, 10, in_past=True)),
        ("another", 120, 64, Piece(90, 10, in_past=True)),
    ],
)
def test_what_comes_next(history: str, offset: int, limit: int, wanted: Piece) -> None:
    assert piece(PAST, 50, history=history, offset=offset, limit=limit) == wanted


def test_of_a_long_log_only_the_end_is_kept() -> None:
    size = CONSOLE_KEPT + 1000
    assert piece(PAST, size, history="h", offset=0, limit=10) == Piece(1100, 10, in_past=False)


@given(st.lists(st.integers(min_value=0, max_value=2 * CONSOLE_KEPT), min_size=1, max_size=6))
def test_over_any_number_of_vmms_every_byte_has_one_offset(sizes: list[int]) -> None:
    said = bytes(index % 251 for index in range(1000)) * (sum(sizes) // 1000 + 1)
    past, begin = Past(history="h", epoch=1), 0
    for epoch, size in enumerate(sizes, start=2):
        log = said[begin : begin + size]
        past = past.followed_by(log[-CONSOLE_KEPT:] if size else b"", size, epoch)
        begin += size
        assert (past.end, past.epoch, past.history) == (begin, epoch, "h")
        assert past.data == said[past.start : past.end]
        assert len(past.data) == min(begin, CONSOLE_KEPT)


def test_what_is_sent_keeps_to_its_rate_and_may_come_at_once_after_a_pause() -> None:
    pace = Pace(rate=1000, burst=500)
    assert pace.take(500, now=1.0) == 0.0
    assert pace.take(100, now=1.0) == pytest.approx(0.1)
    assert pace.take(100, now=1.2) == pytest.approx(0.0, abs=1e-9)
    assert pace.take(1000, now=1.2) == pytest.approx(1.0)
    assert pace.take(500, now=100.0) == 0.0


def test_however_it_is_taken_no_more_than_the_rate_goes_out() -> None:
    pace, now, sent = Pace(rate=1000, burst=500), 0.0, 0
    while now < 60.0:
        now += pace.take(64, now) + 0.001
        sent += 64
    assert sent <= 1000 * now + 500 + 64
