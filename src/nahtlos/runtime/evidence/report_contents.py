"""What a report says, and what it is made from beside the probe's records. Values, no more."""

from nahtlos.model.values import Value
from nahtlos.runtime.controllers.cloud import CampaignView, HostView, ServerView
from nahtlos.runtime.evidence.foretold import Predictions
from nahtlos.runtime.evidence.machine import Machine
from nahtlos.runtime.evidence.promises import Promise
from nahtlos.runtime.evidence.records import DiskCheck

SCHEMA = 1


class Evidence(Value, frozen=True, kw_only=True):
    """What a report needs beside the probe's records. `made_at` is the wall clock of its making."""

    campaign: CampaignView
    servers_before: tuple[ServerView, ...]
    """As the campaign began."""
    servers_after: tuple[ServerView, ...]
    hosts: tuple[HostView, ...]
    disks: tuple[DiskCheck, ...]
    machine: Machine
    made_at: float
    created: tuple[str, ...] | None = None
    """Servers created while it ran. None: this run did not set out to create any, and promises nothing
    of that kind."""
    booted_seconds: float | None = None
    """How long the slowest of those that were created together before the campaign took, as of `created`."""


class CampaignFigures(Value, frozen=True, kw_only=True, rename={"from_release": "from", "to_release": "to"}):
    id: str
    from_release: str
    to_release: str
    hosts: int
    hosts_upgraded: int
    state: str
    seconds: float
    began_at: float
    ended_at: float


class ServerFigures(Value, frozen=True, kw_only=True):
    name: str
    moves: int
    reboots: int
    packets_sent: int
    packets_lost: int
    packets_duplicated: int
    longest_gap_ms: float | None
    """None: no two datagrams came back."""
    gaps_ms: tuple[float, ...]
    """One per move, as long as it was watched."""
    tcp_sessions_broken: int
    http_failures: int
    memory_verified: bool
    """Pages were verified after the first look, and none was wrong."""
    disk_writes_acknowledged: int
    disk_writes_lost: int
    """Lost or wrong in the volume itself."""
    vmm_before: str
    vmm_after: str

    ip: str
    created_during: bool
    boot_seen: bool
    packets_reordered: int
    longest_send_gap_ms: float
    tcp_lines: int
    tcp_longest_stall_ms: float
    http_requests: int
    http_slowest_ms: float
    heartbeats_lost: int
    guest_longest_gap_ms: float
    memory_pages_verified: int
    memory_errors: int
    disk_checked: bool


class Totals(Value, frozen=True, kw_only=True):
    servers: int
    servers_at_begin: int
    moves: int
    moves_undone: int
    reboots: int
    packets_sent: int
    packets_lost: int
    packets_duplicated: int
    longest_gap_ms: float | None
    gap_ms_p50: float | None
    gap_ms_p99: float | None
    gap_ms_max: float | None
    tcp_lines: int
    tcp_sessions_broken: int
    http_requests: int
    http_failures: int
    memory_verified: bool
    memory_pages_verified: int
    memory_errors: int
    disk_writes_acknowledged: int
    disk_writes_lost: int
    moves_per_server: float | None
    api_requests: int
    api_errors: int
    api_slowest_ms: float
    capacity_floor: float | None
    """None: nothing was promised, so nothing was put to the test."""


class MoveFigures(Value, frozen=True, kw_only=True, rename={"source": "from", "destination": "to"}):
    id: str
    server: str
    source: str
    destination: str
    state: str
    reason: str
    begin: float | None
    """Wall-clock seconds; None if the hosts told no times."""
    switch: float | None
    end: float | None
    gap_ms: float | None
    gap_begin: float | None
    """Wall-clock seconds of the last datagram before the gap."""
    packets_lost: int
    """Sent while it could be felt, and never back."""
    vmm_before: str
    vmm_after: str
    arrivals_ms: tuple[float, ...] = ()
    """Echoes around the gap, in milliseconds from its beginning."""


class Phase(Value, frozen=True, kw_only=True):
    phase: str
    begin: float
    end: float


class HostFigures(Value, frozen=True, kw_only=True):
    host: str
    release_before: str
    release_after: str
    upgraded_at: float | None
    phases: tuple[Phase, ...]


class Placement(Value, frozen=True, kw_only=True):
    """Where a server was."""

    server: str
    host: str
    begin: float
    end: float


class CreatedServer(Value, frozen=True, kw_only=True):
    server: str
    during: bool
    """It was asked for while the campaign ran."""
    seconds: float | None
    """From asking for it to its first answer on every service."""
    booted_before_seconds: float | None = None
    """What the slowest of the servers created together before the campaign took, on the same machine."""


class ProbeFigures(Value, frozen=True, kw_only=True):
    packets_per_second: int
    scheduling: str
    cpu_share: float
    complete: bool
    """It ended in order, after its drain."""


class Report(Value, frozen=True, kw_only=True):
    schema: int
    made_at: float
    kept: bool
    """Every promise."""
    campaign: CampaignFigures
    servers: tuple[ServerFigures, ...]
    totals: Totals
    promises: tuple[Promise, ...]
    moves: tuple[MoveFigures, ...]
    hosts: tuple[HostFigures, ...]
    placements: tuple[Placement, ...]
    created: tuple[CreatedServer, ...] | None
    machine: Machine
    probe: ProbeFigures | None
    predictions: Predictions = Predictions()
    """Also of servers that were replaced in place, which are no moves."""
