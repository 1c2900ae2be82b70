"""One host, the members of its lease and an orchestrator, in steps of a tenth of a second under a seed.

Messages are late or lost, links are cut in one direction, agents freeze and are killed, the host loses power
and returns, its supervisor dies with the link alive or cut, orchestrators follow each other and what the last
one has said still arrives, clocks run at different rates. Decisions are those of the product
(`model.availability`, `planner.failure`); what is simple here is the world. Whole clouds, with moves and
replacements on their way, are played by `failure_storms`.

    python tests/simulation/lease_rounds.py FIRST..LAST
"""

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from nahtlos.model.availability import (
    DRIFT,
    Denial,
    DenialStatus,
    LeaseTerms,
    Standing,
    denial_seconds,
    lease_until,
)
from nahtlos.model.blueprint import HostPhase, HostPlan, Policy
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import HostInventory, Inventory
from nahtlos.model.nouns import HostRole, Size
from nahtlos.planner.failure import proof

STEP = 0.1
SECONDS = 150.0
CALM = 90.0
"""From then on nothing goes wrong any more."""
LEASE = 6.0
LOST = 4.0
ORCHESTRATOR = "orchestrator"
HOST = HostId("host-1")
NOBODY = Policy(hosts={}, intents={}, servers={})


@dataclass
class Party:
    name: str
    rate: float = 1.0
    alive: bool = True
    frozen_until: float = 0.0
    wakes_at: float = 0.0
    denies: Denial | None = None
    """Durable."""
    denies_since: float | None = None
    """By its clock, of this process."""
    obeys: tuple[int, int] = (0, 0)
    """Durable: the orchestrator's epoch and the generation of the configuration it holds."""

    def works(self, now: float) -> bool:
        return self.alive and now >= self.frozen_until


