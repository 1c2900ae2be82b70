"""Campaigns that never were: records as probes and agents would have written them, by seed.

A perfect campaign first; each `Damage` spoils one thing, so that a test can see that it is told.
"""

import functools
import random
from array import array

import msgspec

from nahtlos.model.blueprint import (
    Campaign,
    CampaignState,
    CapacityReport,
    HostIntent,
    HostPhase,
    OperationRecord,
)
from nahtlos.model.ids import CampaignId, HostId, OperationId, ReleaseId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import HostRole, Size
from nahtlos.model.prediction import Estimate, Means
from nahtlos.runtime.controllers.cloud import CampaignView, HostView, ServerView
from nahtlos.runtime.evidence.machine import Machine
from nahtlos.runtime.evidence.records import (
    ApiProbe,
    Arrivals,
    DiskCheck,
    ProbeRecords,
    ProbeSummary,
    ServerProbe,
)
from nahtlos.runtime.evidence.report_contents import Evidence

OLD = ReleaseId("qemu-10.0.2-7c41d90b2e55")
NEW = ReleaseId("qemu-11.1.3-0f3ab1c2d3e4")
BEGAN = 1_790_000_000.0
SECONDS = 171.0
PPS = 250
LATE = "late-1"

MOVES = (
    ("web-1", 1, 3, 9.0),
    ("web-2", 1, 3, 19.0),
    ("db-1", 2, 1, 58.0),
    ("db-2", 2, 1, 69.0),
    ("api-1", 3, 2, 104.0),
    ("api-2", 3, 2, 114.0),
    ("web-1", 3, 2, 124.0),
    ("web-2", 3, 2, 134.0),
)
SERVERS = ("api-1", "api-2", "db-1", "db-2", "web-1", "web-2")
UPGRADES = ((1, 31.0, 37.0), (2, 80.0, 86.5), (3, 146.0, 152.0))


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong. Nothing, as it stands."""

    lost: dict[str, int] = {}
    duplicated: dict[str, int] = {}
    silent_from: dict[str, float] = {}
    reboots: dict[str, int] = {}
    tcp_broken: dict[str, int] = {}
    http_failures: dict[str, int] = {}
    writes_lost: dict[str, int] = {}
    memory_errors: dict[str, int] = {}
    api_errors: int = 0
    floor: float = 1.0
    undone: int = 0
    state: CampaignState = CampaignState.DONE
    upgraded: int = 3
    late_seconds: float | None = 8.4


NO_DAMAGE = Damage()
WOUNDED = Damage(
    lost={"web-1": 37, "db-2": 4},
    tcp_broken={"web-1": 1},
    http_failures={"web-1": 6},
    writes_lost={"db-2": 2},
    undone=1,
    floor=0.83,
    api_errors=3,
)


def host(number: int) -> HostId:
    return HostId(f"host-{number}")


def evidence(damage: Damage = NO_DAMAGE, *, created: tuple[str, ...] | None = (LATE,)) -> Evidence:
    return Evidence(
        campaign=_campaign(damage),
        servers_before=tuple(_view(s, OLD) for s in SERVERS),
        servers_after=tuple(_view(s, NEW) for s in (*SERVERS, LATE)),
        hosts=tuple(_host(n) for n in (1, 2, 3)),
        disks=tuple(_disk(s, damage) for s in (*SERVERS, LATE)),
        machine=Machine(
            cpu="AMD EPYC 7763 64-Core Processor",
            cores=2,
            memory_mib=7_934,
            kernel="6.1.0-28-amd64",
            system="Debian GNU/Linux 12 (bookworm)",
            accelerator="tcg",
            accelerator_reason="a probe under KVM did not boot",
            nahtlos="0.1.0",
            python="3.11.2",
        ),
        made_at=BEGAN + 200,
        created=created,
    )


def probe(damage: Damage = NO_DAMAGE, *, seed: int = 1, seconds: float = SECONDS) -> ProbeRecords:
    arrivals = {
        s: _arrivals(
            s,
            seed,
            seconds,
            damage.lost.get(s, 0),
            damage.duplicated.get(s, 0),
            damage.silent_from.get(s, 1e12),
        )
        for s in (*SERVERS, LATE)
    }
    return ProbeRecords(
        ProbeSummary(
            state="final",
            started_at=BEGAN - 5,
            updated_at=BEGAN + seconds + 3,
            packets_per_second=PPS,
            scheduling="real-time",
            cpu_share=0.071,
            servers=tuple(_probed(s, arrivals[s], damage) for s in arrivals),
            api=ApiProbe(
                requests=1_712, errors=damage.api_errors, slowest_ms=212.4,
                error="/v1/status: ECONNREFUSED" if damage.api_errors else "",
            ),
        ),
        arrivals,
    )  # fmt: skip


def _campaign(damage: Damage) -> CampaignView:
    return CampaignView(
        campaign=Campaign(
            id=CampaignId("campaign-1"),
            to_release=NEW,
            from_releases=(OLD,),
            hosts=(host(1), host(2), host(3)),
            state=damage.state,
            created_at=BEGAN,
            ended_at=BEGAN + SECONDS,
        ),
        hosts_total=3,
        hosts_upgraded=damage.upgraded,
        moves_done=len(MOVES),
        moves_failed=damage.undone,
        moves_total_forecast=8,
        running=(),
        waiting=(),
        capacity=CapacityReport(
            promised=Size(vcpus=7, memory_mib=1792), in_service=Size(vcpus=12, memory_mib=3072), share=1.0
        ),
        capacity_floor=damage.floor,
        operations=_operations(damage),
    )


def _operations(damage: Damage) -> tuple[OperationRecord, ...]:
    moves = [_move(i, *m) for i, m in enumerate(MOVES)]
    undone = [
        msgspec.structs.replace(
            _move(90 + i, "db-1", 2, 3, 47.0), state="undone", reason="the destination's VMM ended"
        )
        for i in range(damage.undone)
    ]
    verifies = [
        OperationRecord(
            id=OperationId(f"op-v{n}"),
            kind="verify",
            subject=host(n),
            state="done",
            times={"begin": BEGAN + begin, "done": BEGAN + end},
            release_before=OLD,
            release_after=NEW,
        )
        for n, begin, end in UPGRADES[: damage.upgraded]
    ]
    return tuple(sorted((*moves, *undone, *verifies), key=lambda o: max(o.times.values())))


def _move(number: int, server: str, source: int, destination: int, at: float) -> OperationRecord:
    steps = {"begin": 0.0, "prepare": 0.2, "precopy": 1.1, "switch": 6.4, "stopped": 6.42}
    steps |= {"running": 6.43, "committed": 6.44, "done": 7.1}
    return OperationRecord(
        id=OperationId(f"op-{number}"),
        kind="move",
        subject=server,
        state="done",
        source=host(source),
        destination=host(destination),
        reason=f"host-{source} is emptied",
        times={step: BEGAN + at + offset for step, offset in steps.items()},
        campaign=CampaignId("campaign-1"),
        release_before=OLD,
        release_after=NEW if destination != 3 else OLD,
        predicted=Estimate(
            means=Means.PRE_COPY,
            blackout_ms=64.0 + number,
            blackout_ms_max=110.0,
            pause_ms=21.0 + number,
            brownout_seconds=4.9,
            seconds=6.2,
        ),
    )


def _view(server: str, release: ReleaseId) -> ServerView:
    start = {"web-1": 1, "web-2": 1, "db-1": 2, "db-2": 2, "api-1": 3, "api-2": 3, LATE: 1}
    end = start | {m[0]: m[2] for m in MOVES}
    late = server == LATE
    return ServerView(
        id=ServerId(server),
        host=host((end if release == NEW else start)[server]),
        epoch=1,
        state=RunState.RUNNING,
        release=release,
        size=Size(vcpus=1, memory_mib=256),
        ip=_ip(server),
        mac="52:54:00:4d:00:10",
        volume_host=host(1),
        moving_to=None,
        waits_for="",
        created_at=BEGAN + 88 if late else BEGAN - 60,
    )


def _ip(server: str) -> str:
    return f"10.77.0.{10 + (*SERVERS, LATE).index(server)}"


def _host(number: int) -> HostView:
    return HostView(
        id=host(number),
        role=HostRole.COMPUTE,
        address=f"10.99.0.{10 + number}",
        intent=HostIntent.ACTIVE,
        phase=HostPhase.SERVING,
        connected=True,
        release=NEW,
        verified_release=NEW,
        accelerator=None,
        capacity=Size(vcpus=4, memory_mib=1024),
        used=Size(vcpus=2, memory_mib=512),
        servers=(),
        generation=12,
        target_generation=12,
        seen_at=BEGAN + SECONDS,
    )


def _disk(server: str, damage: Damage) -> DiskCheck:
    acknowledged = 3_400 + 17 * len(server)
    lost = damage.writes_lost.get(server, 0)
    return DiskCheck(server=server, acknowledged=acknowledged, found=acknowledged - lost, lost=lost, wrong=0)


def _gap(chance: random.Random) -> float:
    return min(0.112, max(0.038, chance.lognormvariate(-2.9, 0.22)))


@functools.cache
def _arrivals(server: str, seed: int, seconds: float, losing: int, doubling: int, silent: float) -> Arrivals:
    """A datagram that comes while its server is away waits for it: it is late, not lost."""
    chance = random.Random(f"{server} {seed}")
    begin = 97.0 if server == LATE else -4.0
    gaps = [(at + 6.41, at + 6.41 + _gap(chance)) for name, _, _, at in MOVES if name == server]
    numbers = range(int((seconds - begin) * PPS))
    lost = set(_those_lost(losing, numbers, gaps, begin))
    sent: array[int] = array("q")
    came: list[tuple[int, int]] = []
    for number in numbers:
        at = begin + number / PPS
        sent.append(int((BEGAN + at) * 1e9))
        if number in lost or at > silent:
            continue
        back = at + chance.uniform(0.0012, 0.0031)
        held = next((end for start, end in gaps if start <= at < end), None)
        came.append((int((BEGAN + max(back, (held or 0) + 0.0005)) * 1e9), number))
    doubled = chance.sample(came, doubling)
    came.sort(key=lambda c: c[0])
    came += [(at + 1_000, number) for at, number in doubled]
    return Arrivals(sent, array("q", (c[0] for c in came)), array("I", (c[1] for c in came)))


def _those_lost(amount: int, numbers: range, gaps: list[tuple[float, float]], begin: float) -> list[int]:
    start = int((gaps[-1][0] - begin) * PPS) if gaps else len(numbers) // 2
    return list(range(start, start + amount))


def _probed(server: str, arrivals: Arrivals, damage: Damage) -> ServerProbe:
    late = server == LATE
    answered = BEGAN + 88 + damage.late_seconds if damage.late_seconds is not None else None
    return ServerProbe(
        name=server,
        ip=_ip(server),
        asked_at=BEGAN + 88 if late else BEGAN - 60,
        answered_at=answered if late else BEGAN - 4,
        ended_at=BEGAN + SECONDS + 3,
        packets_sent=len(arrivals.sent_at),
        packets_received=len(set(arrivals.numbers)),
        packets_lost=len(arrivals.sent_at) - len(set(arrivals.numbers)),
        longest_gap_ms=61.3,
        longest_send_gap_ms=6.1,
        tcp_lines=3_412,
        tcp_sessions=1 + damage.tcp_broken.get(server, 0),
        tcp_sessions_broken=damage.tcp_broken.get(server, 0),
        tcp_longest_stall_ms=88.2,
        http_requests=1_706,
        http_failures=damage.http_failures.get(server, 0),
        http_slowest_ms=131.0,
        heartbeats=17_050,
        guest_longest_gap_ms=64.0,
        reboots=damage.reboots.get(server, 0),
        boots=("0d5ab6f4-6f3e-4a17-9a3c-6d1f4b0f1f11",),
        disk_acknowledged=3_400 + 17 * len(server),
        memory_pages_verified=812_344,
        memory_errors=damage.memory_errors.get(server, 0),
        status_samples=170,
    )
