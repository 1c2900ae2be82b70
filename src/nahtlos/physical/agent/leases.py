"""A host's lease, and what it grants to others: who may run what shall be restarted when its host fails.

    ask every member, again and again --granted--> a majority's asking time + seconds --> supervisor

The supervisor ends what runs under the lease when the deadline passes, whether or not this process is still
there to see it, and its keeper does if the supervisor is not there either. An edge host keeps a lease, too:
without it, its ways out do not answer. Without terms (too few hosts) there is no deadline, but what needs a
lease is started only after the orchestrator has been heard since the host was booted: it may have been passed
over meanwhile.
Never decides that another host has failed: it only stops granting when the configuration says so, which is
durable, and says for how long it has.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from nahtlos.model.availability import (
    DenialStatus,
    LeaseTerms,
    OnHostFailure,
    Standing,
    lease_until,
)
from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.model.nouns import HostRole, ServerSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.ports import VmmId
from nahtlos.wire.messages import LeaseAsk, LeaseGranted
from nahtlos.wire.volumes import PeerAddress

ROUNDS = 8
"""So often members are asked while a lease lasts."""
LONGEST_ROUND = 3.0
TOLD = "lease.told"
"""The boot in which the orchestrator was last heard."""


class Leases:
    """One task owns it (`run`); others only ask."""

    def __init__(self, context: Context, boot_id: str) -> None:
        self._context = context
        self._boot_id = boot_id
        self._granted: dict[HostId, float] = {}
        self._news = asyncio.Event()
        self._kept: LeaseTerms | None = None
        self._until = -math.inf
        self._enforced = False
        """The supervisor has been armed by this process."""
        self._heard: dict[HostId, float] = {}
        """Until when each counts as heard."""
        self._denied_since: dict[tuple[HostId, int], float] = {}
        self._said = ""
        self._began: float | None = None
        """When this process first asked under the terms it has."""
        self.on_lapse: Callable[[], Awaitable[None]] = _nothing
        """What is done when `lapsed` changes."""

    # --- what others ask ---

    @property
    def enforced(self) -> bool:
        return self._enforced

    @property
    def held(self) -> bool:
        return self._clock() < self._until

    @property
    def lapsed(self) -> bool:
        """There are terms and no lease, and an agent that was just started has had time to get one."""
        terms = self._terms()
        if terms is None or self._began is None:
            return False
        return self._clock() >= max(self._until, self._began + terms.seconds)

    def check(self, spec: ServerSpec) -> None:
        """Unavailable while `spec` must not be started here."""
        if spec.on_host_failure is not OnHostFailure.RESTART or self.held:
            return
        config = self._context.ledger.config()
        if config is not None and config.lease is not None:
            needs = ", ".join(m for m in config.lease.members if m != self._context.settings.host)
            raise Unavailable(
                f"{spec.id} runs only while this host has its lease, which most of {needs} must grant",
                field="lease",
                remedy="it may have been restarted elsewhere; it goes on once they are reached",
            )
        raise Unavailable(
            f"{spec.id} waits for the orchestrator: it may have been restarted elsewhere meanwhile",
            field="lease",
        )

    def standing(self) -> Standing:
        now, config = self._clock(), self._context.ledger.config()
        denials = config.denials if config else ()
        return Standing(
            terms=self._kept,
            held=self.held,
            heard=tuple(sorted(host for host, until in self._heard.items() if now < until)),
            denials=tuple(
                DenialStatus(host=d.host, term=d.term, ripe=now >= self._since(d.host, d.term) + d.seconds)
                for d in denials
            ),
        )

    def answer(self, body: LeaseAsk, peer: str) -> LeaseGranted:
        """Refused while `peer` is denied, or is no host of this cloud."""
        host, config = HostId(peer.removeprefix("host/")), self._context.ledger.config()
        if config is None or all(spec.id != host for spec in config.hosts):
            raise Refused(f"{peer} is no host that is known here", field="host")
        if any(denial.host == host for denial in config.denials):
            raise Refused(f"{host} is denied its lease", field="host")
        self._heard[host] = self._clock() + body.seconds / 2
        return LeaseGranted()

    def configured(self) -> None:
        """The orchestrator has spoken: its configuration is held."""
        config = self._context.ledger.config()
        for denial in config.denials if config else ():
            self._since(denial.host, denial.term)
        known = self._context.ledger.facts(TOLD).get(TOLD)
        if known != self._boot_id.encode():
            self._context.ledger.remember("lease told", {TOLD: self._boot_id.encode()})
        self._news.set()

    async def adopt_policy(self, server: ServerSpec, epoch: int) -> None:
        """Its VMM needs a lease from here on, or none any more."""
        needs = server.on_host_failure is OnHostFailure.RESTART
        await self._arm(self._until, {VmmId(server.id, epoch).unit: needs})

    # --- one's own ---

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            config = self._context.ledger.config()
            terms = config.lease if config else None
            if terms is not None:
                await self._keep(terms)
            elif self._context.settings.role is HostRole.COMPUTE:
                await self._keep_none()
            else:
                await self._wait(LONGEST_ROUND)

    async def _keep_none(self) -> None:
        """While there are no terms."""
        while (config := self._context.ledger.config()) is None or config.lease is None:
            if self._context.ledger.facts(TOLD).get(TOLD) == self._boot_id.encode():
                await self._try_to_hold(None, math.inf)
            await self._wait(LONGEST_ROUND)

    async def _keep(self, terms: LeaseTerms) -> None:
        """While these are the terms."""
        self._granted.clear()
        self._began = self._clock() if self._began is None else self._began
        lapsed = self.lapsed
        async with asyncio.TaskGroup() as tasks:
            others = [m for m in terms.members if m != self._context.settings.host]
            asking = [tasks.create_task(self._ask(member, terms)) for member in others]
            try:
                while self._terms() == terms:
                    until = lease_until(terms, self._granted)
                    if until > self._clock() and (until > self._until or self._kept != terms):
                        await self._try_to_hold(terms, until)
                    if lapsed != self.lapsed:
                        lapsed = self.lapsed
                        await self._tell_of_lapse()
                    await self._wait(_round(terms))
            finally:
                for task in asking:
                    task.cancel()

    def _terms(self) -> LeaseTerms | None:
        config = self._context.ledger.config()
        return config.lease if config else None

    async def _tell_of_lapse(self) -> None:
        """What fails now is done again when the host converges."""
        try:
            await self.on_lapse()
        except Exception as raised:
            error = self._context.error_of(raised)
            self._context.say("lease.trouble", self._context.settings.host, str(error))

    async def _try_to_hold(self, terms: LeaseTerms | None, until: float) -> None:
        """A supervisor that does not answer is asked again in the next round."""
        try:
            await self._hold(terms, until)
            self._said = ""
        except Error as error:
            self._enforced = False
            host = self._context.settings.host
            self._said = self._context.say_anew("lease.trouble", host, str(error), last=self._said)

    async def _hold(self, terms: LeaseTerms | None, until: float) -> None:
        """Told only once it is enforced."""
        before = self.held
        leased = {
            VmmId(server, held.epoch).unit: held.server.spec.on_host_failure is OnHostFailure.RESTART
            for server, held in self._context.ledger.ownership().items()
            if held.hold is Hold.OWNED
        }
        await self._arm(until, leased)
        self._until = until
        self._kept, self._enforced = terms, True
        if not before:
            self._context.changed()

    async def _arm(self, until: float, leased: dict[str, bool]) -> None:
        deadline = None if until == math.inf else max(until, 0.0)
        await self._context.drivers.supervisor.arm(deadline, leased)

    async def _ask(self, member: HostId, terms: LeaseTerms) -> None:
        """One member, again and again."""
        line: Peer | None = None
        try:
            while True:
                at = self._clock()
                try:
                    line = line or self._line(member)
                    ask = LeaseAsk(seconds=terms.seconds)
                    await line.ask(ask, LeaseGranted, timeout=terms.seconds / 4)
                    self._granted[member] = at
                    self._news.set()
                except Error:
                    if line is not None:
                        await line.close()
                    line = None
                await asyncio.sleep(_round(terms))
        finally:
            if line is not None:
                await line.close()

    def _line(self, member: HostId) -> Peer:
        config = self._context.ledger.config()
        for spec in config.hosts if config else ():
            if spec.id == member:
                at = PeerAddress(host=spec.id, address=spec.address, peer_port=spec.peer_port)
                return Peer(self._context, at)
        raise Unavailable(f"{member} is no host that is known here")

    async def _wait(self, seconds: float) -> None:
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            pass

    def _since(self, host: HostId, term: int) -> float:
        """When this process first knew that it denies `host`: not later than it may believe."""
        known = self._denied_since.get((host, term))
        if known is None:
            known = self._denied_since[host, term] = self._clock()
        return known

    def _clock(self) -> float:
        return self._context.drivers.supervisor.clock()


async def _nothing() -> None:
    pass


def _round(terms: LeaseTerms) -> float:
    return min(terms.seconds / ROUNDS, LONGEST_ROUND)
