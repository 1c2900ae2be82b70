"""What the cloud consists of, as frozen values: servers, volumes, networks, releases, hosts.

Values only. Sizes are in MiB unless the name says otherwise; addresses are strings as people write them.
"""

from enum import StrEnum

import msgspec

from nahtlos.model.ids import HostId, ImageId, NetworkId, PortId, ReleaseId, ServerId, VolumeId


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the nouns: immutable, compared by content, unknown fields ignored when decoded."""


class Size(Value, frozen=True, kw_only=True):
    """What a server takes of a host, or what a host has: whole vCPUs and MiB of memory."""

    vcpus: int = 0
    memory_mib: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(vcpus=self.vcpus + other.vcpus, memory_mib=self.memory_mib + other.memory_mib)

    def __sub__(self, other: "Size") -> "Size":
        return Size(vcpus=self.vcpus - other.vcpus, memory_mib=self.memory_mib - other.memory_mib)

    def fits(self, room: "Size") -> bool:
        return self.vcpus <= room.vcpus and self.memory_mib <= room.memory_mib


class PortSpec(Value, frozen=True, kw_only=True):
    """A server's connection to a network. `mac` and `ip` are fixed for its life."""

    id: PortId
    network: NetworkId
    mac: str
    ip: str


class ServerSpec(Value, frozen=True, kw_only=True):
    """A server as its owner asked for it, plus what must never change under it while it lives
    (machine type and CPU model are the guest's hardware)."""

    id: ServerId
    size: Size
    volume: VolumeId
    ports: tuple[PortSpec, ...]
    machine: str
    """Versioned machine type, e.g. `pc-q35-10.0`; never an alias."""
    cpu_model: str = "qemu64"
    """Named CPU model; never `host` or `max`."""


class VolumeSpec(Value, frozen=True, kw_only=True):
    """A volume and the host that serves it. `epoch` is part of the export's name and fences old clients."""

    id: VolumeId
    size_mib: int
    image: ImageId | None
    host: HostId
    epoch: int = 1


class NetworkSpec(Value, frozen=True, kw_only=True):
    """A tenant network: one bridge and one VXLAN device on every host that takes part."""

    id: NetworkId
    vni: int
    cidr: str
    mtu: int = 1500
    gateway_ip: str
    """Address of the uplink's router port in this network."""
    gateway_mac: str
    gateway_host: HostId
    """The host (role edge) that holds the uplink."""
    dhcp_ip: str
    """Answered by every host for its own servers: the same address and MAC everywhere."""


class HostRole(StrEnum):
    COMPUTE = "compute"
    EDGE = "edge"
    """Holds an uplink; runs no servers."""


class HostSpec(Value, frozen=True, kw_only=True):
    """A host that has joined, and where its agent and its tunnels listen."""

    id: HostId
    role: HostRole
    address: str
    """Underlay address: tunnels, volumes, moves."""
    peer_port: int
    """TCP port at which its agent answers other agents."""


class Component(StrEnum):
    """What a release can be a release of. Others follow."""

    HYPERVISOR = "qemu"


class Artifact(Value, frozen=True, kw_only=True):
    """One package a release was made of."""

    name: str
    version: str
    sha256: str


class Release(Value, frozen=True, kw_only=True):
    """A built, content-addressed release, unpacked side by side with others.
    `id` ends in the first 12 digits of `digest`, the sha256 over its manifest of files."""

    id: ReleaseId
    component: Component
    version: str
    suite: str
    digest: str
    machine_types: tuple[str, ...]
    artifacts: tuple[Artifact, ...] = ()
    size_mib: int = 0


class Assignment(Value, frozen=True, kw_only=True):
    """Which host owns a server, and by which epoch. Every change of owner raises the epoch."""

    server: ServerId
    host: HostId
    epoch: int
