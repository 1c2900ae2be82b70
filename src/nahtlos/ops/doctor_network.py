"""What this machine can do for the virtual network. Every check is a small function of a `Machine`."""

from nahtlos.ops.examined import Finding, Level, Machine

_GATE = """table netdev probe {
  set moving { type ether_addr; }
  chain ingress { type filter hook ingress device "lo" priority 0; ether daddr @moving fwd to "lo"; }
}
"""


_BRIDGE = """table bridge probe {
  chain forward { type filter hook forward priority 0; }
}
"""


_BRIDGE_TRACKING = """table bridge probe {
  chain forward { type filter hook forward priority 0; ct state established accept; }
}
"""


_INET = "table inet probe { set addresses { type ipv4_addr; }; }\n"
_FLOWER = """qdisc add dev lo clsact
filter add dev lo ingress protocol ip flower dst_ip 192.0.2.1 action pass
"""


def _trial_finding(name: str, level: Level, problem: str, works: str, remedy: str) -> Finding:
    return Finding(
        name=name, ok=not problem, level=level, detail=problem or works, remedy=remedy if problem else ""
    )


def namespaces(machine: Machine) -> Finding:
    problem = machine.isolated(["ip", "link", "show", "lo"])
    return _trial_finding(
        "network namespaces",
        Level.REQUIRED,
        problem,
        "can be made",
        "use a kernel with CONFIG_NET_NS, as root",
    )


def link_kind(machine: Machine, kind: str) -> Finding:
    extra = ["id", "1", "dstport", "4789", "nolearning"] if kind == "vxlan" else []
    problem = machine.isolated(["ip", "link", "add", "probe0", "type", kind, *extra])
    return _trial_finding(
        f"{kind} devices",
        Level.REQUIRED,
        problem,
        "can be made",
        f"modprobe {kind}, or use a kernel that has them",
    )


def packet_rules(machine: Machine) -> list[Finding]:
    return [
        _trial_finding(
            "nftables netdev",
            Level.REQUIRED,
            machine.isolated(["nft", "-f", "-"], _GATE),
            "sets and forwarding at ingress: moves lose no packet",
            "use a kernel with CONFIG_NF_TABLES_NETDEV and CONFIG_NFT_FWD_NETDEV",
        ),
        _trial_finding(
            "nftables inet",
            Level.REQUIRED,
            machine.isolated(["nft", "-f", "-"], _INET),
            "rules for what enters and leaves a host",
            "use a kernel with CONFIG_NF_TABLES_INET",
        ),
        _trial_finding(
            "nftables bridge",
            Level.OPTIONAL,
            machine.isolated(["nft", "-f", "-"], _BRIDGE),
            "rules within a bridge",
            "use a kernel with CONFIG_NF_TABLES_BRIDGE",
        ),
    ]


def bridge_tracking(machine: Machine) -> Finding:
    problem = machine.isolated(["nft", "-f", "-"], _BRIDGE_TRACKING)
    fallback = machine.exists("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not problem:
        detail = "connections can be tracked within a bridge (nf_conntrack_bridge)"
    elif fallback:
        detail = "not within a bridge, but by way of br_netfilter"
    else:
        detail = f"connections cannot be tracked within a bridge: {problem}"
    return Finding(
        name="bridge conntrack",
        ok=not problem or fallback,
        level=Level.OPTIONAL,
        detail=detail,
        remedy="modprobe nf_conntrack_bridge or br_netfilter" if problem and not fallback else "",
    )


def optional(machine: Machine) -> list[Finding]:
    return [
        _trial_finding(
            "netem",
            Level.OPTIONAL,
            machine.isolated(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]),
            "links can be made slow and lossy by tc",
            "modprobe sch_netem, or use a kernel that has it",
        ),
        _trial_finding(
            "flower",
            Level.OPTIONAL,
            machine.isolated(["tc", "-batch", "-"], _FLOWER),
            "tc can match flows",
            "modprobe cls_flower, or use a kernel that has it",
        ),
        _present(
            machine,
            "openvswitch",
            "/sys/module/openvswitch",
            "modprobe openvswitch, or use a kernel that has it",
        ),
        _present(machine, "vhost-net", "/dev/vhost-net", "modprobe vhost_net, or use a kernel that has it"),
    ]


def _present(machine: Machine, name: str, path: str, remedy: str) -> Finding:
    ok = machine.exists(path)
    return Finding(
        name=name,
        ok=ok,
        level=Level.OPTIONAL,
        detail="present; not used" if ok else "absent; not needed",
        remedy="" if ok else remedy,
    )
