"""Which copy is the wrong one, and when a difference is one."""

from nahtlos.model.ids import HostId
from nahtlos.physical.agent.volumes.scrub import SMALLEST_BYTES, alike, halves, stays, wrong_ones

A, B, C = HostId("a"), HostId("b"), HostId("c")


def test_most_are_right_and_where_there_is_no_most_the_one_that_is_read() -> None:
    assert wrong_ones({A: b"1", B: b"1", C: b"2"}, (A, B, C)) == (C,)
    assert wrong_ones({A: b"2", B: b"1", C: b"1"}, (A, B, C)) == (A,)
    assert wrong_ones({A: b"1", B: b"2"}, (A, B)) == (B,)
    assert wrong_ones({A: b"1", B: b"2"}, (B, A)) == (A,)
    assert wrong_ones({A: b"1", B: b"2", C: b"3"}, (A, B, C)) == (B, C)
    assert wrong_ones({A: b"1", B: b"1"}, (A, B)) == ()


def test_difference_counts_only_if_it_stays_as_it_is() -> None:
    assert stays({A: b"1", B: b"2"}, {A: b"1", B: b"2"})
    assert not stays({A: b"1", B: b"2"}, {A: b"2", B: b"2"}), "a write that has come to the other one"
    assert not stays({A: b"1", B: b"2"}, {A: b"3", B: b"4"}), "written meanwhile"
    assert not stays({A: b"1", B: b"1"}, {A: b"1", B: b"1"})
    assert alike({A: b"1"}) and not alike({A: b"1", B: b"2"})


def test_halves_cover_a_range_and_come_to_an_end() -> None:
    assert halves(0, 64 << 20) == ((0, 32 << 20), (32 << 20, 32 << 20))
    for length in (SMALLEST_BYTES + 512, 3 * SMALLEST_BYTES, 2 * SMALLEST_BYTES):
        parts = halves(8, length)
        assert parts[0][0] == 8 and sum(part[1] for part in parts) == length
        assert parts[1][0] == 8 + parts[0][1]
        assert all(0 < part[1] < length for part in parts)
