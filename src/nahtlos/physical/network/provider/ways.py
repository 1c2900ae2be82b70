"""How a network reaches the outside network that it is one with, from this host, and why it cannot.

Pure. Knows what an interface must be like, and never looks at one.
"""

from enum import StrEnum

import msgspec

from nahtlos.model.networking import NetworkSpec

TAG_BYTES = 4


class Way(StrEnum):
    FLAT = "flat"
    """The interface itself is a port of the network's bridge."""
    VLAN_DEVICE = "8021q"
    """A VLAN device on it is."""
    PROGRAMS = "tc-bpf"
    """One end of a pair is; programs at its egress and at the interface's ingress put tags on and take them
    off. For kernels without VLAN devices."""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of the name that a network asks for."""

    mtu: int
    addresses: tuple[str, ...] = ()
    """The host's own on it, link-local ones left out."""
    lent_to: str = ""
    """Network of ours whose bridge it is in."""
    master: str = ""
    """Device that it is enslaved to and that is not ours."""


def way_of(spec: NetworkSpec, tagging: Way | None) -> Way | None:
    """`tagging`: what this kernel has for VLANs."""
    if spec.provider is None:
        return None
    return tagging if spec.provider.vlan else Way.FLAT


def obstacle(spec: NetworkSpec, found: Interface | None, tagging: Way | None, underlay: str) -> str:
    """Why `spec` cannot be connected here, in words; empty if it can. `found` None: there is no such
    interface."""
    provider = spec.provider
    if provider is None:
        return ""
    name = provider.interface
    if found is None:
        return f"this host has no interface {name}"
    if found.mtu < spec.mtu:
        return f"interface {name} has an MTU of {found.mtu}, network {spec.id} one of {spec.mtu}"
    if provider.vlan:
        return "" if tagging else "this kernel has neither VLAN devices (8021q) nor programs at tc (cls_bpf)"
    if name == underlay:
        return f"interface {name} carries the underlay, and without tags it would carry nothing else"
    if found.addresses:
        return f"interface {name} has addresses of the host, which it would lose"
    if found.master:
        return f"interface {name} belongs to {found.master} already"
    if found.lent_to not in ("", spec.id):
        return f"interface {name} belongs to network {found.lent_to}, also without tags"
    return ""
