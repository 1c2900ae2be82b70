"""What keeps a server from a host, room left out: the host's release and processor, the server's pin and
group."""

from enum import IntEnum
from typing import NamedTuple

from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.draft import Draft
from nahtlos.planner.groups import Neighbours
from nahtlos.planner.way_back import why_no_return

ADD_A_HOST = "add or activate a host, or delete a member of its group"


class Bar(IntEnum):
    """In the order in which it could be lifted, the hardest first."""

    MACHINE = 1
    CPU = 2
    PAIR = 3
    WAY_BACK = 4
    PIN = 5
    GROUP = 6


class Unsuited(NamedTuple):
    kind: Bar
    reason: str
    remedy: str


def why_unsuited(draft: Draft, server: ServerId, host: HostId, neighbours: Neighbours) -> Unsuited | None:
    """None if nothing does."""
    release = draft.hosts[host].release
    if not draft.can_run(server, release):
        text = f"{release} on {host} lacks the machine type of {server}"
        return Unsuited(Bar.MACHINE, text, "choose a host with another release")
    if lacking := _no_cpu_model(draft, server, host):
        return lacking
    if stays := why_no_return(draft, server, host):
        commit = "make the campaign final: nahtlos upgrade commit"
        return Unsuited(Bar.WAY_BACK, f"{stays}, and the campaign to it is not final yet", commit)
    if refused := draft.refused_move(server, release):
        in_place = f"replace it in place first: nahtlos server replace-vmm {server}"
        return Unsuited(Bar.PAIR, f"{refused}; {in_place}", in_place)
    pin = draft.policy.pins.get(server)
    if pin is not None and pin != host:
        text = f"{server} is pinned to {pin}"
        return Unsuited(Bar.PIN, text, f"let it go: nahtlos server set {server} --unpin")
    if not neighbours:
        return None
    owner = draft.servers.get(server) if server not in draft.off_before else None
    if barred := neighbours.why_not(server, host, owner.host if owner else None):
        return Unsuited(Bar.GROUP, barred, ADD_A_HOST)
    return None


def _no_cpu_model(draft: Draft, server: ServerId, host: HostId) -> Unsuited | None:
    """A guest's processor must not lose features. A host that has not told its models is believed."""
    spec, seen = draft.policy.servers.get(server), draft.observed.host(host)
    known = seen.accelerator.cpu_models if seen is not None and seen.accelerator is not None else ()
    if spec is None or not known or spec.cpu_model in known:
        return None
    text = f"{host} cannot give {server} all features of the CPU model {spec.cpu_model}"
    return Unsuited(Bar.CPU, text, "choose a host whose processor has them: nahtlos host show HOST --json")


def why_tied(draft: Draft, server: ServerId) -> Unsuited | None:
    """Whether it may not leave its host by itself, since its group is there."""
    owner = draft.servers.get(server)
    if owner is None or draft.neighbours.home(server, owner.host) is not None:
        return None
    companions = draft.neighbours.companions(server, owner.host)
    if not companions:
        return None
    group = draft.neighbours.group(server)
    text = f"{server} leaves {owner.host} only together with {', '.join(companions)} (affinity group {group})"
    return Unsuited(Bar.GROUP, text, f"drain {owner.host}, which moves all of them, or replace it in place")
