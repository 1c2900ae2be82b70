"""What goes with a restart, and with hosts that fail, besides the blueprint. Pure."""

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.runtime.store.events import EventDraft


def restarted(parent: Blueprint | None, child: Blueprint) -> dict[ServerId, HostId]:
    """Servers that the child gives a new life, with the host that had them."""
    before = parent.passed_over if parent else {}
    return {
        server: host
        for host, passed in sorted(child.passed_over.items())
        for server, epoch in sorted(passed.items())
        if before.get(host, {}).get(server) != epoch
    }


def volumes_to_fence(policy: Policy, parent: Blueprint | None, child: Blueprint) -> tuple[VolumeId, ...]:
    return tuple(
        volume
        for server in restarted(parent, child)
        if (spec := policy.servers.get(server)) is not None
        for volume in spec.all_volumes
    )


def announced_failures(parent: Blueprint | None, child: Blueprint) -> list[EventDraft]:
    drafts: list[EventDraft] = []
    for host, plan in sorted(child.hosts.items()):
        before = parent.hosts.get(host) if parent else None
        if plan.denial is not None and (before is None or before.denial is None):
            drafts.append(EventDraft(kind="host.lost", subject=host, text=f"{host} is denied its lease"))
        if plan.fenced and (before is None or not before.fenced):
            text = f"{host} has failed and is fenced: {plan.fenced}"
            drafts.append(EventDraft(kind="host.fenced", subject=host, text=text))
        if before is not None and before.denial is not None and plan.denial is None:
            drafts.append(EventDraft(kind="host.back", subject=host, text=f"{host} is back"))
    for server, host in restarted(parent, child).items():
        owner = child.servers.get(server)
        if owner is not None:
            text = f"{server} is restarted on {owner.host}, as {host} has failed"
            data: dict[str, str | int | float] = {"host": owner.host, "from": host, "epoch": owner.epoch}
            drafts.append(EventDraft(kind="server.restarted", subject=server, text=text, data=data))
    return drafts
