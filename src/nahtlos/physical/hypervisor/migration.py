"""The order of QMP commands of a move. Knows one monitor at a time and nothing of hosts or owners.

What keeps the source from switching over by itself is `switchover-ack` on the source alone: the
destination never acknowledges, so the source goes on copying until it is stopped (QMP `stop`), when the
acknowledgement is no longer asked for and the migration completes at once.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.hypervisor.qmp import Answer, Arguments, Denied
from nahtlos.physical.ports import MigrationPhase, MigrationProgress

DESTINATION = frozenset({"events", "return-path"})
SOURCE = DESTINATION | {"switchover-ack"}
SLOWING = frozenset({"auto-converge"})
"""On the source: less and less of its vCPUs' time for a guest that writes faster than can be sent. It ends
with the stream, whichever way."""
READY: Arguments = {"cpu-throttle-initial": 1, "cpu-throttle-increment": 1, "max-cpu-throttle": 1}
THROTTLE: Arguments = {"cpu-throttle-initial": 20, "cpu-throttle-increment": 20, "max-cpu-throttle": 80}
"""Per cent. A capability cannot be given to a stream that flows, its figures can: a guest that may be slowed
down begins with a throttle nobody notices. Without effect where nothing may be."""
POST_COPY = frozenset({"postcopy-ram"})
"""On both sides, besides the above: of a source that is held by switchover-ack, `migrate-start-postcopy`
changes nothing until it is stopped."""
SEVERAL = frozenset({"multifd"})
"""Likewise, with as many channels on both; not together with the above."""
COMPRESSION = "zstd"
IN_PLACE = frozenset({"x-ignore-shared"})
"""On both sides, besides the above: memory both can see is not sent."""
HELD = "switchover-ack"
"""What keeps a source from switching over by itself; not known before 8.1."""
NO_TLS: Arguments = {"tls-creds": ""}
UNANNOUNCED: Arguments = {"announce-rounds": 0}
"""Of a guest that stays where it is nobody has to be told where it is; it would be made to say so itself, by
code its new process has to translate before it answers anybody."""
UNLIMITED = 4 << 30
"""Bytes per second."""
STARTED_WITHIN = 10.0
CANCELLED_WITHIN = 10.0
LOOK_AGAIN = 0.05
"""An event that does not come by then is asked for: the connection may be a new one."""
PLENTY = 1_000_000
"""Bytes per second QEMU may believe it has at the switch; it does not decide when to switch."""


class Monitor(Protocol):
    async def execute(
        self, command: str, arguments: Arguments | None = None, *, within: float = ...
    ) -> Answer: ...


class Watched(Monitor, Protocol):
    """Whose events are heard."""

    stream_word: str
    """What QEMU last said of its outgoing stream by itself."""

    async def event_within(self, seconds: float) -> None: ...


_PHASES = {
    "setup": MigrationPhase.ACTIVE,
    "active": MigrationPhase.ACTIVE,
    "device": MigrationPhase.ACTIVE,
    "pre-switchover": MigrationPhase.ACTIVE,
    "wait-unplug": MigrationPhase.ACTIVE,
    # Not free for another one yet:
    "cancelling": MigrationPhase.ACTIVE,
    "failing": MigrationPhase.ACTIVE,
    # Its guest is never to run here again:
    "postcopy-device": MigrationPhase.POST_COPY,
    "postcopy-active": MigrationPhase.POST_COPY,
    "postcopy-recover-setup": MigrationPhase.POST_COPY,
    "postcopy-recover": MigrationPhase.POST_COPY,
    "postcopy-paused": MigrationPhase.CUT,
    "completed": MigrationPhase.COMPLETED,
    "failed": MigrationPhase.FAILED,
    "cancelled": MigrationPhase.CANCELLED,
}

_ENDED = ("completed", "failed", "cancelled")


def progress_of(answer: Mapping[str, object]) -> MigrationProgress:
    """`query-migrate` as seen from a source. A VMM that once received a server and never sent one also
    answers `completed`, but without figures: for a source nothing has happened yet."""
    status = str(answer.get("status", ""))
    phase = _PHASES.get(status, MigrationPhase.NONE)
    ram = cast("Mapping[str, int]", answer.get("ram", {}))
    if phase is MigrationPhase.COMPLETED and not ram:
        phase = MigrationPhase.NONE
    return MigrationProgress(
        phase=phase,
        remaining=ram.get("remaining", 0),
        total=ram.get("total", 0),
        transferred=max(ram.get("transferred", 0), ram.get("normal-bytes", 0)),
        passes=ram.get("dirty-sync-count", 0),
        error=str(answer.get("error-desc", "")),
    )


async def progress(monitor: Monitor) -> MigrationProgress:
    return progress_of(await monitor.execute("query-migrate"))


async def capabilities(monitor: Monitor) -> list[str]:
    answer = await monitor.execute("query-migrate-capabilities")
    return [str(c["capability"]) for c in cast("list[dict[str, object]]", answer["value"])]


async def set_capabilities(monitor: Monitor, wanted: frozenset[str]) -> None:
    """Exactly these: capabilities stay on a process from one migration to the next."""
    known = await capabilities(monitor)
    lacking = wanted.difference(known)
    if lacking:
        raise Refused(f"this QEMU has no {', '.join(sorted(lacking))}", field="release")
    states = [{"capability": name, "state": name in wanted} for name in known]
    await monitor.execute("migrate-set-capabilities", {"capabilities": states})


@dataclass(frozen=True, kw_only=True)
class Way:
    """How memory is sent, besides the usual: the same on both sides."""

    post_copy: bool = False
    """By one channel, and not compressed."""
    channels: int = 1
    compressed: bool = False

    @property
    def several(self) -> bool:
        """By channels that carry memory alone: only these compress."""
        return not self.post_copy and (self.channels > 1 or self.compressed)

    @property
    def capabilities(self) -> frozenset[str]:
        if self.post_copy:
            return POST_COPY
        return SEVERAL if self.several else frozenset()


async def set_channels(monitor: Monitor, way: Way) -> None:
    """On both sides, after the capabilities. A process that received compressed would send so, too."""
    if not way.several:
        return
    method = COMPRESSION if way.compressed else "none"
    channels: Arguments = {"multifd-channels": way.channels, "multifd-compression": method}
    try:
        await monitor.execute("migrate-set-parameters", channels)
    except Denied as denied:
        if not way.compressed:
            raise
        raise Refused(
            f"this QEMU does not compress: {denied}",
            field="move_compression",
            remedy="nahtlos network underlay set --compress-moves never",
        ) from denied


async def set_source_parameters(monitor: Monitor, bandwidth: int, tls: Arguments) -> None:
    await monitor.execute(
        "migrate-set-parameters",
        {
            "max-bandwidth": bandwidth or UNLIMITED,
            "max-postcopy-bandwidth": bandwidth or UNLIMITED,
            "downtime-limit": 1,
            "avail-switchover-bandwidth": PLENTY,
            **READY,
            **tls,
        },
    )


async def pace(monitor: Monitor, bandwidth: int) -> None:
    wanted = bandwidth or UNLIMITED
    await monitor.execute(
        "migrate-set-parameters", {"max-bandwidth": wanted, "max-postcopy-bandwidth": wanted}
    )


async def slow_down(monitor: Monitor) -> None:
    await monitor.execute("migrate-set-parameters", THROTTLE)


async def ready_whole(monitor: Monitor) -> None:
    """What `send_whole` is to send, said while the guest still runs: nobody waits for it then."""
    await set_capabilities(monitor, frozenset({"events"}) | IN_PLACE)
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED, **NO_TLS})


async def expect_whole(monitor: Monitor) -> None:
    """The other end of `send_whole`, before it listens."""
    await set_capabilities(monitor, DESTINATION | IN_PLACE)
    await monitor.execute("migrate-set-parameters", UNANNOUNCED)


async def send_whole(source: Watched, uri: str) -> None:
    """Of a guest that stands still, in place: everything but the memory. Returns when it has left, told by
    QEMU's own event; Refused if it failed at once."""
    source.stream_word = ""
    await source.execute("migrate", {"uri": uri})
    until = time.monotonic() + STARTED_WITHIN
    while source.stream_word not in _ENDED:
        said = source.stream_word
        await source.event_within(LOOK_AGAIN)
        if source.stream_word == said:
            source.stream_word = str((await source.execute("query-migrate")).get("status", ""))
        if time.monotonic() > until:
            await cancel(source)
            raise Unavailable(f"not everything was sent to {uri} within {STARTED_WITHIN:g} s")
    if source.stream_word != "completed":
        why = (await progress(source)).error or source.stream_word
        raise Refused(f"the stream failed at once: {why}", field="uri")


