"""Safety of a step from one blueprint to the next, checked apart from how it was decided.

A violation is a bug of the planner, never of its input: `check` raises AssertionError with all of them.
What the world does by itself (a host that shrank under its servers) is none; making it worse is.
"""

from collections.abc import Iterator

from nahtlos.model.blueprint import Blueprint, HostIntent, HostPhase, PlannedMove, Policy
from nahtlos.model.ids import BlueprintId, HostId, ServerId
from nahtlos.model.inventory import Inventory, OperationState
from nahtlos.model.nouns import Assignment, Component, HostRole, Size
from nahtlos.model.placement import GroupPolicy
from nahtlos.model.power import PowerState
from nahtlos.planner.draft import Observed, number_of
from nahtlos.planner.failure import proof
from nahtlos.planner.outcome import ended
from nahtlos.planner.volume_check import volume_violations

EMPTY = Blueprint(id=BlueprintId("bp-0"), parent=None, hosts={}, servers={})


def check(policy: Policy, inventory: Inventory, parent: Blueprint | None, child: Blueprint) -> None:
    if child is parent:
        return
    found = violations(policy, inventory, parent, child)
    if found:
        raise AssertionError("\n".join((f"{child.id} is unsafe:", *found)))


def violations(
    policy: Policy, inventory: Inventory, parent: Blueprint | None, child: Blueprint
) -> tuple[str, ...]:
    before = parent or EMPTY
    observed = Observed(inventory)
    return (
        *_chain(parent, child),
        *_owners(before, child),
        *_handed_over(observed, before, child),
        *_off(policy, observed, before, child),
        *_operations(observed, before, child),
        *_moves(policy, before, child),
        *_switching(observed, before, child),
        *_one_at_a_time(policy, child),
        *_room(policy, inventory, before, child),
        *_groups(policy, before, child),
        *_pins(policy, before, child),
        *volume_violations(policy, before, child),
        *_gateways(observed, before, child),
        *_fences(policy, inventory, before, child),
    )


def _chain(parent: Blueprint | None, child: Blueprint) -> Iterator[str]:
    if child.parent != (parent.id if parent else None):
        yield f"its parent is {child.parent}, not the blueprint it follows"
    if number_of(child.id) != (number_of(parent.id) if parent else 0) + 1:
        yield f"{child.id} does not follow {parent.id if parent else 'nothing'} by one"
    if parent and child.counter < parent.counter:
        yield "operation numbers go back"


def _owners(before: Blueprint, child: Blueprint) -> Iterator[str]:
    for server, assignment in child.servers.items():
        if assignment.server != server:
            yield f"{server} is assigned as {assignment.server}"
        if assignment.host not in child.hosts:
            yield f"{server} is owned by {assignment.host}, which is no host"
        old = before.servers.get(server)
        if old is not None and assignment.epoch < old.epoch:
            yield f"{server} goes back from epoch {old.epoch} to {assignment.epoch}"


