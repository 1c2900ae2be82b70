"""Free room of hosts: what they have, less what is owned, reserved for moves, or left over.

A server that moves is counted at both ends. Arithmetic only; who may use the room is decided elsewhere.
"""

from collections.abc import Mapping

from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Size

NOTHING = Size()


class Rooms:
    def __init__(self, capacities: Mapping[HostId, Size]) -> None:
        self._capacity = dict(capacities)
        self._free = dict(capacities)
        self._aside: dict[ServerId, HostId] = {}

    def copy(self) -> "Rooms":
        other = Rooms({})
        other._capacity = self._capacity
        other._free = dict(self._free)
        other._aside = dict(self._aside)
        return other

    def capacity(self, host: HostId) -> Size:
        return self._capacity.get(host, NOTHING)

    def free(self, host: HostId) -> Size:
        """Negative where more is on a host than it has."""
        return self._free.get(host, NOTHING)

    def take(self, host: HostId, size: Size) -> None:
        self._free[host] = self.free(host) - size

    def set_aside(self, host: HostId, server: ServerId, size: Size) -> None:
        """Keep room for a server that will have to come; once."""
        if server not in self._aside:
            self._aside[server] = host
            self.take(host, size)

    def is_aside(self, host: HostId, server: ServerId) -> bool:
        return self._aside.get(server) == host

    def admit(self, host: HostId, server: ServerId, size: Size) -> None:
        """It comes: by the room that was set aside, or by what is free."""
        if self.is_aside(host, server):
            del self._aside[server]
        else:
            self.take(host, size)

    def free_share(self, host: HostId) -> float:
        """Free share of its memory, 0.0 to 1.0."""
        memory = self.capacity(host).memory_mib
        return self.free(host).memory_mib / memory if memory else 0.0


def amount(size: Size) -> str:
    cpus = "1 vCPU" if size.vcpus == 1 else f"{size.vcpus} vCPUs"
    return f"{size.memory_mib} MiB and {cpus}"


def at_least_zero(size: Size) -> Size:
    return Size(vcpus=max(size.vcpus, 0), memory_mib=max(size.memory_mib, 0))


def total(sizes: "list[Size]") -> Size:
    return Size(vcpus=sum(s.vcpus for s in sizes), memory_mib=sum(s.memory_mib for s in sizes))
