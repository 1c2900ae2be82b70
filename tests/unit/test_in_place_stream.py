"""What is sent of a server that is replaced in place: told by QEMU's events, asked for if none comes."""

import asyncio

import pytest

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.hypervisor import migration
from nahtlos.physical.hypervisor.qmp import ANSWER_WITHIN, Answer, Arguments

KNOWN = ("events", "x-ignore-shared", "switchover-ack")


class Source:
    """A monitor that says `words` one after the other, as events or only when asked."""

    def __init__(self, *words: str, events: bool = True) -> None:
        self._words = list(words)
        self._events = events
        self.stream_word = "completed"  # of an earlier stream
        self.said: list[str] = []

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = ANSWER_WITHIN
    ) -> Answer:
        self.said.append(command)
        if command == "query-migrate-capabilities":
            return {"value": [{"capability": name, "state": False} for name in KNOWN]}
        if command == "query-migrate":
            if not self._events and len(self._words) > 1:
                self._words.pop(0)
            return {"status": self._words[0], "error-desc": "no such file"}
        return {}

    async def event_within(self, seconds: float) -> None:
        await asyncio.sleep(0)
        if self._events:
            self.stream_word = self._words.pop(0) if len(self._words) > 1 else self._words[0]


async def test_nothing_is_asked_while_the_guest_stands_still() -> None:
    source = Source("setup", "active", "completed")
    await migration.ready_whole(source)
    source.said.clear()
    await migration.send_whole(source, "unix:/run/x")
    assert source.said == ["migrate"]


async def test_an_event_that_was_missed_is_asked_for() -> None:
    source = Source("setup", "active", "completed", events=False)
    await migration.send_whole(source, "unix:/run/x")
    assert source.stream_word == "completed"
    assert "query-migrate" in source.said


@pytest.mark.parametrize("events", [True, False])
async def test_what_failed_is_refused(events: bool) -> None:
    with pytest.raises(Refused, match="no such file"):
        await migration.send_whole(Source("setup", "failed", events=events), "unix:/run/x")


async def test_what_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "STARTED_WITHIN", -1.0)
    monkeypatch.setattr(migration, "CANCELLED_WITHIN", -1.0)
    source = Source("active")
    with pytest.raises(Unavailable):
        await migration.send_whole(source, "unix:/run/x")
    assert "migrate_cancel" in source.said


async def test_what_is_to_be_sent_is_said_beforehand() -> None:
    source = Source("none")
    await migration.ready_whole(source)
    assert source.said == [
        "query-migrate-capabilities",
        "migrate-set-capabilities",
        "migrate-set-parameters",
    ]
