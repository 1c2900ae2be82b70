"""Bringing a host to its numbered configuration: what to do is decided by a pure function, then done.

A server is started, started again after its VMM ended, or removed here; never moved, and never touched
while an operation of it runs. What the configuration does not mention is reported and left alone.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import StrEnum

import msgspec

from nahtlos.model.config import HostConfig, PortConfig, ServerConfig
from nahtlos.model.errors import Error, ErrorRecord, NotFound, Refused
from nahtlos.model.ids import OperationId, PortId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import OperationKind, RunState
from nahtlos.model.power import PowerState
from nahtlos.model.values import Value
from nahtlos.physical.agent import gateway_decisions
from nahtlos.physical.agent.consoles import serial
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.giving import has, wanted_compute, with_policy
from nahtlos.physical.agent.leases import Leases
from nahtlos.physical.agent.ledger import Hold, Journal, Ownership, Role
from nahtlos.physical.agent.power import PowerStep, as_told, power_step, stopping
from nahtlos.physical.agent.volumes import holds
from nahtlos.physical.agent.volumes.rejoin import end_alike, never_ran, note_fresh, on_one_copy
from nahtlos.physical.agent.volumes.replicas import lost_exports, wanted_disks, without, without_lost
from nahtlos.physical.ports import NetworkDesired, StorageDesired, VmmId, VmmStatus
from nahtlos.wire.messages import MoveOrder

AGAIN_SECONDS = 20.0
"""Between attempts to suspend a server, or to let it go on from what was saved."""


class Act(StrEnum):
    START = "start"
    """New here."""
    RESTART = "restart"
    """Owned here, and its VMM is gone."""
    RESUME = "resume"
    """Owned here, and its VMM stands still though no operation asks for that. One that its disks have stopped
    is `volumes.replicas`'s."""
    REMOVE = "remove"
    END_STRAY = "end-stray"
    """A VMM of an epoch this host does not own and no operation needs."""
    KEEP = "keep"
    """Given to this host while it is off."""
    LET_GO = "let-go"
    """Off, and another host's now."""
    POWER = "power"
    """Another power is asked for than it has: `ServerStep.power`."""


class ServerStep(Value, frozen=True, kw_only=True):
    act: Act
    server: ServerConfig
    epoch: int
    power: PowerStep | None = None


def server_steps(
    config: HostConfig,
    owned: Mapping[ServerId, Ownership],
    vmms: Iterable[VmmStatus],
    busy: frozenset[ServerId],
) -> tuple[ServerStep, ...]:
    """What must be done for the servers of this host, in order. `busy`: servers with a running operation."""
    present = {v.id: v for v in vmms}
    steps: list[ServerStep] = []
    for server in config.servers:
        held = owned.get(server.spec.id)
        if server.spec.id in busy or server.spec.id in config.removed_servers:
            continue
        if held is None or _is_given_again(held, server, present):
            told = as_told(server)
            runs = told.spec.power.state is PowerState.ON
            steps.append(ServerStep(act=Act.START if runs else Act.KEEP, server=told, epoch=server.epoch))
    asked = {server.spec.id: server for server in config.servers}
    for server_id, held in owned.items():
        if server_id in busy:
            continue
        vmm = present.get(VmmId(server_id, held.epoch))
        if server_id in config.removed_servers:
            steps.append(ServerStep(act=Act.REMOVE, server=held.server, epoch=held.epoch))
            continue
        if held.hold is Hold.OWNED and (step := _powered(held, asked.get(server_id), vmm)):
            steps.append(step)
        elif held.server.spec.power.state is not PowerState.ON:
            pass
        elif held.hold is Hold.OWNED and (vmm is None or vmm.state is RunState.CRASHED):
            steps.append(ServerStep(act=Act.RESTART, server=held.server, epoch=held.epoch))
        elif held.hold is Hold.OWNED and vmm is not None and _stands_still(vmm):
            steps.append(ServerStep(act=Act.RESUME, server=held.server, epoch=held.epoch))
    steps.extend(_strays(owned, present, busy))
    return tuple(steps)


