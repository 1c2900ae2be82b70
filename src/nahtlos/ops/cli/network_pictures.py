"""The virtual network as people read it: tables and short texts. Pure: values in, renderables out."""

from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.networking import FloatingIpSpec, LoadBalancerSpec, Member, Rate, RouterSpec, number_text
from nahtlos.model.topology import MoveCompression, Underlay
from nahtlos.ops.cli.amounts import rate_text
from nahtlos.ops.cli.pictures import BAD, GOOD, NOTHING, SOFT, facts, table
from nahtlos.runtime.controllers.networks import (
    Fate,
    LoadBalancerView,
    NetworkView,
    Outcome,
    PortView,
    SecurityGroupView,
    SubnetView,
    Trace,
    TraceStep,
)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or NOTHING


# --- networks, subnets -------------------------------------------------------------------------------


def networks(views: Sequence[NetworkView]) -> RenderableType:
    columns = ("Network", "Project", "Subnets", ">MTU", ">Number", "Way out", ">Ports")
    rows = (
        (
            v.id,
            v.project,
            _list([s.spec.cidr for s in v.subnets]),
            str(v.mtu),
            str(v.vni),
            _way_out(v),
            str(len(v.ports)),
        )
        for v in views
    )
    return table(columns, rows, "no networks yet; `nahtlos network create NAME --cidr CIDR`")


def _way_out(view: NetworkView) -> str:
    if view.gateway_host is not None:
        return f"uplink at {view.gateway_host}"
    if view.provider is not None:
        tag = f", VLAN {view.provider.vlan}" if view.provider.vlan else ""
        return f"{view.provider.interface} of every host{tag}"
    routers = sorted({s.router for s in view.subnets if s.router is not None})
    return f"router {', '.join(routers)}" if routers else NOTHING


def network(view: NetworkView) -> RenderableType:
    known = facts(
        [
            ("network", view.id),
            ("project", view.project),
            ("number", str(view.vni)),
            ("MTU", str(view.mtu)),
            ("way out", _way_out(view)),
            ("DHCP, names", view.dhcp_ip),
            ("ports", _list(view.ports)),
            ("load balancers", _list(view.load_balancers)),
        ]
    )
    return Group(known, Text(), subnets(view.subnets))


def subnets(views: Sequence[SubnetView]) -> RenderableType:
    columns = ("Subnet", "Network", "Range", "Gateway", "Router", "DHCP", "Name servers")
    rows = (
        (
            v.spec.id,
            v.spec.network,
            v.spec.cidr,
            v.spec.gateway_ip or NOTHING,
            v.router or NOTHING,
            "yes" if v.spec.dhcp else "no",
            ", ".join(v.spec.dns) or "the network's",
        )
        for v in views
    )
    return table(columns, rows, "no subnets yet")


COMPRESSED = {
    MoveCompression.AUTO: "where they get little of a link",
    MoveCompression.ALWAYS: "always",
    MoveCompression.NEVER: "never",
}


def underlay(value: Underlay) -> RenderableType:
    shares = value.shares
    rows = [("MTU", str(value.mtu) if value.mtu else "not known")]
    if value.move_channels > 1:
        rows.append(("connections of a move", str(value.move_channels)))
    rows.append(("moves are compressed", COMPRESSED[value.move_compression]))
    if shares is None:
        return facts([*rows, ("shares", "none: the interface is left alone")])
    rows += [
        ("rate", f"{shares.bits_per_second / 10**6:g} Mbit/s"),
        ("control", f"{shares.control} %"),
        ("moves", f"{shares.moves} %"),
        ("tenants", f"{shares.tenants} %"),
    ]
    return facts(rows)


# --- ports -------------------------------------------------------------------------------------------


def ports(views: Sequence[PortView]) -> RenderableType:
    columns = ("Port", "Network", "Addresses", "MAC", "Host", "Security groups", "In", "Out")
    rows = (
        (
            v.id,
            v.network,
            ", ".join((*v.addresses, *(f"({f})" for f in v.floating_ips))),
            v.mac,
            v.host or NOTHING,
            _list(v.security_groups),
            _rate(v.bandwidth.ingress),
            _rate(v.bandwidth.egress),
        )
        for v in views
    )
    return table(
        columns, rows, "no ports yet; servers bring them: `nahtlos server create NAME --network NET`"
    )


def _rate(value: Rate | None) -> str:
    """Without its burst, which `port show` tells."""
    return rate_text(msgspec.structs.replace(value, burst_bytes=0)) if value else NOTHING


def port(view: PortView) -> RenderableType:
    pairs = [f"{p.cidr} from {p.mac}" if p.mac else p.cidr for p in view.allowed_pairs]
    return facts(
        [
            ("port", view.id),
            ("server", view.server),
            ("project", view.project),
            ("network", view.network),
            ("host", view.host or NOTHING),
            ("MAC", view.mac),
            ("addresses", ", ".join(view.addresses)),
            ("floating IPs", _list(view.floating_ips)),
            ("allowed pairs", _list(pairs)),
            ("security groups", ", ".join(view.security_groups) or "none: open"),
            ("receives", rate_text(view.bandwidth.ingress)),
            ("sends", rate_text(view.bandwidth.egress)),
        ]
    )


# --- security groups ---------------------------------------------------------------------------------


def groups(views: Sequence[SecurityGroupView]) -> RenderableType:
    columns = ("Security group", "Project", ">Rules", ">Ports", "Answers")
    rows = (
        (
            v.spec.id,
            v.spec.project,
            str(len(v.spec.rules)),
            str(len(v.ports)),
            "pass" if v.spec.stateful else "need rules",
        )
        for v in views
    )
    return table(columns, rows, "no security groups yet; `nahtlos security-group create NAME`")


