"""The prober's pure parts: plans and HTTP answers as they may come."""

import pytest

from nahtlos.lab.probe.exchanges import parse_answer
from nahtlos.lab.probe.loop import Every
from nahtlos.lab.probe.plan import decode_plan
from nahtlos.model.errors import Refused

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    ("received", "ended", "expected"),
    [
        (b"", False, None),
        (b"HTTP/1.1 200", False, None),
        (OK + b"ok", False, None),
        (OK + b"ok\n", False, (200, b"ok\n", "")),
        (OK + b"ok", True, (0, b"", "closed in the middle of an answer")),
        (b"", True, (0, b"", "closed before an answer")),
        (b"HTTP/1.0 503 no\r\n\r\nlater", False, None),
        (b"HTTP/1.0 503 no\r\n\r\nlater", True, (503, b"later", "")),
        (b"SSH-2.0\r\n\r\n", False, (0, b"", "not an HTTP answer")),
    ],
)
def test_an_answer_is_judged_once_it_is_whole(
    received: bytes, ended: bool, expected: tuple[int, bytes, str] | None
) -> None:
    assert parse_answer(received, ended=ended) == expected


def test_a_plan_is_read_and_unknown_fields_are_ignored() -> None:
    plan = decode_plan(b'{"servers": [{"name": "web-1", "ip": "10.77.0.10", "more": 1}], "later": true}')
    assert (plan.udp_pps, plan.servers[0].start) == (250, None)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"{", "plan"),
        (b'{"udp_pps": 0}', "udp_pps"),
        (b'{"servers": [{"name": "../etc", "ip": "10.0.0.1"}]}', "servers.name"),
    ],
)
def test_a_bad_plan_names_its_field(data: bytes, field: str) -> None:
    with pytest.raises(Refused) as refused:
        decode_plan(data)
    assert refused.value.field == field


def test_what_was_missed_is_not_made_up_for() -> None:
    every = Every(0.1)
    due = [t / 100 for t in range(100, 200) if every.due(t / 100)]
    assert 9 <= len(due) <= 11
    assert every.due(10.0)
    assert not every.due(10.04)