def _is_given_again(held: Ownership, server: ServerConfig, present: Mapping[VmmId, VmmStatus]) -> bool:
    """It was another's meanwhile, and is off: a configuration names it by a newer epoch than the ledger's."""
    idle = held.hold is Hold.YIELDED or held.server.spec.power.state is not PowerState.ON
    return idle and server.epoch > held.epoch and VmmId(server.spec.id, held.epoch) not in present


def _powered(held: Ownership, asked: ServerConfig | None, vmm: VmmStatus | None) -> ServerStep | None:
    off = held.server.spec.power.state is not PowerState.ON
    if asked is None or asked.epoch != held.epoch:
        if off and vmm is None and asked is None:
            return ServerStep(act=Act.LET_GO, server=held.server, epoch=held.epoch)
        asked = held.server
    step = power_step(held.server, asked, vmm)
    if step is None:
        return None
    server = stopping(held.server, asked) if step is PowerStep.STOP else asked
    return ServerStep(act=Act.POWER, server=server, epoch=held.epoch, power=step)


def _stands_still(vmm: VmmStatus) -> bool:
    return vmm.state is RunState.PAUSED and not vmm.sent and not vmm.disk_problems


def _strays(
    owned: Mapping[ServerId, Ownership], present: Mapping[VmmId, VmmStatus], busy: frozenset[ServerId]
) -> Iterable[ServerStep]:
    for vmm in present:
        held = owned.get(vmm.server)
        if held is None or vmm.server in busy:
            continue
        if held.hold is Hold.YIELDED or vmm.epoch != held.epoch:
            yield ServerStep(act=Act.END_STRAY, server=held.server, epoch=vmm.epoch)


def pinned_ports(
    config: HostConfig, owned: Mapping[ServerId, Ownership], busy: frozenset[ServerId]
) -> frozenset[PortId]:
    """Ports whose place this host knows better than its configuration: their server takes part in an
    operation, or was handed over and the configuration does not say so yet."""
    ports = (p for network in config.networks for p in network.ports)
    return frozenset(p.id for p in ports if p.server in busy or _misplaced(p, config, owned))


def outdated(config: HostConfig, running: Iterable[MoveOrder]) -> bool:
    """Whether a move that has not ended here pins a port that has meanwhile gone to a third host: what this
    host sends to it goes to one of the move's two hosts, and one of them must go on passing it on."""
    places = {p.id: p.host for network in config.networks for p in network.ports}
    return any(
        places.get(port.id, order.source) not in (order.source, order.destination)
        for order in running
        for port in order.ports
    )


def _misplaced(port: PortConfig, config: HostConfig, owned: Mapping[ServerId, Ownership]) -> bool:
    held = owned.get(port.server)
    if held is None:
        return False
    return (held.hold is Hold.OWNED) != (port.host == config.host)


