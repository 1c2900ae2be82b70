"""What a server can learn about itself: records for `metadata_server`, and the files of a NoCloud seed.

Pure. The same record on every host, whichever of them the server runs on: it is made of the network's ports
alone, not of what a host knows of its own servers.
"""

import json
from collections.abc import Iterable, Mapping

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.ids import NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec, PortSpec
from nahtlos.model.nouns import ServerSpec
from nahtlos.physical.network import metadata_server
from nahtlos.physical.network.addressing import domain, name_servers, subnet_of
from nahtlos.physical.network.metadata_server import Record


def seed(
    server: ServerSpec, networks: Mapping[NetworkId, NetworkSpec], user_data: str = ""
) -> dict[str, str]:
    """The files of a NoCloud seed (`meta-data`, `user-data`, `vendor-data`, `network-config`), by name.
    Interfaces in the order of the server's ports."""
    nics = [nic(port, networks[port.network]) for port in server.ports]
    return metadata_server.seed(_record(server.id, nics, user_data))


def directory(network: NetworkConfig, networks: Iterable[NetworkConfig]) -> str:
    """The file of `network` for its metadata server: every server that has a port in it, with all the ports
    that `networks` tell of it."""
    servers = {port.server for port in network.ports}
    nics: dict[ServerId, dict[PortId, Record]] = {server: {} for server in servers}
    for other in networks:
        for port in other.ports:
            if port.server in servers:
                nics[port.server][port.id] = nic(port, other.spec)
    records = [_record(server, [n for _, n in sorted(nics[server].items())]) for server in sorted(servers)]
    return json.dumps({"network": network.spec.id, "servers": records}, indent=0)


def _record(server: ServerId, nics: list[Record], user_data: str = "") -> Record:
    return {"server": server, "nics": nics, "user_data": user_data}


def nic(port: PortSpec | PortConfig, spec: NetworkSpec) -> Record:
    """One interface as plain data."""
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
