"""The packet filter of a host: composed as one text, applied in one transaction, compared as data.

Owns the tables `netdev nahtlos` (the gates of moves, and DHCP kept on its own host) and `inet nahtlos`
(what servers may reach of the host that carries them: DHCP, and the gateway's ping). Never touches
another table.

Rules are compared with what the kernel listed right after they were last applied, because nft prints them
differently from how they are written. The elements of the gates' sets change by themselves and are
compared apart.
"""

import asyncio
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network.device_names import anycast_mac, bridge_name, gate_name, tunnel_name

TABLE = "nahtlos"
DEADLINE = 10.0


class Gate(msgspec.Struct, frozen=True, order=True):
    """Frames for `mac` from the tunnel enter the bridge through the gate, so that they may leave by the
    tunnel again."""

    vni: int
    mac: str
    port: PortId


class FilteredNetwork(msgspec.Struct, frozen=True, order=True):
    vni: int
    uplinks: tuple[str, ...]
    outward: str = ""
    """Port of the bridge that leads to an outside network; `service` is the address that this cloud answers
    at there for its own servers."""
    service: str = ""


class Ruleset(msgspec.Struct, frozen=True):
    """What the kernel has of ours."""

    gates: frozenset[Gate]
    fingerprint: str
    """Of everything but the gates' elements; empty if there is nothing."""


def set_name(vni: int) -> str:
    return f"moving{vni}"


NOT_BETWEEN_HOSTS = (
    # Every host answers DHCP for its own servers; the same question must not reach the others.
    "  chain questions {",
    "    ether type ip udp dport 67 drop",
    "    ether type ip6 udp dport 547 drop",
    "  }",
    # Nor does one host's advertisement: each tells its own servers.
    "  chain advertisements {",
    "    icmpv6 type vmap { nd-router-solicit : drop, nd-router-advert : drop, "
    "mld-listener-report : jump reports, mld-listener-done : jump reports, "
    "mld2-listener-report : jump reports }",
    "  }",
    # What a host's own routers and services listen to: the same on every host, and nobody else's business.
    "  chain reports {",
    "    ether saddr 02:6e:00:00:00:00-02:6e:ff:ff:ff:ff drop",
    "  }",
)


ASKED_OF_GATEWAYS = "{ echo-request, nd-neighbor-solicit, nd-neighbor-advert }"


# --- composing ---------------------------------------------------------------------------------------


def compose(networks: Iterable[FilteredNetwork], gates: Iterable[Gate]) -> str:
    """Both tables, replacing what is there of them."""
    networks, gates = sorted(networks), sorted(gates)
    lines = [_replaced("netdev"), f"table netdev {TABLE} {{", *(NOT_BETWEEN_HOSTS if networks else ())]
    for network in networks:
        lines += _gate_lines(network.vni, [g for g in gates if g.vni == network.vni])
        if network.outward:
            lines += _outward_lines(network)
    lines += ["}", _replaced("inet"), f"table inet {TABLE} {{", *_guard_lines(networks), "}"]
    return "\n".join(lines) + "\n"


def _replaced(family: str) -> str:
    return f"table {family} {TABLE}\ndelete table {family} {TABLE}"


def _gate_lines(vni: int, gates: Sequence[Gate]) -> list[str]:
    elements = ", ".join(f'{g.mac} comment "{g.port}"' for g in gates)
    return [
        f"  set {set_name(vni)} {{",
        "    type ether_addr",
        *([f"    elements = {{ {elements} }}"] if gates else []),
        "  }",
        f"  chain {tunnel_name(vni)} {{",
        f'    type filter hook ingress device "{tunnel_name(vni)}" priority -500; policy accept;',
        # One lookup for what is none of this, which is nearly everything.
        "    meta l4proto vmap { udp : jump questions, icmpv6 : jump advertisements }",
        f'    ether daddr @{set_name(vni)} fwd to "{gate_name(vni)}"',
        "  }",
    ]


def _outward_lines(network: FilteredNetwork) -> list[str]:
    """Every host tells and answers its own servers, with the same MAC and address: none of that gets out, and
    nobody outside asks or answers in its place. Frames with tags are for other networks."""
    mac = anycast_mac(network.vni)
    asked = f"arp daddr ip {network.service} drop"
    return [
        f"  chain in{network.vni} {{",
        f'    type filter hook ingress device "{network.outward}" priority -500; policy accept;',
        "    ether type { 0x8100, 0x88a8 } drop",
        f"    ether saddr {mac} drop",
        f"    ether daddr {mac} drop",
        "    ether type ip udp sport 67 drop",
        "    ether type ip udp dport 67 drop",
        "    ether type ip6 udp sport 547 drop",
        "    ether type ip6 udp dport 547 drop",
        f"    {asked}",
        "  }",
        f"  chain out{network.vni} {{",
        f'    type filter hook egress device "{network.outward}" priority -500; policy accept;',
        f"    ether saddr {mac} drop",
        "    ether type ip udp dport 67 drop",
        "    ether type ip6 udp dport 547 drop",
        f"    {asked}",
        "  }",
    ]