async def begin(monitor: Monitor, uri: str) -> None:
    """Start sending and see it flow: missing credentials, a refused connection or a wrong name show only
    after `migrate` has returned."""
    await monitor.execute("migrate", {"uri": uri})
    until = time.monotonic() + STARTED_WITHIN
    while True:
        found = await progress(monitor)
        if found.phase is MigrationPhase.ACTIVE and found.transferred > 0:
            return
        if found.phase in (MigrationPhase.FAILED, MigrationPhase.CANCELLED):
            raise Refused(f"the stream failed at once: {found.error or found.phase}", field="uri")
        if found.phase is MigrationPhase.COMPLETED:
            return  # the guest was stopped already
        if time.monotonic() > until:
            await cancel(monitor)
            raise Unavailable(f"nothing was sent to {uri} within {STARTED_WITHIN:g} s")
        await asyncio.sleep(0.005)


async def cancel(monitor: Monitor) -> None:
    """Until the source is free for another migration. If everything was sent before it could be
    cancelled that is no error here: `VmmStatus.sent` says so, and the owner's record decides."""
    if (await progress(monitor)).phase is not MigrationPhase.ACTIVE:
        return
    await monitor.execute("migrate_cancel")
    until = time.monotonic() + CANCELLED_WITHIN
    while (await progress(monitor)).phase is MigrationPhase.ACTIVE:
        if time.monotonic() > until:
            raise Unavailable(f"the migration is still not cancelled after {CANCELLED_WITHIN:g} s")
        await asyncio.sleep(0.005)
