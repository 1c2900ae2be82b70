"""A lab under load into which faults are put, and eyes on it that are not its own.

`Monitors` listens to the second monitor of every VMM of the lab: QEMU's own STOP and RESUME, with QEMU's own
times, say when which copy of a server ran. The moments of a move are taken from there too, so that a fault
hits the step it is meant for and not a guess at it. `FaultLab` moves a server, puts a fault in, and checks
what has to hold whatever happened. Every fault is put in from outside, by signals to processes, by the
cables of the switch; nothing in the system knows of it.
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from nahtlos.lab.datacentre import PEER_PORT, Datacentre
from nahtlos.lab.disk_check import check_volume
from nahtlos.lab.outside import GuestStatus, Outside
from nahtlos.lab.paths import LAB_VARIABLE
from nahtlos.lab.topology import set_link, stall
from nahtlos.model.blueprint import HostPhase
from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.model.nouns import HostRole, Release
from nahtlos.ops.client import OperatorClient
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import launch_supervisor
from nahtlos.runtime.controllers.cloud import HostView, ServerRequest, ServerView
from nahtlos.runtime.evidence.records import lost_at, read_probe

MOVER, BYSTANDER = ServerId("vm-1"), ServerId("vm-2")
MEMORY_MIB, MEMORY_MB_PER_S, DISK_PER_S = 32, 8.0, 20.0
STALL_SECONDS = 3.0
SCAN_SECONDS = 0.01
STEP_SECONDS = 60.0
FROZEN_SECONDS = 4.3
"""A source asks a destination that long in vain before it draws conclusions (it waits 5 s)."""
QUIET_SECONDS = 0.4
TRIES = 10
"""A switch takes some milliseconds: on a busy machine it is often over before it is seen."""
SETTLE_SECONDS = 90.0
BOOT_SECONDS = 90.0


class Step(StrEnum):
    PREPARE = "prepare"
    PRECOPY = "precopy"
    SWITCH = "switch"
    STOPPED = "stopped"
    COMMITTED = "committed"


class Fault(StrEnum):
    DESTINATION_VMM = "destination-vmm-killed"
    SOURCE_AGENT = "source-agent-killed"
    DESTINATION_AGENT = "destination-agent-killed"
    ORCHESTRATOR = "orchestrator-killed"
    LINK_STALLED = "link-stalled"
    LINK_CUT = "link-cut"
    SOURCE_SUPERVISOR = "source-supervisor-killed"
    DESTINATION_SUPERVISOR = "destination-supervisor-killed"


SENDING = ("active", "device", "completed")
LINKS = frozenset({Fault.LINK_STALLED, Fault.LINK_CUT})


class Missed(Exception):
    """The move was past the step before the fault could be put in."""


@asynccontextmanager
async def missed_after(seconds: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Missed from error


def unread_bytes(namespace: str, port: int) -> int:
    """That have come to connections of `port` and that nobody has read."""
    command = ("ip", "netns", "exec", namespace, "ss", "-Htn", "state", "established", f"sport = :{port}")
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return sum(int(line.split()[0]) for line in found.splitlines())


def deafen(namespace: str, *, on: bool) -> None:
    """Whether what others say to the agent there comes to it. What it says itself arrives."""
    text = "table inet deaf\ndelete table inet deaf\n"
    if on:
        text += (
            "table inet deaf {\n  chain input {\n    type filter hook input priority 0; policy accept;\n"
            f"    tcp dport {PEER_PORT} tcp flags & psh == psh drop\n  }}\n}}\n"
        )
    command = ("ip", "netns", "exec", namespace, "nft", "-f", "-")
    subprocess.run(command, input=text, text=True, check=True, capture_output=True, timeout=10)


async def until(what: str, holds: Callable[[], Awaitable[bool]], seconds: float, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    last: Error | None = None
    while time.monotonic() < deadline:
        try:
            if await holds():
                return
        except Unavailable as error:
            last = error
        await asyncio.sleep(every)
    raise AssertionError(f"waited {seconds:g} s for {what}" + (f"; last: {last}" if last else ""))


# --- which copy of a server runs when ----------------------------------------------------------------


@dataclass
class Spell:
    """A time in which one VMM ran its guest. Wall clock, seconds."""

    place: str
    began: float
    ended: float | None = None

    def __str__(self) -> str:
        end = f"{self.ended:.3f}" if self.ended else "now"
        return f"{self.place} {self.began:.3f}..{end}"


class Monitor:
    """One VMM, through its second monitor."""

    def __init__(self, host: str, server: str, epoch: int) -> None:
        self.host, self.server, self.epoch = host, server, epoch
        self.spells: list[Spell] = []
        self.alive = True
        self.migration = ""
        """The last status of its stream."""
        self.seen_at = time.time()
        self.gone_at: float | None = None
        """When its process had ended. Wall clock, seconds."""

    @property
    def runs(self) -> bool:
        return bool(self.spells) and self.spells[-1].ended is None

    def begins(self, at: float) -> None:
        if not self.runs:
            self.spells.append(Spell(f"{self.server}.{self.epoch}@{self.host}", at))

    def ends(self, at: float) -> None:
        if self.runs:
            self.spells[-1].ended = at


class Monitors:
    """All VMMs of a lab there are and have been."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._listening: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.all: list[Monitor] = []

    async def watch(self) -> None:
        """Until cancelled."""
        try:
            while True:
                for path in self._run.glob("host-*/vmm.*.emergency"):
                    with suppress(FileNotFoundError):
                        key = (str(path), path.stat().st_ino)
                        if key not in self._listening or self._listening[key].done():
                            self._listening[key] = asyncio.create_task(self._listen(path))
                await asyncio.sleep(SCAN_SECONDS)
        finally:
            for task in self._listening.values():
                task.cancel()
            await asyncio.gather(*self._listening.values(), return_exceptions=True)

    async def _listen(self, path: Path) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError:
            return  # not listening yet, or not any more
        _, server, epoch = path.name.removesuffix(".emergency").split(".")
        monitor = Monitor(path.parent.name, server, int(epoch))
        self.all.append(monitor)
        try:
            for command in ("qmp_capabilities", "query-status"):
                writer.write(json.dumps({"execute": command}).encode() + b"\n")
            while line := await reader.readline():
                self._hear(monitor, json.loads(line))
        except (OSError, ValueError):
            pass
        finally:
            monitor.gone_at = time.time()
            monitor.ends(monitor.gone_at)
            monitor.alive = False
            self._changed.set()
            writer.close()

    def _hear(self, monitor: Monitor, said: dict) -> None:
        match said:
            case {"event": name, "timestamp": {"seconds": seconds, "microseconds": micros}}:
                at = seconds + micros / 1e6
                if name == "RESUME":
                    monitor.begins(at)
                elif name == "STOP":
                    monitor.ends(at)
                elif name == "MIGRATION":
                    monitor.migration = said["data"]["status"]
            case {"return": {"running": True}}:
                monitor.begins(time.time())
        self._changed.set()

    async def until(
        self, what: str, found: Callable[[Monitor], bool], within: float = STEP_SECONDS
    ) -> Monitor:
        """The first VMM of which this is true. Looks whenever one of them says something."""
        try:
            async with asyncio.timeout(within):
                while True:
                    self._changed.clear()
                    if match := next((m for m in reversed(self.all) if found(m)), None):
                        return match
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), 0.05)
        except TimeoutError:
            raise AssertionError(f"the move never came to: {what}") from None

    def running(self, server: str) -> list[Monitor]:
        return [m for m in self.all if m.server == server and m.runs]

    def overlaps(self, server: str) -> list[str]:
        """Every time at which two copies ran; there must be none."""
        spells = sorted(self._spells(server), key=lambda s: s.began)
        pairs = ((a, b) for i, a in enumerate(spells) for b in spells[i + 1 :])
        return [f"{a} and {b}" for a, b in pairs if a.ended is None or b.began < a.ended]

    def longest_pause(self, server: str, since: float) -> float:
        """Seconds without any running copy."""
        spells = sorted(self._spells(server), key=lambda s: s.began)
        pauses = (b.began - (a.ended or b.began) for a, b in itertools.pairwise(spells) if b.began > since)
        return max(pauses, default=0.0)

    def _spells(self, server: str) -> Iterator[Spell]:
        return (spell for m in self.all if m.server == server for spell in m.spells)


