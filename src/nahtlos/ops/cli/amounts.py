"""Amounts and short notations as people type them, read into values. Pure."""

import re
from collections.abc import Iterable

from nahtlos.model.errors import Refused
from nahtlos.model.ids import NetworkId, SecurityGroupId
from nahtlos.model.networking import AddressPair, PortBandwidth, Rate
from nahtlos.runtime.controllers.networks import PortRequest

_RATE = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kmg]?)(?:bit|bit/s|bps)?$", re.IGNORECASE)
_BYTES = re.compile(r"^([0-9]+)\s*([km]?)i?b?$", re.IGNORECASE)
_BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_OCTETS = {"": 1, "k": 1 << 10, "m": 1 << 20}
NONE = "none"


def rate(text: str, field: str, burst_bytes: int = 0) -> Rate | None:
    """`50M`, `1.5G`, `100k`, or bit/s; `none` is no limit."""
    if text.lower() == NONE:
        return None
    match = _RATE.match(text)
    if match is None:
        raise Refused(
            f"'{text}' is no rate", field=field, remedy="write it as 50M (Mbit/s), 1G, 500k or none"
        )
    bits = round(float(match.group(1)) * _BITS[match.group(2).lower()])
    return Rate(bits_per_second=bits, burst_bytes=burst_bytes)


def octets(text: str, field: str) -> int:
    """`64k`, `1M`, or bytes."""
    match = _BYTES.match(text)
    if match is None:
        raise Refused(f"'{text}' is no number of bytes", field=field, remedy="write it as 64k, 1M or 15000")
    return int(match.group(1)) * _OCTETS[match.group(2).lower()]


def per_cent(text: str, field: str) -> int:
    """`50%` or `50`: of one processor; `none` is 0."""
    if text.lower() == NONE:
        return 0
    if not text.removesuffix("%").isdecimal():
        raise Refused(
            f"'{text}' is no share", field=field, remedy="write it as 50% (of one processor), 200% or none"
        )
    return int(text.removesuffix("%"))


def rate_text(value: Rate | None) -> str:
    if value is None:
        return "not limited"
    bits = value.bits_per_second
    text = next(
        (f"{bits / size:g} {unit}" for size, unit in ((10**9, "Gbit/s"), (10**6, "Mbit/s")) if bits >= size),
        f"{bits / 1000:g} kbit/s",
    )
    return f"{text}, burst {value.burst_bytes} B" if value.burst_bytes else text


def pair(text: str, field: str = "allowed_pair") -> AddressPair:
    """`10.0.0.0/24` or `10.0.0.5,52:54:00:12:34:56`"""
    cidr, _, mac = text.partition(",")
    if not cidr:
        raise Refused(f"'{text}' is no pair", field=field, remedy="write it as CIDR or CIDR,MAC")
    return AddressPair(cidr=cidr, mac=mac)


def host_and_port(text: str, field: str) -> tuple[str, int]:
    """`10.0.0.5:80` or `[2001:db8::5]:80`"""
    address, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        raise Refused(f"'{text}' is no address and port", field=field, remedy="write it as 10.0.0.5:80")
    return address.removeprefix("[").removesuffix("]"), int(port)


def numbers(text: str, field: str) -> tuple[int, int | None]:
    """`80` or `80-90`, also `8/0` (ICMP type and code)."""
    match = re.match(r"^([0-9]+)(?:[-/:]([0-9]+))?$", text)
    if match is None:
        raise Refused(f"'{text}' is no range of ports", field=field, remedy="write it as 80 or 8000-8099")
    return int(match.group(1)), int(match.group(2)) if match.group(2) else None


PORT_OPTIONS = ("ip", "mac", "address", "group", "pair", "ingress", "egress", "queues")


def port_request(text: str) -> PortRequest:
    """`NET[,ip=A][,group=G]…`; address, group and pair may come several times."""
    network, *parts = text.split(",")
    given: dict[str, list[str]] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in PORT_OPTIONS:
            raise Refused(
                f"'{part}' in '{text}'",
                field="network",
                remedy=f"write NAME=VALUE; names: {_or(PORT_OPTIONS)}",
            )
        given.setdefault(name, []).append(value)
    for name in ("ip", "mac", "ingress", "egress", "queues"):
        if len(given.get(name, ())) > 1:
            raise Refused(f"'{name}' twice in '{text}'", field="network", remedy="give it once")
    queues = given.get("queues", ["1"])[0]
    if not queues.isdecimal():
        raise Refused(f"'{queues}' is no number", field="network", remedy="write queues=2")
    return PortRequest(
        network=NetworkId(network),
        ip=given.get("ip", [""])[0],
        mac=given.get("mac", [""])[0],
        addresses=tuple(given.get("address", ())),
        allowed_pairs=tuple(AddressPair(cidr=cidr) for cidr in given.get("pair", ())),
        security_groups=tuple(SecurityGroupId(group) for group in given.get("group", ())),
        bandwidth=PortBandwidth(
            ingress=rate(given["ingress"][0], "network") if "ingress" in given else None,
            egress=rate(given["egress"][0], "network") if "egress" in given else None,
        ),
        queues=int(queues),
    )


def _or(names: Iterable[str]) -> str:
    return ", ".join(names)
