"""The simulated data centre: hosts, their VMMs, taps, volumes and daemons, and what must never happen there.

Owns the state that outlives agents and the record of what was broken (`violations`) and of everything that
happened (`trace`). Never decides anything a host's agent decides, and never prevents a mistake: a source
resumed after it was sent runs as a second copy here, as it would in truth.

Checked at every transition:
    two-copies    two VMMs run the same server
    stale-copy    a memory runs whose disk was written by a later one
    rebooted      a server was booted again though nothing outside our hands had ended it
    epoch         a server ran by an older epoch after a newer one
    last-copy     an agent ended the only VMM that still held a server
    given-up      an agent ended one of the two VMMs of a post-copy while memory followed
What must never happen to volumes: see `sim.volumes`.
"""

import asyncio
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.config import PortConfig, ServerConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, PortId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical.ports import MigrationPhase, VmmId
from nahtlos.physical.sim.clock import virtual_loop
from nahtlos.physical.sim.facts import ServerFacts, SimHost, Step, Violation
from nahtlos.physical.sim.faults import Act, Call, Calm, Life, Moment, Troubles, strike
from nahtlos.physical.sim.guests import (
    LINK_BYTES_PER_SECOND,
    Given,
    Guest,
    Stream,
    Vmm,
    why_not_loaded,
)
from nahtlos.physical.sim.leases import check_lease, supervisor_back
from nahtlos.physical.sim.paths import Paths
from nahtlos.physical.sim.taps import Flow, Switchboard, Tap, lost
from nahtlos.physical.sim.volumes import Disks

STORAGE_RESTART_SECONDS = 0.03
BOOT_SECONDS = (1.5, 4.0)
SAVED_PADDING = 9 << 20
"""Bytes: so that what is saved has several parts."""
SHUTDOWN_SECONDS = (0.5, 2.0)
ANSWER_AGAIN_SECONDS = 0.1
GIVEN_UP_SECONDS = 50.0
"""Memory that follows a server is waited for that long at least once nothing comes any more."""


