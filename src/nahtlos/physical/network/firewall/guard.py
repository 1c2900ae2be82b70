"""Anti-spoofing: what a server may say it is.

Pure. Owns the chains that every frame from a tap passes first, and the sets in which each port has a handful
of elements: its MAC, its addresses with it, the link-local address of its MAC, and what its allowed pairs
add. A tap that has no elements yet sends nothing. Servers answer no DHCP, advertise no routers and redirect
nobody, whatever their groups say.
"""

import functools
import socket
from collections.abc import Iterable
from ipaddress import ip_network

from nahtlos.model.config import PortConfig
from nahtlos.model.networking import Family
from nahtlos.physical.network.firewall import rules
from nahtlos.physical.network.firewall.tables import Chain, address_number, key, mac_number, name_part
from nahtlos.physical.network.parts import LocalPort

TAPS = "tp*"
REMEMBERED = 4096
"""Ports whose elements are not composed again: about as many as a host may have."""

DECLARATIONS = {
    "macs": "type ifname . ether_addr;",
    "ipv4": "type ifname . ether_addr . ipv4_addr;",
    "ipv4_prefixes": "type ifname . ether_addr . ipv4_addr; flags interval;",
    "ipv6": "type ifname . ether_addr . ipv6_addr;",
    "ipv6_prefixes": "type ifname . ether_addr . ipv6_addr; flags interval;",
    # As raw payload, for which nft of Debian 12 has no names: MACs in DHCP and in ND's options, ND's target.
    "hardware": "typeof iifname . @th,208,48;",
    "targets": "typeof iifname . ether saddr . @th,64,128;",
    "target_prefixes": "typeof iifname . ether saddr . @th,64,128; flags interval;",
}
_SOURCE4 = (
    "iifname . ether saddr . ip saddr @ipv4 accept",
    "iifname . ether saddr . ip saddr @ipv4_prefixes accept",
)
_SOURCE6 = (
    "iifname . ether saddr . ip6 saddr @ipv6 accept",
    "iifname . ether saddr . ip6 saddr @ipv6_prefixes accept",
)
CHAINS = {
    "guard": Chain(
        (f'iifname "{TAPS}" goto guest',), "type filter hook prerouting priority -300; policy accept;"
    ),
    "guest": Chain(
        (
            # A frame with one VLAN tag is shown as what it carries; more are none of a server's business.
            "meta protocol vmap { ip : goto guest_ipv4, ip6 : goto guest_ipv6, arp : goto guest_arp, "
            "0x8100 : drop, 0x88a8 : drop }",
            "iifname . ether saddr @macs accept",
            "counter drop",
        )
    ),
    "guest_ipv4": Chain(
        (
            "udp sport 67 counter drop",
            *_SOURCE4,
            "ip saddr 0.0.0.0 udp sport 68 udp dport 67 iifname . ether saddr @macs "
            "iifname . @th,288,48 @hardware accept",
            "counter drop",
        )
    ),
    "guest_arp": Chain(
        (
            "iifname . ether saddr != @macs counter drop",
            "arp htype != 1 counter drop",
            "arp ptype != 0x0800 counter drop",
            "arp hlen != 6 counter drop",
            "arp plen != 4 counter drop",
            "iifname . arp saddr ether . arp saddr ip @ipv4 accept",
            "iifname . arp saddr ether . arp saddr ip @ipv4_prefixes accept",
            "arp saddr ip 0.0.0.0 iifname . arp saddr ether @macs accept",
            "counter drop",
        )
    ),
    "guest_ipv6": Chain(
        (
            "meta l4proto 58 goto guest_icmpv6",
            "udp sport 547 counter drop",
            *_SOURCE6,
            "counter drop",
        )
    ),
    "guest_icmpv6": Chain(
        (
            "icmpv6 type { 134, 137 } counter drop",
            "icmpv6 type 136 goto guest_advertises",
            "icmpv6 type 135 jump guest_solicits",
            "ip6 saddr :: icmpv6 type { 131, 132, 133, 143 } iifname . ether saddr @macs accept",
            *_SOURCE6,
            "counter drop",
        )
    ),
    # Others would believe a target and the MAC beside it. Its option comes first or there is none.
    "guest_advertises": Chain(
        (
            "iifname . ether saddr . @th,64,128 @targets goto guest_advertises_own",
            "iifname . ether saddr . @th,64,128 @target_prefixes goto guest_advertises_own",
            "counter drop",
        )
    ),
    "guest_advertises_own": Chain(
        (
            "ip6 length 24 goto guest_source6",
            "@th,192,16 0x0201 iifname . @th,208,48 @hardware goto guest_source6",
            "counter drop",
        )
    ),
    # From :: it claims an address for itself; otherwise it may tell its own MAC.
    "guest_solicits": Chain(
        (
            "ip6 saddr :: iifname . ether saddr . @th,64,128 @targets accept",
            "ip6 saddr :: iifname . ether saddr . @th,64,128 @target_prefixes accept",
            "ip6 saddr :: counter drop",
            "@th,192,16 0x0101 iifname . @th,208,48 != @hardware counter drop",
        )
    ),
    "guest_source6": Chain((*_SOURCE6, "counter drop")),
}


