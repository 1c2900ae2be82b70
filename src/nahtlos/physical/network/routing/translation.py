"""The packet filter of a gateway: floating addresses without state, outbound translation with.

Owns the text of the tables `ip nahtlos` in gateways' namespaces. Pure.

Floating addresses are exchanged on the way in and out and never tracked: nothing is remembered, so nothing
has to move. What has none goes out as the gateway's address, remembered by connection tracking. Between
servers of the router (mark 1: sent to a floating address, or answering such) both ends are exchanged, so
that each sees only the address it talks to; a server without a floating address is seen as the gateway.
"""

from collections.abc import Mapping
from ipaddress import ip_address

from nahtlos.model.networking import RouterGateway

TABLE = "nahtlos"
NOTHING = f"table ip {TABLE}\ndelete table ip {TABLE}\n"
OUTSIDE = "out"
"""The interface to the outside, as named in the gateway's namespace."""


def rules(gateway: RouterGateway, floating: Mapping[str, str]) -> str:
    """`floating`: outside address -> fixed address. The same input gives the same text."""
    address = str(ip_address(gateway.address))
    # A fixed address with several floating ones is answered for by the first.
    outward = {fixed: outer for outer, fixed in sorted(floating.items(), reverse=True)}
    lines = [f"table ip {TABLE}", f"delete table ip {TABLE}", f"table ip {TABLE} {{"]
    lines += _map("inward", floating)
    lines += _map("outward", outward)
    lines += [
        "  chain arrive {",
        "    type filter hook prerouting priority -300; policy accept;",
        f'    iifname != "{OUTSIDE}" ip daddr {address} meta mark set 1 return',
        f'    iifname "{OUTSIDE}" ip daddr @inward notrack',
        f'    iifname != "{OUTSIDE}" ip saddr @outward notrack',
        "    ip daddr @inward meta mark set 1 ip daddr set ip daddr map @inward",
        "  }",
        "  chain leave {",
        "    type filter hook postrouting priority -300; policy accept;",
        f'    oifname "{OUTSIDE}" ip saddr set ip saddr map @outward',
        "    meta mark 1 ip saddr set ip saddr map @outward",
        "  }",
        "  chain receive {",
        "    type filter hook input priority 0; policy accept;",
        # What belongs to no connection here may belong to one whose state is still on its way.
        f'    iifname "{OUTSIDE}" meta l4proto {{ tcp, udp }} drop',
        "  }",
        "  chain pass {",
        "    type filter hook forward priority 0; policy accept;",
        "    tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu",
        # Untranslated it would show an inside address outside.
        "    ct state invalid drop",
        *([f'    iifname "{OUTSIDE}" ct state new drop'] if gateway.snat else []),
        "  }",
        *(_outbound(address) if gateway.snat else []),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _map(name: str, elements: Mapping[str, str]) -> list[str]:
    listed = ", ".join(f"{a} : {b}" for a, b in sorted(elements.items()))
    return [
        f"  map {name} {{",
        "    type ipv4_addr : ipv4_addr",
        *([f"    elements = {{ {listed} }}"] if elements else []),
        "  }",
    ]


def _outbound(address: str) -> list[str]:
    return [
        "  chain translate {",
        "    type nat hook postrouting priority 100; policy accept;",
        f'    oifname "{OUTSIDE}" snat to {address}',
        f"    meta mark 1 snat to {address}",
        "  }",
    ]
