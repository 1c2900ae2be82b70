"""When a storage daemon that runs and says nothing is given up."""

from nahtlos.physical.storage.silence import Silence


def test_only_silence_in_a_row_of_one_process_counts() -> None:
    silence = Silence()
    assert silence.lasts(1, 10.0) == 0.0
    assert silence.lasts(1, 45.0) == 35.0
    assert silence.lasts(2, 50.0) == 0.0, "another one, which may only just be starting"
    assert silence.lasts(2, 60.0) == 10.0
    silence.broken()
    assert silence.lasts(2, 100.0) == 0.0, "it has answered in between"
    assert [silence.lasts(None, at) for at in (500.0, 600.0)] == [0.0, 0.0], "nobody to give up"
