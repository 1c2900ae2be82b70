"""Capabilities stay on a QEMU process from one migration to the next: each sets all it knows beforehand."""

import pytest

from nahtlos.model.errors import Refused
from nahtlos.physical.hypervisor import migration
from nahtlos.physical.hypervisor.qmp import Answer, Arguments, Denied

KNOWN = ("events", "return-path", "switchover-ack", "auto-converge", "x-ignore-shared", "postcopy-ram")


class Process:
    """What a QEMU keeps of what it is told."""

    def __init__(self, known: tuple[str, ...] = KNOWN) -> None:
        self.has = dict.fromkeys(known, False)
        self.has["x-ignore-shared"] = "x-ignore-shared" in known  # left over from a replacement
        self.said: list[str] = []

    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = 5.0
    ) -> Answer:
        self.said.append(command)
        if command == "query-migrate-capabilities":
            return {"value": [{"capability": name, "state": on} for name, on in self.has.items()]}
        assert command == "migrate-set-capabilities" and arguments is not None
        for one in arguments["capabilities"]:  # type: ignore[attr-defined]
            self.has[one["capability"]] = one["state"]
        return {}

    @property
    def on(self) -> set[str]:
        return {name for name, on in self.has.items() if on}


@pytest.mark.parametrize(
    "wanted",
    [
        migration.SOURCE,
        migration.DESTINATION,
        migration.SOURCE | migration.SLOWING,
        migration.DESTINATION | migration.IN_PLACE,
    ],
)
async def test_exactly_what_is_wanted_is_set_whatever_was_before(wanted: frozenset[str]) -> None:
    process = Process()
    await migration.set_capabilities(process, wanted)
    assert process.on == wanted
    await migration.set_capabilities(process, migration.SOURCE)
    assert process.on == migration.SOURCE


async def test_the_source_alone_withholds_its_switchover() -> None:
    assert "switchover-ack" in migration.SOURCE
    assert "switchover-ack" not in migration.DESTINATION


async def test_a_release_without_it_is_refused_and_nothing_is_set() -> None:
    process = Process(known=("events", "return-path", "x-ignore-shared"))
    with pytest.raises(Refused, match="switchover-ack"):
        await migration.set_capabilities(process, migration.SOURCE)
    assert process.said == ["query-migrate-capabilities"]


@pytest.mark.parametrize(
    ("way", "capabilities", "said"),
    [
        (migration.Way(), frozenset[str](), []),
        (migration.Way(channels=4), migration.SEVERAL, [(4, "none")]),
        (migration.Way(compressed=True), migration.SEVERAL, [(1, "zstd")]),
        (migration.Way(channels=2, compressed=True), migration.SEVERAL, [(2, "zstd")]),
        (migration.Way(post_copy=True, channels=4, compressed=True), migration.POST_COPY, []),
    ],
)
async def test_both_sides_are_told_how_memory_is_sent(
    way: migration.Way, capabilities: frozenset[str], said: list[tuple[int, str]]
) -> None:
    told: list[tuple[object, object]] = []

    class Told:
        async def execute(
            self, command: str, arguments: Arguments | None = None, *, within: float = 5.0
        ) -> Answer:
            assert command == "migrate-set-parameters" and arguments is not None
            told.append((arguments["multifd-channels"], arguments["multifd-compression"]))
            return {}

    await migration.set_channels(Told(), way)
    assert (way.capabilities, told) == (capabilities, said)


async def test_a_qemu_that_cannot_compress_is_refused_with_what_to_do() -> None:
    class Unable:
        async def execute(
            self, command: str, arguments: Arguments | None = None, *, within: float = 5.0
        ) -> Answer:
            raise Denied("Parameter 'multifd-compression' does not accept value 'zstd'")

    with pytest.raises(Refused, match="does not compress") as refused:
        await migration.set_channels(Unable(), migration.Way(compressed=True))
    assert refused.value.field == "move_compression"
    assert "--compress-moves never" in (refused.value.remedy or "")


def test_what_was_sent_is_told_before_it_was_compressed() -> None:
    ram = {"total": 9 << 20, "remaining": 1 << 20, "transferred": 1 << 20, "normal-bytes": 6 << 20}
    assert migration.progress_of({"status": "active", "ram": ram}).transferred == 6 << 20
    plain = {**ram, "transferred": 7 << 20}
    assert migration.progress_of({"status": "active", "ram": plain}).transferred == 7 << 20