class World:
    """`troubles` decides what goes wrong in driver calls; `state_dir` keeps what hosts have on disk."""

    def __init__(self, *, seed: int = 0, troubles: Troubles | None = None, state_dir: Path) -> None:
        self.random = random.Random(f"world {seed}")
        self.troubles: Troubles = troubles or Calm(seed)
        self.state_dir = state_dir
        self.hosts: dict[HostId, SimHost] = {}
        self.servers: dict[ServerId, ServerFacts] = {}
        self.paths = Paths(self.now)
        self.disks = Disks(self)
        self.violations: list[Violation] = []
        self.trace: list[Step] = []
        self.dirty_rates: dict[ServerId, int] = {}
        """Bytes a second; servers not named dirty 8 MiB/s."""
        self.slow_memory: dict[ServerId, float] = {}
        """Seconds a guest takes to give memory back; those not named do it at once."""
        self.clinging: set[ServerId] = set()
        """Guests that let no vCPU go."""
        self.silent: set[ServerId] = set()
        """Guests whose agent has the channel open and does not answer."""
        self.without_agent: set[ServerId] = set()
        """Guests in which nothing has the channel open."""
        self.stalled_links: set[frozenset[HostId]] = set()
        self.deaf: set[ServerId] = set()
        """Guests that do not care for their power button."""
        self.client: HostId | None = None
        """The host through which packets from outside come in."""
        self.raw: dict[VolumeId, dict[int, bytes]] = {}
        """What agents themselves have written to volumes, by offset."""
        self._calls = itertools.count(1)
        self._occurrences: dict[tuple[HostId, str, str], int] = {}
        self._pids = itertools.count(1000)
        self._listeners = itertools.count(1)
        self._incoming: dict[str, Vmm] = {}
        self._streams: list[Stream] = []

    # --- time and record ---

    def now(self) -> float:
        return virtual_loop().time()

    def note(self, host: str, what: str, subject: str, moment: str = "", call: Call | None = None) -> None:
        self.trace.append(
            Step(at=self.now(), host=host, what=what, subject=subject, moment=moment, call=call)
        )

    def violated(self, kind: str, subject: str, text: str) -> None:
        self.violations.append(Violation(at=self.now(), kind=kind, subject=subject, text=text))
        self.note("", f"VIOLATION {kind}", subject, text)

    def facts(self, server: ServerId) -> ServerFacts:
        return self.servers.setdefault(server, ServerFacts())

    def new_pid(self) -> int:
        return next(self._pids)

    def new_port(self) -> int:
        return 40_000 + next(self._listeners)

    # --- calls of agents ---

    def next_call(self, host: HostId, driver: str, verb: str, subject: str) -> Call:
        key = (host, driver, verb)
        self._occurrences[key] = self._occurrences.get(key, 0) + 1
        return Call(
            number=next(self._calls),
            occurrence=self._occurrences[key],
            host=host,
            driver=driver,
            verb=verb,
            subject=subject,
        )

    def befall(self, call: Call, moment: Moment, life: Life) -> None:
        life.check()
        self.note(call.host, f"{call.driver}.{call.verb}", call.subject, moment, call)
        strike(self.troubles.befall(call, moment), call, moment, life)

    def crash_point(self, host: HostId, text: str, life: Life) -> None:
        """The agent's ledger before or after a transaction (`before take`, `after take`)."""
        moment, _, name = text.partition(" ")
        key = (host, "ledger", name)
        if moment == Moment.BEFORE:
            self._occurrences[key] = self._occurrences.get(key, 0) + 1
        call = Call(
            number=next(self._calls),
            occurrence=self._occurrences[key],
            host=host,
            driver="ledger",
            verb=name,
            subject="",
        )
        life.check()
        self.note(host, f"ledger.{name}", "", moment, call)
        if self.troubles.befall(call, Moment(moment)) is Act.CRASH:
            strike(Act.CRASH, call, Moment(moment), life)

    # --- hosts ---

    def add_host(
        self, host: HostId, address: str, *, role: HostRole, capacity: Size, releases: tuple[ReleaseId, ...]
    ) -> SimHost:
        board = Switchboard(host=host, address=address)
        self.paths.add(board)
        self.hosts[host] = SimHost(
            id=host, role=role, address=address, capacity=capacity, board=board, releases=list(releases)
        )
        if role is HostRole.EDGE and self.client is None:
            self.client = host
        (self.state_dir / host).mkdir(parents=True, exist_ok=True)
        return self.hosts[host]

    def power_off(self, host: HostId) -> None:
        """The host goes dark: VMMs, taps, tunnels and stored descriptors are gone, its disk is not."""
        here = self.hosts[host]
        self.note(host, "power off", host)
        self.disks.daemon_ended(here)
        for vmm in tuple(here.vmms.values()):
            self._end_vmm(vmm, f"{host} lost power")
        here.vmms.clear()
        self.paths.power(host, on=False)
        here.fds.clear()
        here.listening.clear()
        here.units.clear()
        here.lease = 0.0
        here.powered = here.storage_up = False
        here.supervisor_up = here.keeper_up = False

    def power_on(self, host: HostId) -> None:
        here = self.hosts[host]
        self.note(host, "power on", host)
        here.boots += 1
        here.powered = here.storage_up = True
        here.supervisor_up = here.keeper_up = True
        self.paths.power(host, on=True)

    def kill_supervisor(self, host: HostId) -> None:
        """What it has started runs on; nothing is started or ended by it until it is started again."""
        self.note(host, "supervisor killed", host)
        self.hosts[host].supervisor_up = False

    def start_supervisor(self, host: HostId) -> None:
        here = self.hosts[host]
        if here.powered and not here.supervisor_up:
            self.note(host, "supervisor starts", host)
            supervisor_back(self, here)

    def kill_storage(self, host: HostId) -> None:
        """kill -9 of the storage daemon; its supervisor starts it again on the same socket."""
        here = self.hosts[host]
        if here.powered and here.storage_up:
            self.note(host, "storage daemon killed", host)
            self.disks.daemon_ended(here)
            here.storage_up = False
            here.storage_restarts += 1
            virtual_loop().call_later(STORAGE_RESTART_SECONDS, self._storage_back, here, here.boots)

    def replace_storage(self, host: HostId, release: ReleaseId) -> None:
        """The daemon is started anew by `release`, on the same socket: clients wait and connect again."""
        here = self.hosts[host]
        self.note(host, "storage daemon replaced", release)
        here.storage_release = release
        if here.storage_up:
            self.disks.daemon_ended(here)
            here.storage_up = False
            virtual_loop().call_later(STORAGE_RESTART_SECONDS, self._storage_back, here, here.boots)

    def _storage_back(self, here: SimHost, boots: int) -> None:
        if here.boots == boots and here.powered:
            here.storage_up = True
            self.disks.touch(*here.volumes)

    def stall_link(self, one: HostId, other: HostId, *, on: bool) -> None:
        """Streams between the two make no progress (but do not break)."""
        link = frozenset((one, other))
        (self.stalled_links.add if on else self.stalled_links.discard)(link)
        self.note(one, "link stalled" if on else "link flows", other)
        for stream in self._streams:
            if stream.hosts == link:
                stream.stall(on=on)

    def cut_streams(self, one: HostId, other: HostId) -> None:
        """Connections of streams between the two are reset."""
        for stream in tuple(self._streams):
            if stream.hosts == frozenset((one, other)):
                self.note(one, "stream cut", stream.source.id.unit)
                stream.fail("connection reset")

    # --- taps ---

    def add_tap(self, host: SimHost, port: PortConfig) -> Tap:
        tap = host.board.taps.get(port.id)
        if tap is None:
            delay = self.random.uniform(0.0001, 0.0006)
            tap = Tap(port=port.id, mac=port.mac, host=host.id, delay=delay)
            self.paths.add_tap(tap)
        host.fds.setdefault(f"tap.{port.id}", -1)
        return tap

    def remove_tap(self, host: SimHost, port: PortId) -> None:
        tap = host.board.taps.get(port)
        self.paths.remove_tap(host.id, port)
        host.fds.pop(f"tap.{port}", None)
        if tap and tap.vmm is not None and tap.vmm.running:
            self.note(host.id, "tap taken from a running VMM", port)

    # --- VMMs ---

    def start_vmm(
        self,
        host: SimHost,
        server: ServerConfig,
        epoch: int,
        release: ReleaseId,
        *,
        boot: bool,
        in_place: bool = False,
    ) -> Vmm:
        """A new process: it boots the server, or waits for it to arrive, `in_place` from its own host."""
        vmm_id = VmmId(server.spec.id, epoch)
        taps: list[Tap] = []
        for port in server.spec.ports:
            tap = (host.board.spares if in_place else host.board.taps).get(port.id)
            if tap is None:
                raise Refused(f"{host.id} has no tap for {port.id}", field="port")
            taps.append(tap)
        self.disks.check_served(server.all_volumes)
        leased = server.spec.on_host_failure is OnHostFailure.RESTART
        check_lease(self, host, vmm_id, leased=leased)
        vmm = Vmm(
            leased=leased,
            id=vmm_id,
            host=host.id,
            server=server,
            release=release,
            state=RunState.INCOMING,
            pid=self.new_pid(),
            taps=taps,
            in_place=in_place,
            dirty_rate=self.dirty_rates.get(server.spec.id, 8 << 20),
            given=Given.of(server.spec),
        )
        host.vmms[vmm_id] = vmm
        host.consoles.setdefault(vmm_id, bytearray())
        for tap in taps:
            self.paths.touch(tap.mac)
            tap.vmm = vmm
            tap.absorb()
        if boot:
            self._boot(vmm)
        return vmm

    def _boot(self, vmm: Vmm) -> None:
        facts = self.facts(vmm.id.server)
        facts.boots += 1
        if facts.boots > 1 and not facts.gone:
            self.violated("rebooted", vmm.id.server, f"booted again at {vmm.host} by epoch {vmm.id.epoch}")
        facts.gone = facts.may_stop = False
        vmm.guest = Guest(boot=facts.boots)
        self.hosts[vmm.host].consoles[vmm.id] += f"boot {facts.boots} at {vmm.host}\n".encode()
        self._run(vmm)
        vmm.guest.behind = 0.0
        if not facts.up:
            delay = self.random.uniform(*BOOT_SECONDS)
            virtual_loop().call_later(delay, self._answers, vmm.id.server)

    def _answers(self, server: ServerId) -> None:
        """The guest has booted: clients begin to talk to it, once the way in knows where it is."""
        facts = self.facts(server)
        running = self.running(server)
        if facts.deleted or facts.up or not running:
            return
        taps = running[0].taps
        if self.client is not None and any(t.mac not in self.hosts[self.client].board.entries for t in taps):
            virtual_loop().call_later(ANSWER_AGAIN_SECONDS, self._answers, server)
            return
        facts.up = True
        for tap in taps:
            if self.client is not None:
                self.paths.open_flow(tap.mac, self.client)

    def running(self, server: ServerId) -> list[Vmm]:
        return [v for v in self.vmms_of(server) if v.running]

    def vmms_of(self, server: ServerId) -> list[Vmm]:
        return [
            v for h in self.hosts.values() for v in h.vmms.values() if v.id.server == server and not v.ended
        ]

    def saved(self, vmm: Vmm) -> list[bytes]:
        """What it remembers, in pieces."""
        assert vmm.guest is not None
        vmm.saved = True
        told = {"boot": vmm.guest.boot, "writes": vmm.guest.writes, "vcpus": vmm.given.vcpus}
        body = msgspec.json.encode(told) + b"\n" * SAVED_PADDING
        return [body[at : at + (SAVED_PADDING // 3)] for at in range(0, len(body), SAVED_PADDING // 3)]

    def restored(self, vmm: Vmm, body: bytes) -> None:
        told = msgspec.json.decode(body, type=dict[str, Any])
        if told["vcpus"] != vmm.given.vcpus:
            self._end_vmm(vmm, None)
            raise Refused(f"{vmm.id.unit} has other vCPUs than what was saved", field="vcpus")
        writes = {VolumeId(name): count for name, count in told["writes"].items()}
        vmm.guest = Guest(boot=told["boot"], writes=writes)
        vmm.migrated = True
        vmm.state = RunState.PAUSED
        vmm.arrival.set()

    def press(self, vmm: Vmm) -> None:
        """The guest's power button."""
        if vmm.running and vmm.id.server not in self.deaf:
            virtual_loop().call_later(self.random.uniform(*SHUTDOWN_SECONDS), self.switch_off, vmm)

    def switch_off(self, vmm: Vmm) -> None:
        """By its guest."""
        if vmm.running:
            self.pause(vmm)
            vmm.state = RunState.STOPPED
            self.note(vmm.host, "switched itself off", vmm.id.unit)

    def stop_expected(self, server: ServerId) -> None:
        """Its owner asked that it be stopped, or booted anew: from now on nobody misses what it remembers."""
        self.facts(server).may_stop = True

    def resume(self, vmm: Vmm) -> None:
        if vmm.running or vmm.state is RunState.STOPPED:
            return
        self._run(vmm)

    def _run(self, vmm: Vmm) -> None:
        vmm.saved, vmm.disk_problems = False, ()
        if vmm.stream is not None and vmm.stream.destination is None:
            vmm.sent = False
        for tap in vmm.taps:
            self.paths.touch(tap.mac)
        vmm.state = RunState.RUNNING
        facts = self.facts(vmm.id.server)
        others = [v for v in self.running(vmm.id.server) if v is not vmm]
        if others:
            self.violated(
                "two-copies",
                vmm.id.server,
                f"runs as {vmm.id.unit} at {vmm.host} and as "
                + ", ".join(f"{v.id.unit} at {v.host}" for v in others),
            )
        self._check_memory(vmm)
        if vmm.id.epoch < facts.epoch:
            text = f"runs by epoch {vmm.id.epoch} after it ran by {facts.epoch}"
            self.violated("epoch", vmm.id.server, text)
        facts.epoch = max(facts.epoch, vmm.id.epoch)
        vmm.has_run = True
        for tap in vmm.taps:
            if tap.vmm is vmm:
                tap.runs(self.now())
        if facts.stopped_at is not None:
            facts.longest_blackout = max(facts.longest_blackout, self.now() - facts.stopped_at)
            if vmm.guest is not None:
                vmm.guest.behind += self.now() - facts.stopped_at
            facts.stopped_at = None
        if vmm.stream:
            vmm.stream.source_runs()
        self.note(vmm.host, "runs", vmm.id.unit)

    def _check_memory(self, vmm: Vmm) -> None:
        if vmm.guest is None:
            self.violated("stale-copy", vmm.id.server, f"{vmm.id.unit} runs without ever having received it")
        else:
            self.disks.use(vmm)

    def pause(self, vmm: Vmm) -> None:
        if not vmm.running:
            return
        if not vmm.disk_problems:
            self.disks.use(vmm)
        for tap in vmm.taps:
            self.paths.touch(tap.mac)
        vmm.state = RunState.PAUSED
        self._halted(vmm)
        for tap in vmm.taps:
            if tap.vmm is vmm:
                tap.absorb()
        self.note(vmm.host, "stands still", vmm.id.unit)
        if vmm.stream:
            vmm.stream.source_paused()

    def _halted(self, vmm: Vmm) -> None:
        facts = self.facts(vmm.id.server)
        if not self.running(vmm.id.server):
            facts.stopped_at = self.now()

    def kill_vmm(self, vmm: Vmm, why: str) -> None:
        """Not by an agent: kill -9, out of memory, a bug in it. It stays in sight as CRASHED."""
        self.note(vmm.host, "VMM killed", vmm.id.unit, why)
        self._end_vmm(vmm, why)

    def remove_vmm(self, vmm: Vmm) -> None:
        """By its agent: gone, and forgotten."""
        facts = self.facts(vmm.id.server)
        if not vmm.ended:
            others = [v for v in self.vmms_of(vmm.id.server) if v is not vmm and v.guest]
            if vmm.guest and not others and (facts.may_stop or vmm.state is RunState.STOPPED):
                facts.gone = True
            self._check_following(vmm)
            kept = facts.deleted or facts.gone or vmm.saved or (vmm.migrated and not vmm.has_run)
            if vmm.guest and not others and not kept:
                self.violated("last-copy", vmm.id.server, f"{vmm.id.unit} was ended by {vmm.host}'s agent")
            self._end_vmm(vmm, None)
        self.hosts[vmm.host].vmms.pop(vmm.id, None)

    def _check_following(self, vmm: Vmm) -> None:
        """One of a post-copy is ended by its agent. The server is lost with it: there had better be a
        reason."""
        facts, stream = self.facts(vmm.id.server), vmm.follows or vmm.stream
        if facts.gone or facts.deleted or stream is None or not stream.followed:
            return
        if stream.phase is MigrationPhase.COMPLETED or stream.without_destination:
            return
        if stream.open and self.now() - stream.flowed_at < GIVEN_UP_SECONDS:
            self.violated("given-up", vmm.id.server, f"{vmm.id.unit} was ended by {vmm.host}'s agent")
        facts.excuses.append(f"{vmm.id.unit}: its memory did not come")
        facts.gone = True

    def _end_vmm(self, vmm: Vmm, why: str | None) -> None:
        if vmm.ended:
            return
        for tap in vmm.taps:
            self.paths.touch(tap.mac)
        was_running = vmm.running
        if was_running or vmm.disk_problems:
            self.disks.ended_writing(vmm)
        if why and vmm.guest and not (vmm.sent and not was_running):
            facts = self.facts(vmm.id.server)
            facts.excuses.append(f"{vmm.id.unit}: {why}")
            facts.gone = True
        self._lose_what_followed(vmm, why)
        vmm.state = RunState.CRASHED
        if was_running:
            self._halted(vmm)
        for tap in vmm.taps:
            if tap.vmm is vmm:
                tap.detached(self.now())
        self._nothing_arrives(vmm, "the VMM ended")
        for stream in tuple(self._streams):
            if stream.source is vmm:
                stream.source_ended()
            elif stream.destination is vmm:
                stream.destination_gone()

    def _lose_what_followed(self, vmm: Vmm, why: str | None) -> None:
        """A source that ends before all of the memory has followed takes the server with it."""
        stream = vmm.stream
        if why and stream is not None and stream.open and stream.followed:
            facts = self.facts(vmm.id.server)
            facts.excuses.append(f"{vmm.id.unit}: {why}, before all of its memory had followed")
            facts.gone = True

    # --- streams ---

    def listen(self, vmm: Vmm, address: str) -> str:
        if vmm.uri is None:
            vmm.uri = f"sim:{address}:{next(self._listeners)}"
            self._incoming[vmm.uri] = vmm
        return vmm.uri

    def begin_stream(
        self,
        source: Vmm,
        uri: str,
        peer: str,
        rate: int,
        *,
        slow_down: bool = False,
        post_copy: bool = False,
    ) -> None:
        destination = self._incoming.get(uri)
        if destination is None or destination.ended or destination.refused or destination.migrated:
            raise Refused(f"nobody listens at {uri}", field="uri")
        if destination.host != peer:
            raise Refused(f"{uri} proved to be {destination.host}, not {peer}", field="peer")
        if source.stream and source.stream.phase is MigrationPhase.ACTIVE:
            raise Refused(f"{source.id.unit} is being sent already", field="vmm")
        if not source.running and not destination.in_place:
            raise Refused(f"{source.id.unit} does not run", field="vmm")
        if destination.given.vcpus != source.given.vcpus:
            self._nothing_arrives(destination, "its machine has other vCPUs")
            raise Refused(f"{destination.id.unit} has other vCPUs than {source.id.unit}", field="vcpus")
        stream = Stream(source, destination, rate, self.now, self._stream_ended)
        stream.may_slow_down = slow_down
        stream.may_post_copy = post_copy
        stream.stalled = frozenset((source.host, destination.host)) in self.stalled_links
        source.stream = stream
        source.sent = False
        self._streams.append(stream)
        stream.source_paused()  # if it stands still
        if why := why_not_loaded(source, destination):
            stream.breaks(why)

    def begin_saving(self, source: Vmm) -> Stream:
        """To somebody of its host who writes it down."""
        if source.stream and source.stream.phase is MigrationPhase.ACTIVE:
            raise Refused(f"{source.id.unit} is being sent already", field="vmm")
        stream = Stream(source, None, LINK_BYTES_PER_SECOND, self.now, self._stream_ended)
        source.stream, source.sent = stream, False
        self._streams.append(stream)
        stream.source_paused()
        return stream

    def _stream_ended(self, stream: Stream) -> None:
        """Or has handed its server over, by post-copy."""
        source, destination = stream.source, stream.destination
        if not stream.open:
            self._streams.remove(stream)
        self.note(source.host, f"stream {stream.phase}", source.id.unit, stream.error)
        if destination is None:
            source.sent = stream.phase is MigrationPhase.COMPLETED
            stream.taken = tuple(self.saved(source)) if source.sent else ()
            return
        if destination.follows is stream:
            return
        if stream.phase in (MigrationPhase.COMPLETED, MigrationPhase.POST_COPY):
            assert source.guest is not None
            if stream.phase is MigrationPhase.POST_COPY:
                destination.follows = stream
            source.sent = True
            destination.guest = source.guest.copied()
            destination.given.take_over(source.given)
            destination.migrated = True
            destination.state = RunState.PAUSED
            destination.arrival.set()
        else:
            self._nothing_arrives(destination, stream.error or str(stream.phase))

    def _nothing_arrives(self, vmm: Vmm, why: str) -> None:
        if not vmm.migrated and not vmm.guest:
            vmm.refused = vmm.refused or why
        vmm.arrival.set()

    # --- what tests ask ---

    def delete_expected(self, server: ServerId) -> None:
        """Its owner asked for the end of it: from now on nobody misses it."""
        facts = self.facts(server)
        facts.deleted = True
        for vmm in self.vmms_of(server):
            for tap in vmm.taps:
                self.paths.close_flow(tap.mac)

    def settle(self) -> None:
        """Account for all packets sent until now."""
        self.paths.touch_all()

    def flows_of(self, server: ServerId, macs: tuple[str, ...]) -> list[Flow]:
        return [f for (mac, _), f in self.paths.flows.items() if mac in macs]

    def packets_lost(self, macs: tuple[str, ...] | None = None) -> int:
        return lost(f for (mac, _), f in self.paths.flows.items() if macs is None or mac in macs)

    async def until(
        self, condition: Callable[[], bool], *, timeout: float, what: str, every: float = 0.05
    ) -> None:
        """Raises TimeoutError naming `what`."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    await asyncio.sleep(every)
        except TimeoutError as error:
            raise TimeoutError(f"{what} did not come about within {timeout:g} virtual seconds") from error
