"""Whether a campaign can be begun as it is asked for, and which releases must stay. Pure; every refusal names
the field and the remedy."""

from collections.abc import Sequence

from nahtlos.model.blueprint import Strategy
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ReleaseId
from nahtlos.model.nouns import Component, Release
from nahtlos.planner.replace import reported
from nahtlos.planner.upgrade import has
from nahtlos.runtime.controllers.requests import compute_host, known_host, listed
from nahtlos.runtime.controllers.state import State


def upgrade_hosts(
    state: State, hosts: Sequence[HostId] | None, component: Component = Component.HYPERVISOR
) -> tuple[HostId, ...]:
    if hosts is None:
        found = [h for h, row in state.hosts.items() if has(row.spec.role, component)]
    elif component is Component.NETWORK:
        found = [known_host(state, host, "hosts") for host in hosts]
    else:
        found = [compute_host(state, host, "hosts") for host in hosts]
    if not found:
        raise Refused("no host to upgrade", field="hosts", remedy="join compute hosts first")
    return tuple(sorted(set(found)))


def check_upgrade(
    state: State,
    release: Release,
    hosts: Sequence[HostId],
    component: Component = Component.HYPERVISOR,
    strategy: Strategy = Strategy.AUTO,
) -> None:
    if component is not Component.HYPERVISOR and strategy is not Strategy.AUTO:
        raise Refused(
            f"{component} is replaced under servers that stay where they are",
            field="strategy",
            remedy="leave --strategy out",
        )
    if release.component is not component.released_as:
        raise Refused(
            f"{release.id} is a release of {release.component}, which {component} is not taken from",
            field="to",
            remedy=f"name one of {component.released_as}: nahtlos release list",
        )
    plans = state.blueprint.hosts if state.blueprint else {}
    if all(host in plans and plans[host].release_of(component) == release.id for host in hosts):
        raise Refused(
            f"{listed(hosts)} {'has' if len(hosts) == 1 else 'have'} {release.id} already",
            field="to",
            remedy="nothing is left to do",
        )
    if component is not Component.HYPERVISOR:
        return
    for server, row in sorted(state.servers.items()):
        if row.removed_at is None and row.spec.machine not in release.machine_types:
            raise Refused(
                f"{release.id} cannot run {server}: it lacks the machine type {row.spec.machine}",
                field="to",
                remedy=f"choose a release that has it, or delete {server}",
            )


def releases_in_use(
    state: State, hosts: Sequence[HostId], component: Component = Component.HYPERVISOR
) -> tuple[ReleaseId, ...]:
    """As decided; what was never decided, as seen."""
    plans = state.blueprint.hosts if state.blueprint else {}
    found = {plans[host].release_of(component) for host in hosts if host in plans}
    if component is not Component.HYPERVISOR:
        seen = (state.inventories.get(h) for h in hosts if h in plans and not plans[h].release_of(component))
        found |= {reported(inventory, component) for inventory in seen if inventory is not None}
    return tuple(sorted(release for release in found if release is not None))
