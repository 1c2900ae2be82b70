"""The whole numbered configuration of a host: what its agent converges to.

A host is always sent all of it. The agent's ledger refuses an older generation, and the same generation
with other content. Servers and volumes are removed only when named in `removed_*`: what a configuration
does not mention is reported as drift and left alone.
"""

import ipaddress

from nahtlos.model.ids import HostId, NetworkId, PortId, ReleaseId, ServerId, VolumeId
from nahtlos.model.nouns import HostSpec, NetworkSpec, ServerSpec, Value, VolumeSpec


class VolumeAttachment(Value, frozen=True, kw_only=True):
    """Where a server finds its volume."""

    volume: VolumeId
    address: str
    port: int
    export: str
    """`<volume>.e<epoch>`"""


class ServerConfig(Value, frozen=True, kw_only=True):
    """A server this host owns at `epoch` and must run. An entry whose epoch the ledger has passed
    (the server was handed over meanwhile) is ignored."""

    spec: ServerSpec
    epoch: int
    volume: VolumeAttachment


class PortConfig(Value, frozen=True, kw_only=True):
    """A port of a network as seen from every host: `host` says where frames for `mac` must go."""

    id: PortId
    server: ServerId
    mac: str
    ip: str
    host: HostId
    vtep: str


class NetworkConfig(Value, frozen=True, kw_only=True):
    spec: NetworkSpec
    ports: tuple[PortConfig, ...]
    gateway_vtep: str
    vteps: tuple[str, ...]
    """Underlay addresses of all hosts of this network, this host's own included."""

    @property
    def prefix_length(self) -> int:
        return ipaddress.ip_network(self.spec.cidr).prefixlen


class Uplink(Value, frozen=True, kw_only=True):
    """A way out of the cloud, held by an edge host: it routes between `network` and `interface`."""

    network: NetworkId
    interface: str


class HostConfig(Value, frozen=True, kw_only=True):
    host: HostId
    generation: int
    release: ReleaseId | None
    """Hypervisor release for servers that start (or arrive) here from now on; running ones keep theirs.
    None on a host without the compute role."""
    networks: tuple[NetworkConfig, ...] = ()
    uplinks: tuple[Uplink, ...] = ()
    servers: tuple[ServerConfig, ...] = ()
    removed_servers: tuple[ServerId, ...] = ()
    volumes: tuple[VolumeSpec, ...] = ()
    removed_volumes: tuple[VolumeId, ...] = ()
    reflect: tuple[PortId, ...] = ()
    """Ports that left this host and whose frames it must still pass on, because some host has not
    yet converged to their new place."""
    hosts: tuple[HostSpec, ...] = ()
    """Every host of the cloud, so that agents can check who is speaking to them."""
