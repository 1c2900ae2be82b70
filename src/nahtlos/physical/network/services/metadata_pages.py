"""What is told to a server about itself, as text: EC2's pages, a NoCloud seed, network-config version 2.

Pure, and of Python's own library only: `metadata_server` runs without anything else. A record is plain data:
`server`, `user_data`, and `nics` with `network`, `mac`, `mtu`, `domain`, `addresses`, `gateways`,
`name_servers` (see `metadata`).
"""

import json
from typing import Any

VERSIONS = ("latest", "2009-04-04")
Record = dict[str, Any]


def pages(record: Record, nic: Record) -> dict[str, str]:
    """Every page of one server by its path, seen from interface `nic`."""
    facts = meta_data(record, nic)
    config = network_config(record["nics"])
    found: dict[str, str] = {}
    for version in VERSIONS:
        found |= {f"/{version}/meta-data/{name}": value for name, value in facts.items()}
        found[f"/{version}/network-config"] = config
        if record.get("user_data"):
            found[f"/{version}/user-data"] = record["user_data"]
    found |= {f"/nocloud/{name}": text for name, text in seed(record).items()}
    return found


def meta_data(record: Record, nic: Record) -> dict[str, str]:
    """EC2's names for what is known of a server."""
    addresses = [a.split("/")[0] for a in nic["addresses"]]
    first = {family: next((a for a in addresses if (":" in a) == (family == 6)), "") for family in (4, 6)}
    named = {"local-ipv4": first[4], "ipv6": first[6]}
    return {
        "instance-id": record["server"],
        "hostname": record["server"],
        "local-hostname": record["server"],
        "mac": nic["mac"],
        **{name: value for name, value in named.items() if value},
        "public-keys": "",
    }


def seed(record: Record) -> dict[str, str]:
    """The files of a NoCloud seed. JSON is YAML."""
    name = record["server"]
    return {
        "meta-data": json.dumps({"instance-id": name, "local-hostname": name}, indent=1) + "\n",
        "user-data": record.get("user_data") or "#cloud-config\n{}\n",
        "vendor-data": "",
        "network-config": network_config(record["nics"]),
    }


def network_config(nics: list[Record]) -> str:
    """Version 2, interfaces named by their MAC. The first one's way out is preferred."""
    ethernets = {f"nic{number}": _ethernet(nic, 100 * (number + 1)) for number, nic in enumerate(nics)}
    return json.dumps({"version": 2, "ethernets": ethernets}, indent=1) + "\n"


def _ethernet(nic: Record, metric: int) -> Record:
    routes = [
        {"to": "::/0" if ":" in gateway else "0.0.0.0/0", "via": gateway, "metric": metric}
        for gateway in nic["gateways"]
    ]
    return {
        "match": {"macaddress": nic["mac"]},
        "mtu": nic["mtu"],
        "dhcp4": False,
        "dhcp6": False,
        "addresses": nic["addresses"],
        "nameservers": {"addresses": nic["name_servers"], "search": [nic["domain"]]},
        **({"routes": routes} if routes else {}),
    }


def page(found: dict[str, str], path: str) -> str | None:
    """A page, or the list of what is below `path`; None if there is neither."""
    path = "/" + path.strip("/")
    if path in found and not (path.endswith("/public-keys") and not found[path]):
        return found[path]
    if path in found:
        return ""
    below = path.rstrip("/") + "/"
    names = {name[len(below) :] for name in found if name.startswith(below)}
    if not names:
        return None
    entries = sorted({first + ("/" if rest else "") for first, _, rest in (n.partition("/") for n in names)})
    return "\n".join(entries)