# --- the lab -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A time in which `server` must not, or may, lose datagrams."""

    name: str
    server: str
    began: float
    ended: float
    lossless: bool


@dataclass
class FaultLab:
    datacentre: Datacentre
    client: OperatorClient
    monitors: Monitors
    out: Path
    ips: dict[ServerId, str] = field(default_factory=dict)
    boots: dict[ServerId, str] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    prober: subprocess.Popen[bytes] | None = None
    _told: int = 0
    _ends: list[tuple[float, str]] = field(default_factory=list)

    # --- set up ---

    @property
    def outside(self) -> Outside:
        assert self.datacentre.topology is not None
        return Outside(self.datacentre.topology.client.namespace)

    def releases(self) -> tuple[Release, Release]:
        """The oldest and the newest there are."""
        built = sorted(self.datacentre.build.movable_releases(), key=lambda r: r.version.split("."))
        assert len(built) > 1, "an upgrade needs two releases"
        return built[0], built[-1]

    async def populate(self) -> None:
        for release in self.releases():
            await self.client.register_release(release.id)

        async def serving() -> bool:
            return all(h.phase is HostPhase.SERVING for h in await self.client.hosts())

        await until("hosts to serve", serving, BOOT_SECONDS)
        for name in (MOVER, BYSTANDER):
            self.ips[name] = (await self.client.create_server(ServerRequest(name=name))).ip
        for name, ip in self.ips.items():
            await self.outside.until_up(ip, timeout=BOOT_SECONDS)
            await self.load(name)
            self.boots[name] = (await self.outside.status(ip)).boot_id

    async def load(self, server: ServerId) -> None:
        await self.outside.set_load(
            self.ips[server],
            memory_mib=MEMORY_MIB,
            memory_mb_per_s=MEMORY_MB_PER_S,
            disk_per_s=DISK_PER_S,
        )

    def start_probe(self) -> None:
        assert self.datacentre.topology is not None
        plan = self.out / "plan.json"
        servers = [{"name": name, "ip": ip} for name, ip in self.ips.items()]
        plan.write_text(json.dumps({"servers": servers}))
        with (self.out / "probe.log").open("wb") as log:
            self.prober = subprocess.Popen(
                [*self.datacentre.topology.client.enter, sys.executable, "-m", "nahtlos.lab.probe",
                 "--plan", str(plan), "--out", str(self.out / "probe")],
                env={**os.environ, LAB_VARIABLE: self.datacentre.paths.name},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def end_probe(self) -> None:
        if self.prober is not None:
            self.prober.terminate()
            self.prober.wait(20)
            self.prober = None

    def losses(self) -> dict[Window, int]:
        """Of every window, by a probe that has ended."""
        records = read_probe(self.out / "probe")
        lost = {name: lost_at(arrivals, complete=True) for name, arrivals in records.arrivals.items()}
        return {w: sum(w.began <= at <= w.ended for at in lost[w.server]) for w in self.windows}

    # --- processes ---

    async def pid(self, node: str, unit: str) -> int:
        supervisor = SupervisorClient(self.datacentre.paths.node(node).supervisor)
        try:
            status = (await supervisor.units()).get(unit)
        finally:
            supervisor.close()
        assert status is not None and status.pid is not None, f"{unit} does not run on {node}"
        return status.pid

    def supervisor_pid(self, node: str) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(self.datacentre.paths.node(node).supervisor))
            return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]

    async def restart_supervisor(self, node: str) -> None:
        """Killed, and started again a second later; nobody supervises a lab's supervisors."""
        assert self.datacentre.topology is not None
        os.kill(self.supervisor_pid(node), signal.SIGKILL)
        await asyncio.sleep(1.0)
        paths = self.datacentre.paths.node(node)
        await asyncio.to_thread(
            launch_supervisor,
            paths.supervisor,
            paths.state / "supervisor",
            namespace=self.datacentre.topology.node(node).namespace,
            environment={LAB_VARIABLE: self.datacentre.paths.name},
        )

    # --- observation ---

    async def whereabouts(self, server: ServerId) -> ServerView:
        return await self.client.server(server)

    async def compute(self) -> tuple[HostView, ...]:
        return tuple(h for h in await self.client.hosts() if h.role is HostRole.COMPUTE)

    async def other_than(self, host: HostId) -> HostId:
        return next(h.id for h in await self.compute() if h.id != host)

    async def step_of(self, host: HostId, server: ServerId) -> str:
        inventory = (await self.client.host(host)).inventory
        running = [
            o for o in (inventory.operations if inventory else ())
            if o.server == server and o.state is OperationState.RUNNING
        ]  # fmt: skip
        return running[-1].step if running else ""

    async def is_settled(self) -> bool:
        """Nothing moves, nothing waits, no host has an operation that has not ended."""
        hosts = await self.compute()
        servers = await self.client.servers()
        views = [await self.client.host(h.id) for h in hosts]
        operations = [o for v in views if v.inventory for o in v.inventory.operations]
        return (
            all(h.connected for h in await self.client.hosts())
            and all(s.state is RunState.RUNNING and s.moving_to is None and not s.waits_for for s in servers)
            and not any(o.state is not OperationState.DONE and o.state is not OperationState.UNDONE
                        for o in operations)
        )  # fmt: skip

    async def settle(self) -> None:
        try:
            await until("everything to have ended", self.is_settled, SETTLE_SECONDS, every=0.1)
        except AssertionError as error:
            views = [await self.client.host(h.id) for h in await self.compute()]
            servers = await self.client.servers()
            said = [
                *(f"{s.id}: {s.host} {s.state} {s.moving_to} {s.waits_for}" for s in servers),
                *(f"{v.id}: {'' if v.connected else 'not '}connected" for v in views),
                *(f"{v.id}: {o}" for v in views if v.inventory for o in v.inventory.operations),
                *(f"{v.id}: {p.message}" for v in views if v.inventory for p in v.inventory.problems),
            ]  # fmt: skip
            raise AssertionError("\n".join((str(error), *said))) from None

    async def check(self, server: ServerId, *, may_have_rebooted: bool = False) -> GuestStatus:
        """What must hold of a server at any time, whatever was done to the cloud."""
        await self.outside.until_up(self.ips[server], timeout=BOOT_SECONDS)
        status = await self.outside.status(self.ips[server])
        assert not self.monitors.overlaps(server)
        assert len(self.monitors.running(server)) == 1
        if may_have_rebooted and status.boot_id != self.boots[server]:
            self.boots[server] = status.boot_id
            await self.load(server)
        assert status.boot_id == self.boots[server], "the server was rebooted"
        assert status.memory.errors == 0
        assert status.disk.errors == 0
        view = await self.whereabouts(server)
        folder = self.datacentre.paths.node(view.volume_host).state / "volumes"
        (volume,) = folder.glob(f"*{server}*.raw")
        disk = await asyncio.to_thread(check_volume, volume, status.disk.acknowledged, server)
        assert (disk.lost, disk.wrong) == (0, 0), disk
        return status

    # --- one move, one fault ---

    async def move_with(self, fault: Fault, step: Step) -> str:
        """Moves the mover; returns, in words, what came of it. It is at its destination afterwards."""
        for _ in range(TRIES):
            await self.settle()
            try:
                return await self._move_with(fault, step)
            except Missed:
                continue
        raise AssertionError(f"{step} was missed {TRIES} times")

    async def _move_with(self, fault: Fault, step: Step) -> str:
        view = await self.whereabouts(MOVER)
        assert view.host is not None
        move = MoveUnderFault(self, view.host, await self.other_than(view.host), view.epoch)
        began = time.time()
        await self.client.move_server(MOVER, move.destination)
        async with move.held_at(step, fault):
            hit = time.time()
            await move.put_in(fault)
        await move.lift(fault)
        await until(
            f"{MOVER} to arrive at {move.destination}", lambda: self._is_at(move.destination), SETTLE_SECONDS
        )
        arrived = time.time()
        await self.settle()
        settled = time.time()
        rebooted = move.killed_running
        await self.check(MOVER, may_have_rebooted=rebooted)
        await self.check(BYSTANDER)
        ended = time.time()
        name = f"{fault} at {step}"
        self.windows += [
            Window(name, MOVER, began, ended, lossless=_lossless(fault, step)),
            Window(name, BYSTANDER, began, ended, lossless=fault not in LINKS),
        ]
        return (
            f"{name}: hit after {hit - began:.1f} s, arrived after {arrived - began:.1f} s, settled after "
            f"{settled - began:.1f} s; no copy ran for at most "
            f"{self.monitors.longest_pause(MOVER, began) * 1000:.0f} ms; attempts: "
            f"{', '.join(await self._attempts(began))}" + ("; its VMM was killed" if rebooted else "")
        )

    async def _attempts(self, since: float) -> list[str]:
        """How each move of the mover ended, as operators are told."""
        while told := await self.client.events(self._told, 1000):
            self._told = told[-1].number
            self._ends += [(e.at, str(e.data.get("state"))) for e in told
                           if e.kind == "move.ended" and e.subject == MOVER]  # fmt: skip
        return [state for at, state in self._ends if at >= since]

    async def _is_at(self, host: HostId) -> bool:
        view = await self.whereabouts(MOVER)
        return view.host == host and view.state is RunState.RUNNING and view.moving_to is None