def group(view: SecurityGroupView) -> RenderableType:
    spec = view.spec
    known = facts(
        [
            ("security group", spec.id),
            ("project", spec.project),
            ("answers", "pass" if spec.stateful else "need rules of their own"),
            ("ports", _list(view.ports)),
        ]
    )
    rows = (
        (
            str(number),
            rule.direction,
            rule.family,
            rule.protocol or "any",
            number_text(rule) or "all",
            f"group {rule.remote_group}" if rule.remote_group is not None else rule.remote_cidr or "anywhere",
        )
        for number, rule in enumerate(spec.rules, 1)
    )
    columns = (">", "Direction", "Family", "Protocol", "Ports", "Other side")
    return Group(known, Text(), table(columns, rows, "no rules: only answers pass"))


# --- routers, floating IPs, load balancers -----------------------------------------------------------


def routers(values: Sequence[RouterSpec]) -> RenderableType:
    columns = ("Router", "Project", "Subnets", ">Routes", "Gateway")
    rows = (
        (r.id, r.project, _list([i.subnet for i in r.interfaces]), str(len(r.routes)), _gateway(r))
        for r in values
    )
    return table(columns, rows, "no routers yet; `nahtlos router create NAME --subnet SUBNET`")


def _gateway(value: RouterSpec) -> str:
    gateway = value.gateway
    if gateway is None:
        return NOTHING
    return f"{gateway.address} at {gateway.host}{'' if gateway.snat else ', no SNAT'}"


def router(value: RouterSpec) -> RenderableType:
    known = facts(
        [
            ("router", value.id),
            ("project", value.project),
            ("number", str(value.number)),
            ("gateway", _gateway(value)),
        ]
    )
    interfaces = table(
        ("Subnet", "Network", "Address"),
        ((i.subnet, i.network, i.ip) for i in value.interfaces),
        "no subnets attached",
    )
    routes = table(
        ("Destination", "Next hop"), ((r.destination, r.next_hop) for r in value.routes), "no routes"
    )
    return Group(known, Text(), interfaces, Text(), routes)


def floating_ips(values: Sequence[FloatingIpSpec]) -> RenderableType:
    columns = ("Floating IP", "Project", "Address", "Port", "Fixed address", "Router")
    rows = (
        (f.id, f.project, f.address, f.port or NOTHING, f.fixed_ip or NOTHING, f.router or NOTHING)
        for f in values
    )
    return table(columns, rows, "no floating IPs yet; `nahtlos floating-ip create NAME --address ADDRESS`")


def balancers(values: Sequence[LoadBalancerView]) -> RenderableType:
    columns = ("Load balancer", "Project", "Network", "Listens at", "Host", ">Members", ">Healthy")
    rows = (
        (
            b.id,
            b.project,
            b.network,
            _listens(b),
            b.host,
            str(sum(not m.draining for m in b.members)),
            _healthy(b),
        )
        for b in values
    )
    return table(columns, rows, "no load balancers yet; `nahtlos load-balancer create NAME`")


def _listens(value: LoadBalancerSpec) -> str:
    return f"[{value.vip}]:{value.port}" if ":" in value.vip else f"{value.vip}:{value.port}"


def _healthy(value: LoadBalancerView) -> str:
    return NOTHING if value.status is None else str(sum(m.up for m in value.status.members))


def _found(value: LoadBalancerSpec, member: Member) -> tuple[str, str]:
    """Whether the member is up, and its connections."""
    status = value.status if isinstance(value, LoadBalancerView) else None
    for each in status.members if status else ():
        if (each.address, each.port) == (member.address, member.port):
            return "up" if each.up else "down", str(each.connections)
    return NOTHING, NOTHING


def balancer(value: LoadBalancerSpec) -> RenderableType:
    health = value.health
    known = facts(
        [
            ("load balancer", value.id),
            ("project", value.project),
            ("network", value.network),
            ("listens at", _listens(value)),
            ("host", value.host),
            (
                "health check",
                f"every {health.interval_ms} ms, at most {health.timeout_ms} ms; "
                f"out after {health.fall} failures, in after {health.rise}",
            ),
        ]
    )
    members = table(
        ("Member", ">Port", ">Weight", "Health", ">Connections", ""),
        (
            (m.address, str(m.port), str(m.weight), *_found(value, m), "draining" if m.draining else "")
            for m in value.members
        ),
        "no members",
    )
    return Group(known, Text(), members)


# --- traces ------------------------------------------------------------------------------------------

_SIGNS = {
    Outcome.PASSES: ("✔ ", GOOD),
    Outcome.TRANSLATED: ("⇄ ", "cyan"),
    Outcome.DROPPED: ("✘ ", BAD),
}


def trace(value: Trace) -> RenderableType:
    number = f" {value.number}" if value.number is not None else ""
    head = Text(
        f"{value.protocol or 'any'}{number}  {value.source or '?'} → {value.destination or '?'}", "bold"
    )
    style = BAD if value.fate is Fate.DROPPED else GOOD
    verdict = Text.assemble((value.fate, style), f": {value.reason}")
    return Group(head, *(line for step in value.steps for line in _step(step)), verdict)


def _step(step: TraceStep) -> list[Text]:
    lines = [Text.assemble(_SIGNS[step.outcome], (f"{step.where}: ", "bold"), step.what)]
    lines += [Text(f"    {text}", style=SOFT) for text in step.checked]
    return lines