def _guard_lines(networks: Sequence[FilteredNetwork]) -> list[str]:
    """By lookups, however many networks there are: where connections are tracked by way of br_netfilter,
    bridged packets pass `route` as well."""
    receive = ["  chain receive {", "    type filter hook input priority -10; policy accept;"]
    route = ["  chain route {", "    type filter hook forward priority -10; policy accept;"]
    if networks:
        bridges = _names(bridge_name(network.vni) for network in networks)
        ways = ", ".join(f'"{a}" . "{b}"' for network in networks for a, b in _ways(network))
        receive += [
            f"    iifname != {bridges} accept",
            "    udp dport 67 accept",
            "    icmp type echo-request accept",
            f"    icmpv6 type {ASKED_OF_GATEWAYS} accept",
            "    drop",
        ]
        route += [
            f"    iifname . oifname {{ {ways} }} accept",
            f"    iifname {bridges} drop",
            f"    oifname {bridges} drop",
        ]
    return [*receive, "  }", *route, "  }"]


def _ways(network: FilteredNetwork) -> Iterable[tuple[str, str]]:
    """Where packets of a network may come from and go to."""
    bridge = bridge_name(network.vni)
    yield bridge, bridge
    for uplink in network.uplinks:
        yield bridge, uplink
        yield uplink, bridge


def _names(names: Iterable[str]) -> str:
    return "{ " + ", ".join(f'"{name}"' for name in names) + " }"


def digest(networks: Iterable[FilteredNetwork]) -> str:
    """Tells whether rules other than gates would be composed differently."""
    return hashlib.sha256(compose(networks, ()).encode()).hexdigest()


def gate_commands(add: Iterable[Gate], remove: Iterable[Gate]) -> str:
    lines = [_element("add", gate, f' comment "{gate.port}"') for gate in sorted(add)]
    lines += [_element("delete", gate, "") for gate in sorted(remove)]
    return "\n".join(lines) + "\n" if lines else ""


def _element(verb: str, gate: Gate, comment: str) -> str:
    return f"{verb} element netdev {TABLE} {set_name(gate.vni)} {{ {gate.mac}{comment} }}"


# --- reading -----------------------------------------------------------------------------------------


def decode(listing: bytes) -> Ruleset:
    """From one or several `nft -j list ruleset ...`, one document a line."""
    documents = [msgspec.json.decode(line) for line in listing.splitlines() if line.strip()]
    objects = [entry for document in documents for entry in document.get("nftables", [])]
    gates: set[Gate] = set()
    rules: list[dict[str, Any]] = []
    for entry in cast("list[dict[str, dict[str, Any]]]", objects):
        for kind, value in entry.items():
            if _ours(kind, value):
                gates.update(_gates(value) if kind == "set" else ())
                rules.append({kind: {k: v for k, v in value.items() if k not in ("handle", "elem")}})
    text = msgspec.json.encode(rules, order="deterministic")
    return Ruleset(frozenset(gates), hashlib.sha256(text).hexdigest() if rules else "")


def _ours(kind: str, value: dict[str, Any]) -> bool:
    name = value.get("name") if kind == "table" else value.get("table")
    return name == TABLE and value.get("family") in ("netdev", "inet")


def _gates(value: dict[str, Any]) -> Iterable[Gate]:
    name = str(value.get("name", ""))
    if not name.startswith("moving"):
        return
    for element in cast("list[str | dict[str, dict[str, str]]]", value.get("elem", [])):
        inner = {"val": element} if isinstance(element, str) else element["elem"]
        yield Gate(int(name.removeprefix("moving")), inner["val"], PortId(inner.get("comment", "")))


# --- acting ------------------------------------------------------------------------------------------


async def run(arguments: Sequence[str], text: str = "", *, enter: Sequence[str] = ()) -> bytes:
    """nft's output; `enter` is what to put before it to run it elsewhere. Unavailable with its words if it
    refuses, is missing or does not end in time."""
    program = shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        raise Unavailable("nft is not installed", field="network", remedy="apt-get install nftables")
    process = await asyncio.create_subprocess_exec(
        *enter,
        program,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            out, error = await process.communicate(text.encode())
    except TimeoutError as late:
        raise Unavailable(f"nft did not end within {DEADLINE:.0f} s", field="network") from late
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Unavailable(f"nft: {error.decode(errors='replace').strip()[:400]}", field="network")
    return out


async def apply(text: str) -> None:
    """One transaction."""
    await run(("-f", "-"), text)


async def check(text: str) -> str:
    """Why the kernel would refuse `text`; empty if it would not. Changes nothing."""
    try:
        await run(("-c", "-f", "-"), text)
    except Unavailable as error:
        return error.message
    return ""


async def listing() -> Ruleset:
    return decode(await list_families("netdev", "inet"))


async def list_families(*families: str) -> bytes:
    """One JSON document per line: every table of each family. What is not asked for costs nothing."""
    return await run(("-j", "; ".join(f"list ruleset {family}" for family in families)))