def _lossless(fault: Fault, step: Step) -> bool:
    """Everything but a cable that does not carry and a guest that was killed with its only VMM."""
    return fault not in LINKS and (fault, step) != (Fault.DESTINATION_VMM, Step.COMMITTED)


class MoveUnderFault:
    def __init__(self, lab: FaultLab, source: HostId, destination: HostId, epoch: int) -> None:
        self._lab = lab
        self.source, self.destination = source, destination
        self._epoch = epoch
        self.killed_running = False
        for monitor in lab.monitors.all:
            monitor.migration = ""  # what an earlier move said

    @asynccontextmanager
    async def held_at(self, step: Step, fault: Fault) -> AsyncGenerator[None]:
        """At `step`. Where it lasts no longer than a fault takes to be put in, the destination's agent is
        frozen meanwhile: its source then waits for it at this very step."""
        frozen: int | None = None
        try:
            if step is Step.SWITCH:
                # The destination's agent has nothing to do any more until the switch.
                await self._lab.monitors.until(
                    "the stream", lambda m: self._leaving(m) and m.migration in ("setup", *SENDING)
                )
                frozen = await self._frozen_at_switch()
            else:
                await self._reach(step)
                if step is Step.STOPPED and fault in LINKS:
                    frozen = await self._freeze()
            yield
        finally:
            if frozen is not None:
                with suppress(ProcessLookupError):
                    os.kill(frozen, signal.SIGCONT)

    async def _reach(self, step: Step) -> None:
        monitors = self._lab.monitors
        match step:
            case Step.PREPARE:
                await monitors.until("a VMM that waits", self._arriving)
            case Step.PRECOPY:
                await monitors.until("the pre-copy", lambda m: self._leaving(m) and m.migration in SENDING)
            case Step.STOPPED:
                await monitors.until("the stop", lambda m: self._leaving(m) and not m.runs)
            case Step.COMMITTED:
                await monitors.until("the resume", lambda m: self._arriving(m) and m.runs)
            case Step.SWITCH:
                raise AssertionError("a switch is held, not awaited")

    def _leaving(self, monitor: Monitor) -> bool:
        mine = monitor.server == MOVER and monitor.host == self.source and monitor.epoch == self._epoch
        return mine and bool(monitor.spells)

    def _arriving(self, monitor: Monitor) -> bool:
        mine = monitor.server == MOVER and monitor.host == self.destination and monitor.alive
        return mine and monitor.epoch > self._epoch

    async def _frozen_at_switch(self) -> int:
        """The pid of the destination's agent, frozen while its source waits for it to switch the path.

        It is frozen already while the source asks it for the turn to be switched. Then it may give that turn,
        but nothing that the source says after it comes in any more."""
        lab, topology = self._lab, self._lab.datacentre.topology
        assert topology is not None
        pid = await lab.pid(self.destination, "agent")
        os.kill(pid, signal.SIGSTOP)
        try:
            namespace = topology.node(self.destination).namespace
            await self._asked(namespace)
            deafen(namespace, on=True)
            try:
                os.kill(pid, signal.SIGCONT)
                await self._switching()
                os.kill(pid, signal.SIGSTOP)
            finally:
                deafen(namespace, on=False)
        except BaseException:
            os.kill(pid, signal.SIGCONT)
            raise
        return pid

    async def _asked(self, namespace: str) -> None:
        """Until something waits to be read by the destination's agent, and nothing follows: the source waits,
        too."""
        seen, since = 0, time.monotonic()
        async with missed_after(FROZEN_SECONDS):
            while not seen or time.monotonic() - since < QUIET_SECONDS:
                if (waiting := unread_bytes(namespace, PEER_PORT)) != seen:
                    seen, since = waiting, time.monotonic()
                await asyncio.sleep(0.01)

    async def _switching(self) -> None:
        async with missed_after(FROZEN_SECONDS):
            while (step := await self._lab.step_of(self.source, MOVER)) != "switch":
                if step not in ("prepare", "precopy"):
                    raise Missed(step)
                await asyncio.sleep(0.02)

    async def _freeze(self) -> int:
        pid = await self._lab.pid(self.destination, "agent")
        os.kill(pid, signal.SIGSTOP)
        return pid

    async def put_in(self, fault: Fault) -> None:
        lab, topology = self._lab, self._lab.datacentre.topology
        assert topology is not None
        match fault:
            case Fault.DESTINATION_VMM:
                arriving = next(m for m in reversed(lab.monitors.all) if self._arriving(m))
                unit = f"vmm.{MOVER}.{arriving.epoch}"
                os.kill(await lab.pid(self.destination, unit), signal.SIGKILL)
                await lab.monitors.until("its end", lambda m: m is arriving and not m.alive)
                self.killed_running = bool(arriving.spells)
            case Fault.SOURCE_AGENT:
                os.kill(await lab.pid(self.source, "agent"), signal.SIGKILL)
            case Fault.DESTINATION_AGENT:
                os.kill(await lab.pid(self.destination, "agent"), signal.SIGKILL)
            case Fault.ORCHESTRATOR:
                os.kill(await lab.pid("ctl", "orchestrator"), signal.SIGKILL)
            case Fault.LINK_STALLED:
                await asyncio.to_thread(stall, topology, self.destination, on=True)
            case Fault.LINK_CUT:
                await asyncio.to_thread(set_link, topology, self.destination, up=False)
            case Fault.SOURCE_SUPERVISOR:
                await lab.restart_supervisor(self.source)
            case Fault.DESTINATION_SUPERVISOR:
                await lab.restart_supervisor(self.destination)

    async def lift(self, fault: Fault) -> None:
        topology = self._lab.datacentre.topology
        assert topology is not None
        if fault not in LINKS:
            return
        await asyncio.sleep(STALL_SECONDS)
        if fault is Fault.LINK_STALLED:
            await asyncio.to_thread(stall, topology, self.destination, on=False)
        else:
            await asyncio.to_thread(set_link, topology, self.destination, up=True)