class Converger:
    """Makes one attempt each time it is asked; what failed is data for the report."""

    def __init__(self, context: Context, begin: Callable[[Journal], None], leases: Leases) -> None:
        self._context = context
        self._begin_operation = begin
        self._leases = leases
        self.generation = 0
        self.problems: tuple[ErrorRecord, ...] = ()
        self.drift: tuple[str, ...] = ()
        self.network: dict[str, str] = {}
        """What the network driver uses here, once it has said so."""
        self.why_no_post_copy: str | None = None
        """Likewise, of the hypervisor driver: kernels do not learn it while they run."""

    async def attempt(self) -> None:
        config = self._context.ledger.config()
        if config is None:
            return
        problems: list[ErrorRecord] = []
        drift = [*await self._collect(problems, self._volumes(config))]
        await self._context.calm()
        drift += await self._collect(problems, self._network(config))
        await self._context.calm()
        await self._policies(config, problems)
        await self._compute(config, await self._servers(config, problems), problems)
        await self._disks(config, problems)
        if drift and self.generation == config.generation:
            for text in drift:
                self._context.say("drift", self._context.settings.host, text)
            self.drift = (*self.drift, *drift)[-50:]
        self.problems = tuple(problems)
        if not self.network:
            self.network = await self._used()
        if self.why_no_post_copy is None:
            self.why_no_post_copy = await self._why_no_post_copy()
        running = [j.order for j in self._context.ledger.operations() if j.unended and j.order]
        if not problems and not outdated(config, running):
            self.generation = config.generation

    def busy(self) -> frozenset[ServerId]:
        moving = {j.server for j in self._context.ledger.operations() if j.unended and j.server}
        return frozenset(moving | self._context.freezes.keys())

    async def _collect(self, problems: list[ErrorRecord], act: Awaitable[tuple[str, ...]]) -> tuple[str, ...]:
        try:
            return await act
        except Exception as error:  # a bug in one part must not keep the others from being put right
            problems.append(ErrorRecord.of(self._context.error_of(error)))
            return ()

    async def _volumes(self, config: HostConfig) -> tuple[str, ...]:
        held = holds.held(self._context.ledger)
        found = await self._context.drivers.storage.reconcile(
            StorageDesired(
                volumes=holds.wanted(config.volumes, held),
                removed=config.removed_volumes,
                snapshots=config.snapshots,
                removed_snapshots=config.removed_snapshots,
                exports=config.snapshot_exports,
                release=config.storage_release,
                budget=config.disk_budget,
                pinned=self._pinned_volumes(config),
            )
        )
        holds.settle(self._context.ledger, config)
        return found

    def _pinned_volumes(self, config: HostConfig) -> frozenset[VolumeId]:
        """Those that take part in an operation, of this host or of another one."""
        unended = (j for j in self._context.ledger.operations() if j.unended)
        here = frozenset(volume for journal in unended for volume in journal.volumes)
        return here | frozenset(config.pinned_volumes)

    async def bring_network(self) -> None:
        """Only the network, at once; drift is not told."""
        config = self._context.ledger.config()
        if config is not None:
            await self._network(config)

    async def _network(self, told: HostConfig) -> tuple[str, ...]:
        async with self._context.paths:
            config = gateway_decisions.as_decided(told, self._context.ledger.operations())
            if self._leases.lapsed:
                config = gateway_decisions.silent(config)
            pinned = pinned_ports(config, self._context.ledger.ownership(), self.busy())
            return await self._context.drivers.network.reconcile(NetworkDesired(config=config, pinned=pinned))

    async def _why_no_post_copy(self) -> str | None:
        """Moves find it out by themselves: this is told so that none is planned in vain."""
        try:
            return await self._context.drivers.hypervisor.why_no_post_copy()
        except Exception:
            return None

    async def _used(self) -> dict[str, str]:
        """Only told to people: that it could not be found out keeps nothing from being put right."""
        try:
            return (await self._context.drivers.network.capabilities()).details
        except Exception:
            return {}

    async def _servers(self, config: HostConfig, problems: list[ErrorRecord]) -> tuple[VmmStatus, ...]:
        """As they were before."""
        vmms = await self._context.drivers.hypervisor.observe()
        for step in server_steps(config, self._context.ledger.ownership(), vmms, self.busy()):
            try:
                await self._take_step(config, step)
            except Exception as raised:  # nor one server's the other servers
                error = self._context.error_of(raised)
                problems.append(ErrorRecord.of(error))
                self._context.say("server.problem", step.server.spec.id, f"{step.act}: {error}")
        return vmms

    async def _policies(self, config: HostConfig, problems: list[ErrorRecord]) -> None:
        """What becomes of a server if this host fails: enforced first, then believed."""
        for wanted in config.servers:
            held = self._owned(wanted.spec.id)
            if held is None:
                continue
            new = with_policy(held.server, wanted)
            if new == held.server:
                continue
            try:
                await self._leases.adopt_policy(new.spec, held.epoch)
                now = self._context.ledger.owner(wanted.spec.id) or held
                self._context.ledger.adopt(with_policy(now.server, wanted))  # likewise
                self._context.changed()
            except Error as error:
                problems.append(ErrorRecord.of(error))

    async def _compute(
        self, config: HostConfig, found: Iterable[VmmStatus], problems: list[ErrorRecord]
    ) -> None:
        """Of servers that run: vCPUs, memory, their share of the processors. Each waits for its own guest."""
        vmms = {vmm.id: vmm for vmm in found}
        async with self._context.plugging, asyncio.TaskGroup() as group:
            for wanted in config.servers:
                held = self._owned(wanted.spec.id)
                vmm = vmms.get(VmmId(wanted.spec.id, held.epoch)) if held else None
                if held is not None and vmm is not None:
                    new = wanted_compute(wanted, held.server)
                    if new != held.server or not has(vmm, new):
                        group.create_task(self._give(vmm, new, problems))

    async def _give(self, vmm: VmmStatus, new: ServerConfig, problems: list[ErrorRecord]) -> None:
        server = new.spec.id
        try:
            if not has(vmm, new):
                for text in await self._context.drivers.hypervisor.compute_reconcile(vmm.id, new):
                    self._context.say("server.compute", server, text)
                    self._context.changed()
            held = self._owned(server)
            if held is not None and held.epoch == new.epoch:  # its disks may be reached otherwise by now
                self._context.ledger.adopt(wanted_compute(new, held.server))
        except Exception as raised:
            error = self._context.error_of(raised)
            problems.append(ErrorRecord.of(error))
            self._context.say("server.problem", server, f"compute: {error}")

    def _owned(self, server: ServerId) -> Ownership | None:
        """None also while an operation has it."""
        held = self._context.ledger.owner(server)
        return held if held and held.hold is Hold.OWNED and server not in self.busy() else None

    async def _disks(self, config: HostConfig, problems: list[ErrorRecord]) -> None:
        """Of servers that run: attached, detached, enlarged, limited, reached as the configuration says."""
        lost = lost_exports(self._context.ledger)
        for wanted in config.servers:
            server = wanted.spec.id
            held = self._context.ledger.owner(server)
            if held is None or held.hold is not Hold.OWNED or server in self.busy():
                continue
            new = wanted_disks(wanted, held.server, lost=lost, pinned=self._pinned_volumes(config))
            if new == held.server:
                continue
            if held.server.spec.power.state is not PowerState.ON:
                self._context.ledger.adopt(new)
                continue
            try:
                for text in await self._context.drivers.hypervisor.disks_reconcile(
                    VmmId(server, held.epoch), new
                ):
                    self._context.say("server.disk", server, text)
                if server not in self.busy() and self._context.ledger.owner(server) == held:
                    self._context.ledger.adopt(new)  # else what was said meanwhile holds, and the rest is due
            except Exception as raised:
                error = self._context.error_of(raised)
                problems.append(ErrorRecord.of(error))
                self._context.say("server.problem", server, f"disks: {error}")

    async def _take_step(self, config: HostConfig, step: ServerStep) -> None:
        server = step.server.spec.id
        if server in self.busy():
            return  # an operation began since this was decided
        match step.act:
            case Act.START | Act.RESTART:
                await self._start(config, step)
            case Act.RESUME:
                await self._context.drivers.hypervisor.resume(VmmId(server, step.epoch))
                self._context.say("server.resumed", server, "it stood still; resumed")
            case Act.REMOVE:
                await end_alike(self._context, step.server)
                await self._end(VmmId(server, step.epoch))
                for port in step.server.spec.ports:
                    await self._context.drivers.network.port_delete(port.id)
                await serial.forgotten(self._context, VmmId(server, step.epoch))
                self._context.ledger.disown(server)
                note_fresh(self._context.ledger, server, fresh=False)
                self._context.say("server.removed", server, "removed")
            case Act.END_STRAY:
                await self._end(VmmId(server, step.epoch))
                await self._context.drivers.hypervisor.console_forget(VmmId(server, step.epoch))
            case Act.KEEP:
                self._context.ledger.own(step.server)
                note_fresh(self._context.ledger, server, fresh=True)  # whoever stopped it saw to that
                self._context.say(
                    "server.kept", server, f"kept here while it is {step.server.spec.power.state}"
                )
            case Act.LET_GO:
                await serial.forgotten(self._context, VmmId(server, step.epoch))
                self._context.ledger.disown(server)
                self._context.say("server.let-go", server, "off, and another host's")
            case Act.POWER:
                await self._power(config, step)
        self._context.changed()

    async def _power(self, config: HostConfig, step: ServerStep) -> None:
        match step.power:
            case PowerStep.ADOPT:
                self._context.ledger.adopt(step.server)
            case PowerStep.BOOT:
                await self._start(config, step)
            case PowerStep.STOP:
                self._operate(OperationKind.STOP, step)
            case PowerStep.REBOOT:
                self._operate(OperationKind.REBOOT, step)
            case PowerStep.SUSPEND:
                self._operate(OperationKind.SUSPEND, step)
            case PowerStep.GO_ON:
                self._operate(OperationKind.RESUME, step)
            case None:
                pass

    def _operate(self, kind: OperationKind, step: ServerStep) -> None:
        """As an operation of its own: it may take its time, and convergence must not wait for it."""
        serial, server = step.server.spec.power.serial, step.server.spec.id
        failed = self._context.ledger.last_undone(server, kind)
        if failed is not None and self._context.now() < failed + AGAIN_SECONDS:
            return  # each attempt costs its guest a pause
        name = OperationId(f"{kind}-{step.server.spec.id}-{serial}-{round(self._context.now() * 1000)}")
        self._begin_operation(Journal(id=name, kind=kind, role=Role.HOST, power=step.server))

    async def _start(self, config: HostConfig, step: ServerStep) -> None:
        """Its disks are reached as the ledger says at the beginning; nobody says otherwise before the end."""
        starting, server = self._context.starting, step.server.spec.id
        starting.add(server)
        try:
            await self._start_with(config, step, self._as_reached(config, step))
        finally:
            starting.discard(server)

    def _as_reached(self, config: HostConfig, step: ServerStep) -> ServerConfig:
        """As it is to be started. Its step is older: a volume of it may have gone elsewhere, or a copy may
        have been lost, while what came before it was done."""
        held = self._context.ledger.owner(step.server.spec.id)
        if held is None or held.epoch != step.epoch:
            return step.server
        lost, pinned = lost_exports(self._context.ledger), self._pinned_volumes(config)
        wanted = held.server if step.act is Act.RESTART else step.server
        disks = wanted_disks(wanted, held.server, lost=lost, pinned=pinned)
        spec = msgspec.structs.replace(wanted.spec, data_volumes=disks.spec.data_volumes)
        return msgspec.structs.replace(
            wanted,
            spec=spec,
            volume=without(disks.volume, lost),
            data_volumes=tuple(without(each, lost) for each in disks.data_volumes),
        )

    async def _start_with(self, config: HostConfig, step: ServerStep, server: ServerConfig) -> None:
        if config.release is None:
            raise Refused(f"{config.host} has no hypervisor release", field="release")
        self._leases.check(server.spec)
        if step.power is PowerStep.BOOT:
            self._context.ledger.own(server)
            await self._end(VmmId(server.spec.id, step.epoch))
        elif step.act is Act.START:
            note_fresh(self._context.ledger, server.spec.id, fresh=server.epoch == 1)
            self._context.ledger.own(server)
        else:
            self._context.say("server.restart", server.spec.id, "its VMM was gone; started again")
            await self._end(VmmId(server.spec.id, step.epoch))
        for port in _ports_here(config, server):
            await self._context.drivers.network.port_create(
                port, self._context.network_of(port), deliver=True
            )
        server = await without_lost(self._context, server)
        await self._begin(server, config.release)
        self._context.say("server.started", server.spec.id, f"started by release {config.release}")

    async def _begin(self, server: ServerConfig, release: ReleaseId) -> None:
        """On one copy of each volume, unless the server never ran: two could differ."""
        ledger, fresh = self._context.ledger, never_ran(self._context.ledger, server.spec.id)
        if not fresh:
            server = await on_one_copy(self._context, server)
        await self._context.drivers.storage.reach_alone(server.all_volumes)
        note_fresh(ledger, server.spec.id, fresh=False)
        try:
            await self._context.drivers.hypervisor.start(server, release)
        except (Refused, NotFound):  # nothing was begun
            note_fresh(ledger, server.spec.id, fresh=fresh)
            raise

    async def _end(self, vmm: VmmId) -> None:
        await self._context.drivers.hypervisor.kill(vmm)


def _ports_here(config: HostConfig, server: ServerConfig) -> tuple[PortConfig, ...]:
    wanted = {p.id for p in server.spec.ports}
    ports = tuple(p for network in config.networks for p in network.ports if p.id in wanted)
    if len(ports) != len(wanted):
        raise Refused(f"{server.spec.id} has a port in no configured network", field="ports")
    return ports