@dataclass
class Round:
    seed: int
    impatient: bool = False
    """The orchestrator takes a denial for ripe at once: what must be found out."""
    kept: bool = True
    """False: a supervisor that is dead has no keeper beside it. Likewise."""
    violations: list[str] = field(default_factory=list[str])
    restarted_at: float | None = None

    def __post_init__(self) -> None:
        self.chance = random.Random(f"lease {self.seed}")
        count = self.chance.choice((3, 3, 4, 5))
        self.members = tuple(HostId(f"host-{n + 1}") for n in range(count))
        self.terms = LeaseTerms(members=self.members, seconds=LEASE)
        self.parties: dict[str, Party] = {
            name: Party(name, rate=1 + self.chance.uniform(-DRIFT, DRIFT)) for name in self.members
        }
        self.parties[ORCHESTRATOR] = Party(ORCHESTRATOR)
        self.cuts: dict[tuple[str, str], float] = {}
        self.mail: list[tuple[float, str, Callable[[float], None]]] = []
        self.granted: dict[HostId, float] = {}
        self.deadline = 0.0
        self.killed_by: float | None = None
        self.runs = False
        self.passed = False
        """The host has learned, durably, that it was passed over."""
        self.plan = HostPlan(phase=HostPhase.SERVING, release=None, lease=self.terms, lease_kept=self.terms)
        self.said: dict[HostId, tuple[DenialStatus, ...]] = {}
        self.heard_at = dict.fromkeys(self.members, 0.0)
        self.next_ask = self.next_report = 0.0
        self.supervised_from = 0.0
        """The host's supervisor is dead until then."""
        self.epoch = self.generation = 1

    def clock(self, name: str, now: float) -> float:
        return now * self.parties[name].rate

    def send(self, now: float, sender: str, to: str, act: Callable[[float], None]) -> None:
        if now < self.cuts.get((sender, to), 0.0) or self.chance.random() < 0.03:
            return
        late = self.chance.uniform(0.0, 0.3) if self.chance.random() < 0.9 else self.chance.uniform(0, 8)
        self.mail.append((now + late, to, act))

    # --- the run ---

    def play(self) -> "Round":
        now = 0.0
        while now < SECONDS and not self.violations:
            if now < CALM:
                self.trouble(now)
            self.deliver(now)
            self.host(now)
            self.orchestrator(now)
            if self.runs and self.restarted_at is not None:
                self.violations.append(f"seed {self.seed}: two copies at {now:.1f}")
            now += STEP
        return self

    def trouble(self, now: float) -> None:
        chance = self.chance
        if chance.random() < 0.01:
            one, other = chance.sample(sorted(self.parties), 2)
            until = now + chance.choice((1.0, 5.0, 20.0, 60.0))
            self.cuts[one, other] = until
            if chance.random() < 0.5:
                self.cuts[other, one] = until
        if chance.random() < 0.004:
            until = now + chance.choice((3.0, 15.0, 40.0))
            for other in self.parties:
                self.cuts[HOST, other] = self.cuts[other, HOST] = until
        if chance.random() < 0.006:
            party = self.parties[chance.choice(self.members)]
            party.frozen_until = now + chance.uniform(0.5, 15.0)
        if chance.random() < 0.004:
            party = self.parties[chance.choice(self.members)]
            party.denies_since = None  # its agent is started again
            if party.name == HOST:
                self.granted.clear()
        if chance.random() < 0.004:
            self.supervised_from = until = now + chance.choice((2.0, 10.0, 40.0))
            if chance.random() < 0.5:
                for other in self.parties:
                    self.cuts[HOST, other] = self.cuts[other, HOST] = until
        if chance.random() < 0.006:
            self.next_orchestrator(now)
        if chance.random() < 0.002:
            host = self.parties[HOST]
            host.alive, host.wakes_at = False, now + chance.uniform(2.0, 40.0)
            self.runs, self.deadline, self.killed_by = False, 0.0, None
            self.granted.clear()

    def next_orchestrator(self, now: float) -> None:
        """It knows what is stored, and nobody has reported to it yet."""
        self.epoch += 1
        self.said.clear()
        self.heard_at = dict.fromkeys(self.members, now)

    def deliver(self, now: float) -> None:
        due = [m for m in self.mail if m[0] <= now and self.parties[m[1]].works(now)]
        dead = [m for m in self.mail if not self.parties[m[1]].alive]
        self.mail = [m for m in self.mail if m not in due and m not in dead]
        for _, _, act in due:
            act(now)

    # --- the host and its members ---

    def host(self, now: float) -> None:
        host, clock = self.parties[HOST], self.clock(HOST, now)
        if not host.alive:
            host.alive = now >= host.wakes_at
            return
        supervised = now >= self.supervised_from
        if self.runs and clock >= self.deadline and (supervised or self.kept):  # by either, within a second
            self.killed_by = self.killed_by or now + self.chance.uniform(0.0, 1.0)
            if now >= self.killed_by:
                self.runs, self.killed_by = False, None
        if not host.works(now):
            return
        if now >= self.next_ask:
            self.next_ask = now + LEASE / 8
            for member in self.members[1:]:
                self.send(now, HOST, member, lambda at, m=member, asked=clock: self.asked(at, m, asked))
        until = lease_until(self.terms, self.granted)
        if until != -math.inf and supervised:
            self.deadline = max(self.deadline, until)
        if clock < self.deadline and supervised:
            self.killed_by = None
            self.runs = self.runs or not self.passed

    def asked(self, now: float, member: HostId, asked: float) -> None:
        if self.parties[member].denies is None:
            self.send(now, member, HOST, lambda _, m=member: self.granted_by(m, asked))

    def granted_by(self, member: HostId, asked: float) -> None:
        self.granted[member] = max(asked, self.granted.get(member, -math.inf))

    # --- the orchestrator ---

    def orchestrator(self, now: float) -> None:
        if now >= self.next_report:
            self.next_report = now + 0.5
            for member in self.members:
                self.report(now, member)
            self.tell(now)
        lost = now - self.heard_at[HOST] > LOST
        if lost and self.plan.denial is None and self.restarted_at is None:
            denial = Denial(host=HOST, term=1, seconds=denial_seconds((self.terms,)))
            self.plan = HostPlan(
                phase=HostPhase.SERVING,
                release=None,
                lease=self.terms,
                lease_kept=self.terms,
                denial=denial,
                denial_terms=1,
            )
            self.generation += 1
        if (
            lost
            and self.restarted_at is None
            and proof(Policy(hosts={}, intents={}, servers={}), self.inventory(), HOST, self.plan)
        ):
            self.restarted_at = now
            self.generation += 1

    def report(self, now: float, member: HostId) -> None:
        party = self.parties[member]
        if not party.works(now):
            return
        said: tuple[DenialStatus, ...] = ()
        if party.denies is not None:
            party.denies_since = (
                party.denies_since if party.denies_since is not None else self.clock(member, now)
            )
            ripe = self.clock(member, now) >= party.denies_since + party.denies.seconds
            said = (DenialStatus(host=HOST, term=party.denies.term, ripe=ripe or self.impatient),)
        knows, epoch = self.passed, self.epoch

        def take(at: float) -> None:
            if epoch != self.epoch:
                return  # it was said to the one before
            self.said[member] = said
            self.heard_at[member] = at
            if member == HOST and self.restarted_at is not None and knows and self.plan.denial is not None:
                self.generation += 1
                self.plan = HostPlan(
                    phase=HostPhase.SERVING, release=None, lease=self.terms, lease_kept=self.terms
                )

        self.send(now, member, ORCHESTRATOR, take)

    def tell(self, now: float) -> None:
        """Each its whole configuration, again and again; an agent takes no older one than it has."""
        denial, passed = self.plan.denial, self.restarted_at is not None
        told = (self.epoch, self.generation)
        for member in self.members:

            def accept(_: float, m: HostId = member) -> None:
                party = self.parties[m]
                if told < party.obeys or told[1] < party.obeys[1]:
                    return
                party.obeys, party.denies = told, denial
                if denial is None:
                    party.denies_since = None
                if m == HOST and passed:
                    self.passed = True

            self.send(now, ORCHESTRATOR, member, accept)

    def inventory(self) -> Inventory:
        hosts = {
            member: HostInventory(
                host=member,
                role=HostRole.COMPUTE,
                boot_id="",
                agent_version="",
                taken_at=0.0,
                generation=1,
                target_generation=1,
                capacity=Size(),
                standing=Standing(denials=said),
            )
            for member, said in self.said.items()
        }
        return Inventory(hosts=hosts, connected=frozenset(hosts))


def main(which: str) -> int:
    first, _, last = which.partition("..")
    rounds = [Round(seed).play() for seed in range(int(first), int(last or first) + 1)]
    failed = [line for each in rounds for line in each.violations]
    restarted = sum(each.restarted_at is not None for each in rounds)
    print("\n".join(failed))
    print(f"{len(rounds)} seeds, {restarted} restarts, {len(failed)} with two copies")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
