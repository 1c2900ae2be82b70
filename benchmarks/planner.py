"""How long the planner takes for a large cloud, and how many moves it decides on.

The cloud is made up and converged: servers of mixed sizes on hosts filled to about 70 %. No host, network or
process is touched. `python -m benchmarks.planner`
"""

import sys
import time
from collections.abc import Callable
from random import Random
from statistics import median

import msgspec

from benchmarks.figures import Figures, Goal
from nahtlos.model.blueprint import Blueprint, Campaign, CampaignState, Policy
from nahtlos.model.ids import CampaignId, HostId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import HostInventory, Inventory, RunState, ServerStatus
from nahtlos.model.nouns import HostRole, HostSpec, ServerSpec, Size
from nahtlos.planner.plan import plan
from nahtlos.planner.predict import forecast

OLD, NEW = ReleaseId("qemu-10"), ReleaseId("qemu-11")
SIZES = ((1, 1024), (1, 2048), (2, 4096), (4, 8192))
REPEATS = 7


class LargeCloud:
    """Hosts with the same capacity, servers of mixed sizes, everything where it was decided."""

    def __init__(self, hosts: int, servers: int, *, seed: int = 1) -> None:
        chance = Random(seed)
        names = [HostId(f"host-{number:03}") for number in range(hosts)]
        specs = [_server(number, *chance.choice(SIZES)) for number in range(servers)]
        total = Size()
        for spec in specs:
            total += spec.size
        self.capacity = Size(
            vcpus=int(total.vcpus / hosts / 0.7) + 4, memory_mib=int(total.memory_mib / hosts / 0.7) + 8192
        )
        self.promised = total
        self.policy = Policy(
            hosts={name: HostSpec(id=name, role=HostRole.COMPUTE, address="", peer_port=1) for name in names},
            intents={},
            servers={spec.id: spec for spec in specs},
            release=OLD,
            promised=total,
            parallel_moves=4,
        )

    def empty(self) -> Inventory:
        return self.seen(None)

    def seen(self, blueprint: Blueprint | None) -> Inventory:
        statuses: dict[HostId, list[ServerStatus]] = {name: [] for name in self.policy.hosts}
        for server, owner in (blueprint.servers if blueprint else {}).items():
            size = self.policy.servers[server].size
            statuses[owner.host].append(
                ServerStatus(id=server, epoch=owner.epoch, state=RunState.RUNNING, release=OLD, size=size)
            )
        return Inventory(
            hosts={name: self._host(name, tuple(found)) for name, found in statuses.items()},
            connected=frozenset(statuses),
        )

    def _host(self, name: HostId, servers: tuple[ServerStatus, ...]) -> HostInventory:
        return HostInventory(
            host=name,
            role=HostRole.COMPUTE,
            boot_id="",
            agent_version="",
            taken_at=0.0,
            generation=1,
            target_generation=1,
            capacity=self.capacity,
            releases=(OLD, NEW),
            verified_release=OLD,
            servers=servers,
        )

    def campaign(self) -> Policy:
        campaign = Campaign(
            id=CampaignId("c"), to_release=NEW, hosts=tuple(self.policy.hosts), state=CampaignState.RUNNING
        )
        return msgspec.structs.replace(self.policy, campaign=campaign)


def _server(number: int, vcpus: int, memory_mib: int) -> ServerSpec:
    name = ServerId(f"vm-{number:04}")
    size = Size(vcpus=vcpus, memory_mib=memory_mib)
    return ServerSpec(id=name, size=size, volume=VolumeId(name), ports=(), machine="pc-q35-10.0")


def milliseconds(act: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of `repeats`, after one that does not count."""
    act()
    taken: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        taken.append((time.perf_counter() - begun) * 1000)
    return median(taken)


def measure(figures: Figures, hosts: int, servers: int) -> None:
    cloud, label = LargeCloud(hosts, servers), f"{hosts} hosts / {servers} servers"
    placed, _ = plan(cloud.policy, cloud.empty(), None)
    assert len(placed.servers) == servers, "not every server found a place"
    seen, campaign = cloud.seen(placed), cloud.campaign()
    started, _ = plan(campaign, seen, placed)
    second = Goal(at_most=1000.0)
    calls: dict[str, Callable[[], object]] = {
        "first blueprint, every server new": lambda: plan(cloud.policy, cloud.empty(), None),
        "plan of a converged cloud": lambda: plan(cloud.policy, seen, placed),
        "plan that begins a campaign": lambda: plan(campaign, seen, placed),
        "plan in a campaign": lambda: plan(campaign, seen, started),
    }
    for name, call in calls.items():
        figures.add(f"{name}, {label}", milliseconds(call), "ms", goal=second, samples=REPEATS)
    begun = time.perf_counter()
    found = forecast(cloud.policy, seen, placed, NEW)
    figures.add(f"dry run of a whole campaign, {label}", time.perf_counter() - begun, "s")
    assert len(found.hosts) == hosts, f"the campaign does not reach every host: {found.blockers[:3]}"
    figures.add(
        f"moves per server, {label}",
        found.moves_per_server,
        "moves",
        goal=Goal(at_most=1.35),
        samples=servers,
    )
    figures.add(f"capacity floor, {label}", found.capacity_floor, "share", goal=Goal(at_least=1.0))


def main() -> int:
    figures = Figures()
    for hosts, servers in ((3, 6), (20, 200), (200, 2000)):
        measure(figures, hosts, servers)
    return figures.finish("planner", "Planner")


if __name__ == "__main__":
    sys.exit(main())
