"""Items: facts about the kernel's devices and tables that can be true or not. Each says in words what it
is; two of the same key cannot be true at once."""

from typing import ClassVar

import msgspec

from nahtlos.physical.network.links import Flood
from nahtlos.physical.network.netlink import ANY_MAC


class Device(msgspec.Struct, frozen=True, cache_hash=True):
    """A device and its settings. The enslaved end of a pair is listed for itself and born with the other. Of
    the kind "interface": one of the host's own, which is neither made nor deleted."""

    name: str
    kind: str
    alias: str
    mtu: int
    """0: as it happens to be."""
    mac: str = ""
    """"": likewise."""
    master: str = ""
    vni: int = 0
    local: str = ""
    up: bool = True
    snooping: bool = False
    ring: int = 0
    """Frames a tap keeps for its server; 0 for what is no tap."""
    lower: str = ""
    """Device that a VLAN is on."""
    vlan: int = 0

    rank: ClassVar[int] = 0

    @property
    def key(self) -> tuple[str, ...]:
        return ("device", self.name)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class PortFlood(msgspec.Struct, frozen=True, cache_hash=True):
    device: str
    flood: Flood

    rank: ClassVar[int] = 1

    @property
    def key(self) -> tuple[str, ...]:
        return ("flood", self.device)

    def __str__(self) -> str:
        return f"flooding settings of {self.device}"


class Setting(msgspec.Struct, frozen=True, cache_hash=True):
    """A sysctl below /proc/sys."""

    path: str
    value: str

    rank: ClassVar[int] = 2

    @property
    def key(self) -> tuple[str, ...]:
        return ("setting", self.path)

    def __str__(self) -> str:
        return f"sysctl {self.path.replace('/', '.')} = {self.value}"


class Address(msgspec.Struct, frozen=True, cache_hash=True):
    device: str
    cidr: str
    routed: bool

    rank: ClassVar[int] = 3

    @property
    def key(self) -> tuple[str, ...]:
        return ("address", self.device, self.cidr)

    def __str__(self) -> str:
        return f"address {self.cidr} on {self.device}"


class Neighbour(msgspec.Struct, frozen=True, cache_hash=True):
    device: str
    ip: str
    mac: str
    router: bool = False
    """IPv6: what answers for it says that it routes; a server would drop its default route otherwise."""

    rank: ClassVar[int] = 4

    @property
    def key(self) -> tuple[str, ...]:
        return ("neighbour", self.device, self.ip)

    def __str__(self) -> str:
        return f"neighbour {self.ip} at {self.mac} on {self.device}"


class TunnelEntry(msgspec.Struct, frozen=True, cache_hash=True):
    """Frames for `mac` that leave by tunnel `device` go to `vtep`; ANY_MAC: broadcasts go there, too."""

    device: str
    mac: str
    vtep: str

    rank: ClassVar[int] = 5

    @property
    def key(self) -> tuple[str, ...]:
        return ("tunnel", self.device, self.mac, self.vtep if self.mac == ANY_MAC else "")

    def __str__(self) -> str:
        what = "broadcasts" if self.mac == ANY_MAC else self.mac
        return f"tunnel entry for {what} to {self.vtep} on {self.device}"


class Forward(msgspec.Struct, frozen=True, cache_hash=True):
    """The one entry that decides: frames for `mac` leave `bridge` by `device`."""

    bridge: str
    mac: str
    device: str

    rank: ClassVar[int] = 6

    @property
    def key(self) -> tuple[str, ...]:
        return ("forward", self.bridge, self.mac)

    def __str__(self) -> str:
        return f"forwarding of {self.mac} to {self.device} on {self.bridge}"


Item = Device | PortFlood | Setting | Address | Neighbour | TunnelEntry | Forward
