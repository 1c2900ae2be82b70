"""What a server can learn about itself: records for `metadata_server`, and the files of a NoCloud seed.

Pure. The same record on every host, whichever of them the server runs on: it is made of the network's ports.
Only what its owner tells a server (its user data) is known to its host alone.
"""

import functools
from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import NetworkConfig, PortConfig, RouterConfig
from nahtlos.model.ids import NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec, PortSpec
from nahtlos.model.nouns import ServerSpec
from nahtlos.physical.network.plan import REMEMBERED_PORTS
from nahtlos.physical.network.routing.plan import router_mac
from nahtlos.physical.network.services.addressing import (
    advertised,
    domain,
    link_local,
    name_servers,
    subnet_of,
)
from nahtlos.physical.network.services.metadata_pages import Record
from nahtlos.physical.network.services.metadata_pages import seed as seed_of


def seed(
    server: ServerSpec, networks: Mapping[NetworkId, NetworkSpec], user_data: str = ""
) -> dict[str, str]:
    """The files of a NoCloud seed (`meta-data`, `user-data`, `vendor-data`, `network-config`), by name.
    Interfaces in the order of the server's ports."""
    nics = [nic(port, networks[port.network]) for port in server.ports]
    return seed_of(_record(server.id, nics, user_data))


def directory(
    network: NetworkConfig,
    networks: Iterable[NetworkConfig],
    routers: Iterable[RouterConfig],
    user_data: Mapping[ServerId, str] | None = None,
) -> str:
    """The file of `network` for its metadata server: every server that has a port in it, with all the ports
    that `networks` of the same project tell of it, and the routers of its IPv6 subnets. `user_data` is told
    to servers of this host, who alone ask it."""
    servers = {port.server for port in network.ports}
    nics: dict[ServerId, dict[PortId, Record]] = {server: {} for server in servers}
    for other in networks:
        for port in other.ports:
            if port.server in servers and other.spec.project == network.spec.project:
                nics[port.server][port.id] = nic(port, other.spec)
    told = user_data or {}
    records = [
        _record(server, [n for _, n in sorted(nics[server].items())], told.get(server, ""))
        for server in sorted(servers)
    ]
    content = {"network": network.spec.id, "servers": records, "routers": routers_of(network, routers)}
    return msgspec.json.encode(content).decode()


def routers_of(network: NetworkConfig, routers: Iterable[RouterConfig]) -> list[Record]:
    """Those that servers of the network's IPv6 subnets send by: each once, by MAC."""
    told = {subnet.id for subnet in advertised(network.spec)}
    numbers = {r.spec.number for r in routers for i in r.spec.interfaces if i.subnet in told}
    macs = [router_mac(number) for number in sorted(numbers)]
    if network.spec.gateway_mac and any(s.gateway_ip for s in advertised(network.spec)):
        macs.append(network.spec.gateway_mac.lower())  # of its own uplink
    return [{"mac": mac, "address": link_local(mac), "mtu": network.spec.mtu} for mac in macs]


def _record(server: ServerId, nics: list[Record], user_data: str = "") -> Record:
    return {"server": server, "nics": nics, "user_data": user_data}


@functools.lru_cache(maxsize=REMEMBERED_PORTS)
def nic(port: PortSpec | PortConfig, spec: NetworkSpec) -> Record:
    """One interface as plain data, which nobody changes."""
    subnets = {a: subnet_of(a, spec) for a in port.all_addresses}
    known = {a: s for a, s in subnets.items() if s is not None}
    return {
        "network": spec.id,
        "mac": port.mac.lower(),
        "mtu": spec.mtu,
        "domain": domain(spec.id),
        "addresses": [f"{a}/{s.cidr.split('/')[1]}" for a, s in known.items()],
        "gateways": _distinct(s.gateway_ip for s in known.values() if s.gateway_ip),
        "name_servers": _distinct(a for s in known.values() for a in name_servers(s, spec)),
    }


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