def elements(local: LocalPort) -> dict[str, list[str]]:
    """Of each set what this port needs. Not to be changed: it is remembered."""
    return _elements(local.port, local.tap)


@functools.lru_cache(maxsize=REMEMBERED)
def _elements(port: PortConfig, tap_name: str) -> dict[str, list[str]]:
    tap, own = name_part(tap_name), port.mac.lower()
    pairs = [(own, address) for address in (*port.all_addresses, *link_locals(port)) if address]
    pairs += [(pair.mac.lower() or own, pair.cidr) for pair in port.allowed_pairs]
    macs = sorted({own, *(mac for mac, _ in pairs)})
    found = {
        "macs": [key(tap, mac) for mac in macs],
        "hardware": [key(tap, mac_number(mac)) for mac in macs],
    }
    for mac in macs:
        cidrs = [cidr for of, cidr in pairs if of == mac]
        for name, items in _addresses(tap, mac, cidrs).items():
            found.setdefault(name, []).extend(items)
    return found


def _addresses(tap: str, mac: str, cidrs: Iterable[str]) -> dict[str, list[str]]:
    """A prefix of one address is an address. What lies within a prefix needs no element of its own, but
    single addresses are looked up faster."""
    found: dict[str, list[str]] = {}
    wide: list[str] = []
    for cidr in dict.fromkeys(cidrs):
        address = rules.single(cidr)
        if address is None:
            wide.append(cidr)
        elif ":" not in address:
            found.setdefault("ipv4", []).append(key(tap, mac, address))
        else:
            found.setdefault("ipv6", []).append(key(tap, mac, address))
            found.setdefault("targets", []).append(key(tap, mac, address_number(address)))
    for prefix in rules.collapsed(wide):
        family = rules.family_of(prefix)
        found.setdefault(f"{family}_prefixes", []).append(key(tap, mac, prefix))
        if family is Family.IPV6:
            found.setdefault("target_prefixes", []).append(key(tap, mac, _span(prefix)))
    return found


def _span(prefix: str) -> str:
    network = ip_network(prefix)
    return f"{hex(int(network.network_address))}-{hex(int(network.broadcast_address))}"


def link_locals(port: PortConfig) -> list[str]:
    """The address each of its MACs has on its link without being given one."""
    macs = [port.mac, *(pair.mac for pair in port.allowed_pairs if pair.mac)]
    return list(dict.fromkeys(link_local(mac) for mac in macs))


def link_local(mac: str) -> str:
    """RFC 4291, appendix A."""
    b = bytes.fromhex(mac.replace(":", ""))
    tail = bytes((b[0] ^ 2, b[1], b[2], 0xFF, 0xFE, b[3], b[4], b[5]))
    return socket.inet_ntop(socket.AF_INET6, b"\xfe\x80" + bytes(6) + tail)
