"""What devices of the virtual network are called, and what their aliases say. Pure."""

import hashlib

from nahtlos.model.ids import PortId

OWNED = "nahtlos/"
"""How the alias of every device of this driver begins: `nahtlos/network/<id>`, `nahtlos/port/<id>/<mac>`."""


def bridge_name(vni: int) -> str:
    return f"br{vni}"


def tunnel_name(vni: int) -> str:
    return f"vx{vni}"


def gate_name(vni: int) -> str:
    """Where frames for a port that moves enter the bridge again, so that its entry decides for them."""
    return f"gm{vni}"


def gate_port_name(vni: int) -> str:
    return f"gb{vni}"


def provider_name(vni: int) -> str:
    """By which a network's bridge reaches a VLAN of the outside."""
    return f"pv{vni}"


def provider_far_name(vni: int) -> str:
    """The far end of that, where programs do what no VLAN device does."""
    return f"pw{vni}"


def far_end(name: str) -> str:
    """Of a pair of devices both of which are ours: the one that is in the bridge."""
    return {"gm": "gb", "pw": "pv"}[name[:2]] + name[2:]


def tap_name(port: PortId) -> str:
    """At most 15 characters whatever the port's name; the alias tells it in full."""
    return "tp" + hashlib.sha256(port.encode()).hexdigest()[:12]


def anycast_mac(vni: int) -> str:
    """What answers DHCP, names and metadata looks the same on every compute host."""
    return f"02:6e:6c:{_octets(vni)}"


def bridge_mac(vni: int) -> str:
    """Of the bridge itself where it has no address: nobody sends to it."""
    return f"02:6e:62:{_octets(vni)}"


def _octets(vni: int) -> str:
    return f"{vni >> 16 & 0xFF:02x}:{vni >> 8 & 0xFF:02x}:{vni & 0xFF:02x}"


def tracking_zone(vni: int) -> int:
    """Connection-tracking zone of a network (1 to 65535): the same on every host, so that what one host
    remembers of a connection means the same on another."""
    return 1 + (vni - 1) % 0xFFFF


def network_alias(network: str) -> str:
    return f"{OWNED}network/{network}"


def provider_alias(network: str) -> str:
    """Of an interface that was there before and is lent to a network."""
    return f"{OWNED}provider/{network}"


def is_lent(alias: str) -> bool:
    return alias.startswith(provider_alias(""))


def port_alias(port: PortId, mac: str) -> str:
    return f"{OWNED}port/{port}/{mac}"


def port_of_alias(alias: str) -> tuple[PortId, str] | None:
    parts = alias.split("/")
    return (PortId(parts[2]), parts[3]) if alias.startswith(f"{OWNED}port/") and len(parts) == 4 else None