def _handed_over(observed: Observed, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """Ownership changes by a move that is seen to be done, or because its host is fenced; of servers that are
    off, one epoch at a time."""
    done = {
        (move.server, move.source, move.destination, move.epoch)
        for move in before.moves
        if (status := ended(observed, move.id, (move.source, move.destination)))
        and status.state is OperationState.DONE
    }
    for server, new in child.servers.items():
        old = before.servers.get(server)
        if old is not None and server in before.off and new.epoch == old.epoch + 1:
            continue
        if old is None or old == new or _is_restarted(before, child, old, new):
            continue
        if (server, old.host, new.host, new.epoch) not in done:
            yield f"{server} changes owner from {old.host} to {new.host} without a move that is done"


def _off(policy: Policy, observed: Observed, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """A server is off only once its owner has said that it has carried out the newest request."""
    for server, serial in child.off.items():
        owner, spec = child.servers.get(server), policy.servers.get(server)
        if owner is None:
            yield f"{server} is off and nobody's"
        if any(move.server == server for move in child.moves):
            yield f"{server} is off and moves"
        if server in before.off:
            continue
        seen = observed.server_on(server, owner.host) if owner else None
        if spec is None or seen is None or (seen.epoch, seen.power) != (owner.epoch if owner else 0, serial):
            yield f"{server} is off although it was not seen to be"
        elif spec.power.serial != serial or spec.power.state is PowerState.ON:
            yield f"{server} is off although it was not asked to be by {serial}"


def _is_restarted(before: Blueprint, child: Blueprint, old: Assignment, new: Assignment) -> bool:
    """From a host that is fenced, which will learn it, and without a move whose other side has a say."""
    plan = child.hosts.get(old.host)
    told = child.passed_over.get(old.host, {}).get(new.server)
    moved = any(move.server == new.server and not move.in_place for move in (*before.moves, *child.moves))
    fenced = plan is not None and bool(plan.fenced)
    return fenced and told == new.epoch > old.epoch and new.host != old.host and not moved


def _fences(policy: Policy, inventory: Inventory, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """A host is fenced by a proof, and stays denied until it knows what it was passed over for."""
    for host, plan in child.hosts.items():
        old = before.hosts.get(host)
        if plan.fenced and not (old is not None and old.fenced) and not proof(policy, inventory, host, plan):
            yield f"{host} is called fenced without a proof"
        if plan.fenced and plan.denial is None:
            yield f"{host} is fenced and not denied"
        if child.passed_over.get(host) and plan.denial is None:
            yield f"{host} is granted a lease before it knows what it was passed over for"
        if old is not None and old.denial and plan.denial is None and host not in inventory.connected:
            yield f"the denial of {host} is lifted before it is back"


def _operations(observed: Observed, before: Blueprint, child: Blueprint) -> Iterator[str]:
    old = {**{move.id: move for move in before.moves}, **{verify.id: verify for verify in before.verifies}}
    new = {**{move.id: move for move in child.moves}, **{verify.id: verify for verify in child.verifies}}
    if len(new) != len(child.moves) + len(child.verifies):
        yield "two operations share an id"
    for operation, was in old.items():
        hosts = (was.source, was.destination) if isinstance(was, PlannedMove) else (was.host,)
        if isinstance(was, PlannedMove) and was.in_place and _is_passed_over(child, was):
            continue
        if operation not in new and ended(observed, operation, hosts) is None:
            yield f"{operation} is dropped although its end was not seen"
        if operation in new and new[operation] != was:
            yield f"{operation} is altered after it was decided"
    for operation in new.keys() - old.keys():
        if int(operation.rpartition("-")[2]) <= before.counter:
            yield f"the id {operation} is used again"


def _is_passed_over(child: Blueprint, move: PlannedMove) -> bool:
    return child.passed_over.get(move.source, {}).get(move.server, 0) > move.epoch


def _moves(policy: Policy, before: Blueprint, child: Blueprint) -> Iterator[str]:
    if len({move.server for move in child.moves}) != len(child.moves):
        yield "a server has two moves"
    begun = {move.id for move in before.moves}
    for move in child.moves:
        owner = child.servers.get(move.server)
        if owner is None or owner.host != move.source or move.epoch != owner.epoch + 1:
            yield f"{move.id} does not start from the owner of {move.server}"
        if (move.source == move.destination) != move.in_place:
            yield f"{move.id} moves {move.server} to where it is"
        if move.id not in begun:
            yield from _new_move(policy, child, move)


def _new_move(policy: Policy, child: Blueprint, move: PlannedMove) -> Iterator[str]:
    destination, spec = child.hosts.get(move.destination), policy.hosts.get(move.destination)
    if destination is None or (destination.phase is not HostPhase.SERVING and not move.in_place):
        yield f"{move.id} goes to {move.destination}, which is not serving"
    if spec is None or spec.role is not HostRole.COMPUTE:
        yield f"{move.id} goes to {move.destination}, which is no compute host"
    if move.server not in policy.servers:
        yield f"{move.id} moves {move.server}, which is to be removed"


def _switching(observed: Observed, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """What a host that is switched owns runs by its release already, as of when that was begun."""
    switching = {host for host, plan in child.hosts.items() if plan.phase is HostPhase.SWITCHING}
    begun = {host for host, plan in before.hosts.items() if plan.phase is HostPhase.SWITCHING}
    for server, assignment in child.servers.items():
        if assignment.host not in switching or server in child.off:
            continue
        seen = observed.server_on(server, assignment.host)
        release = seen.release if seen is not None and seen.epoch == assignment.epoch else None
        kept = assignment.host in begun and before.servers.get(server) == assignment
        if not kept and release != child.hosts[assignment.host].release:
            yield f"{assignment.host} is switched while it owns {server}, which runs by {release}"
    for move in child.moves:
        for host in {move.source, move.destination} & switching:
            yield f"{host} is switched while {move.id} runs"
    for host, plan in child.hosts.items():
        old = before.hosts.get(host)
        if old is not None and old.release != plan.release and host not in switching:
            yield f"{host} changes its release from {old.release} to {plan.release} while {plan.phase}"
        if old is not None and plan.replacing is None and old.replacing is None:
            for component in (Component.STORAGE, Component.NETWORK):
                if old.release_of(component) != plan.release_of(component):
                    yield f"{host} changes its {component} release without being replaced"
    for verify in child.verifies:
        target = child.hosts.get(verify.host)
        if verify.host not in switching or target is None or target.release != verify.release:
            yield f"{verify.id} verifies {verify.release} on {verify.host}, which is not switched to it"


def _one_at_a_time(policy: Policy, child: Blueprint) -> Iterator[str]:
    replaced = [host for host, plan in child.hosts.items() if plan.replacing is not None]
    if len(replaced) > 1:
        yield f"{' and '.join(replaced)} are replaced at once"
    if replaced and child.upgrading is not None:
        yield f"{replaced[0]} is replaced beside {child.upgrading}"
    for host, plan in child.hosts.items():
        if host == child.upgrading:
            continue
        if plan.phase is HostPhase.SWITCHING and plan.previous is not None:
            yield f"{host} is switched beside {child.upgrading}"
        drained = host not in policy.hosts or policy.intents.get(host) is HostIntent.DRAINED
        if plan.phase is HostPhase.EMPTYING and not drained:
            yield f"{host} is emptied beside {child.upgrading}, and nobody drains it"


def _gateways(observed: Observed, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """A way out changes its place by a move that is seen to be done, or because its host is fenced."""
    routers = [move.router for move in child.gateway_moves]
    if len(routers) != len(set(routers)):
        yield f"ways out move twice at once: {routers}"
    known = {move.id: move for move in before.gateway_moves}
    for move in child.gateway_moves:
        place = child.gateways.get(move.router)
        if place is not None and (place.host != move.source or place.epoch >= move.epoch):
            yield f"{move.id} does not start from the place of {move.router}"
        if move.source == move.destination:
            yield f"{move.id} moves {move.router} to where it is"
    done = {
        (move.router, move.destination, move.epoch)
        for move in known.values()
        if (status := ended(observed, move.id, (move.source, move.destination)))
        and status.state is OperationState.DONE
    }
    for router, place in child.gateways.items():
        old = before.gateways.get(router)
        if old is None or old == place or old.host not in child.hosts:
            continue
        if child.hosts[old.host].fenced and old.epoch < place.epoch:
            continue
        if (router, place.host, place.epoch) not in done:
            yield f"the way out of {router} goes from {old.host} to {place.host} without a move"


def _room(policy: Policy, inventory: Inventory, before: Blueprint, child: Blueprint) -> Iterator[str]:
    sizes = {server: spec.size for server, spec in policy.servers.items()}
    was, now = _load(sizes, before), _load(sizes, child)
    for host, load in now.items():
        seen = inventory.hosts.get(host)
        old = was.get(host, Size())
        has = seen.capacity if seen is not None else load
        if load.memory_mib > max(has.memory_mib, old.memory_mib) or load.vcpus > max(has.vcpus, old.vcpus):
            yield f"{host} would hold {load}, and has {has}"


def _load(sizes: dict[ServerId, Size], blueprint: Blueprint) -> dict[HostId, Size]:
    """What each host holds, both ends of moves counted."""
    load: dict[HostId, Size] = {}
    owned = blueprint.servers.items()
    places = [(server, assignment.host) for server, assignment in owned if server not in blueprint.off]
    places += [(move.server, move.destination) for move in blueprint.moves if not move.in_place]
    for server, host in places:
        load[host] = load.get(host, Size()) + sizes.get(server, Size())
    return load


def _groups(policy: Policy, before: Blueprint, child: Blueprint) -> Iterator[str]:
    """No hard rule is broken, nor broken further, by what is decided; both ends of moves counted."""
    for group in policy.server_groups.values():
        members = {server for server, name in policy.members.items() if name == group.id} - child.off.keys()
        was, now = _places(before, members), _places(child, members)
        if group.policy is GroupPolicy.ANTI_AFFINITY:
            for host, here in now.items():
                if len(here) > max(1, len(was.get(host, ()))):
                    yield f"{host} would have {', '.join(sorted(here))} of {group.id}, which are to be apart"
        elif group.policy is GroupPolicy.AFFINITY:
            ends = {m.destination for m in child.moves if m.server in members and not m.in_place}
            if len(now) > max(2, len(was)) or (len(now) > max(1, len(was)) and not ends):
                yield f"{group.id}, which is to be together, would be on {', '.join(sorted(now))}"
            if len(ends) > 1:
                yield f"{group.id}, which is to be together, goes to {', '.join(sorted(ends))}"


def _places(blueprint: Blueprint, servers: set[ServerId]) -> dict[HostId, set[ServerId]]:
    found: dict[HostId, set[ServerId]] = {}
    for server in servers & blueprint.servers.keys():
        found.setdefault(blueprint.servers[server].host, set()).add(server)
    for move in blueprint.moves:
        if move.server in servers:
            found.setdefault(move.destination, set()).add(move.server)
    return found


def _pins(policy: Policy, before: Blueprint, child: Blueprint) -> Iterator[str]:
    begun = {move.id for move in before.moves}
    for server, pin in policy.pins.items():
        owner = child.servers.get(server)
        if owner is not None and server not in before.servers and owner.host != pin:
            yield f"{server}, which is pinned to {pin}, is placed on {owner.host}"
    for move in child.moves:
        if move.id not in begun and policy.pins.get(move.server, move.destination) != move.destination:
            yield f"{move.id} takes {move.server} from {policy.pins[move.server]}, to which it is pinned"
