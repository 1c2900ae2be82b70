"""The cables of a lab: network namespaces as hosts, and the links between them.

Owns the namespaces `nl-<lab>-*` and what connects them. Knows nothing of tenant networks: those are made
by the agents' network driver on top of the underlay laid here.

    nl-L-sw       a switch (bridge, mtu 1600)             underlay 10.99.0.0/24, `eth0` of each:
    nl-L-ctl      the orchestrator                        .1
    nl-L-edge-1   holds the uplink (`out0`)               .5
    nl-L-host-i   runs servers                            .10 + i
    nl-L-client   outside: 203.0.113.10 on `eth0`, reaches the cloud by the edge, 203.0.113.1
"""

import ctypes
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import links, netlink
from nahtlos.physical.network.netlink import Netlink

NAMESPACES = Path("/run/netns")
UNDERLAY_MTU = 1600
"""A tenant's 1500 and the tunnel's 50 fit, with room to spare."""
OUTSIDE_GATEWAY, OUTSIDE_CLIENT = "203.0.113.1", "203.0.113.10"
SWITCH, CONTROL, EDGE, CLIENT = "sw", "ctl", "edge-1", "client"
MAX_HOSTS = 200
DEADLINE = 20.0
NEAR_INDEX = 100
LAB_NAME = re.compile(r"^[a-z]([a-z0-9-]{0,10}[a-z0-9])?$")
NODE_NAME = re.compile(r"^(sw|ctl|client|edge-[0-9]+|host-[0-9]+)$")
_CLONE_NEWNET = 0x40000000
_SETTINGS = {
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}

T = TypeVar("T")


class Node(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    namespace: str
    address: str
    """On `eth0`; empty for the switch."""
    role: HostRole | None = None
    """Of the host that it stands for; None for the switch, the orchestrator's node and the outside."""

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        return ("nsenter", f"--net={NAMESPACES / self.namespace}")


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything of a lab is."""

    lab: str
    switch: Node
    control: Node
    edge: Node
    hosts: tuple[Node, ...]
    client: Node

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.switch, self.control, self.edge, *self.hosts, self.client)

    @property
    def underlay(self) -> tuple[Node, ...]:
        """Nodes with a cable to the switch."""
        return (self.control, self.edge, *self.hosts)

    def node(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(n.name for n in self.nodes)
        raise NotFound(f"lab {self.lab} has no node '{name}'", field="node", remedy=f"one of {known}")


# --- names -------------------------------------------------------------------------------------------


def checked_lab(lab: str) -> str:
    if not LAB_NAME.match(lab):
        raise Refused(
            f"'{lab}' is no valid name for a lab",
            field="lab",
            remedy="use 1 to 12 lower-case letters, digits and '-', starting with a letter",
        )
    return lab


def namespace_of(lab: str, node: str) -> str:
    return f"nl-{lab}-{node}"


def node_of(lab: str, namespace: str) -> str | None:
    """The node that `namespace` is in `lab`, if it is one. Another lab's name may begin with this one's."""
    prefix = namespace_of(lab, "")
    name = namespace.removeprefix(prefix)
    return name if namespace.startswith(prefix) and NODE_NAME.match(name) else None


def describe(lab: str, hosts: int) -> Topology:
    """The layout of a lab, whether it exists or not."""
    checked_lab(lab)
    if not 1 <= hosts <= MAX_HOSTS:
        raise Refused(f"a lab of {hosts} hosts", field="hosts", remedy=f"use 1 to {MAX_HOSTS}")

    def node(name: str, address: str, role: HostRole | None = None) -> Node:
        return Node(name=name, namespace=namespace_of(lab, name), address=address, role=role)

    return Topology(
        lab=lab,
        switch=node(SWITCH, ""),
        control=node(CONTROL, "10.99.0.1"),
        edge=node(EDGE, "10.99.0.5", HostRole.EDGE),
        hosts=tuple(node(f"host-{i}", f"10.99.0.{10 + i}", HostRole.COMPUTE) for i in range(1, hosts + 1)),
        client=node(CLIENT, OUTSIDE_CLIENT),
    )


def namespaces_of(lab: str) -> tuple[str, ...]:
    """Namespaces of `lab` that exist."""
    try:
        names = [p.name for p in NAMESPACES.iterdir()]
    except FileNotFoundError:
        return ()
    return tuple(sorted(n for n in names if node_of(lab, n) is not None))


# --- inside a namespace ------------------------------------------------------------------------------


def enter_namespace(namespace: str) -> None:
    """Moves the calling thread, and what it starts from now on, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"network namespace {namespace} does not exist", field="lab") from error
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise Unavailable(f"cannot enter {namespace}: {os.strerror(code)}", remedy="run as root")
    finally:
        os.close(fd)


def within(namespace: str, act: Callable[[], T]) -> T:
    """What `act` returns when called in `namespace`: in a thread of its own, so that the caller stays where
    it is."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            enter_namespace(namespace)
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"in-{namespace}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _apply_settings() -> None:
    for path, value in _SETTINGS.items():
        file = Path("/proc/sys") / path
        if file.exists():
            file.write_text(value)


def _prepare(namespace: str) -> Netlink:
    """Settings and loopback; returns a socket that stays in the namespace."""

    def act() -> Netlink:
        _apply_settings()
        socket = Netlink()
        socket.change([links.configure("lo", up=True)])
        return socket

    return within(namespace, act)


# --- creating and removing ---------------------------------------------------------------------------


def create(lab: str, hosts: int) -> Topology:
    """Namespaces, cables and addresses. Repeatable; what exists is left as it is."""
    topology = describe(lab, hosts)
    there = set(namespaces_of(lab))
    _ip_batch([f"netns add {n.namespace}" for n in topology.nodes if n.namespace not in there])
    sockets = {node.name: _prepare(node.namespace) for node in topology.nodes}
    try:
        _lay_underlay(topology, sockets)
        _lay_outside(topology, sockets)
        _await_carriers(topology, sockets)
    finally:
        for socket in sockets.values():
            socket.close()
    return topology


def destroy(lab: str) -> tuple[str, ...]:
    """Removes the namespaces of a lab, whatever their number; returns their names. Processes in them are
    not ended (see cleanup)."""
    names = namespaces_of(checked_lab(lab))
    _ip_batch([f"netns delete {name}" for name in names])
    return names


def _ip_batch(lines: Sequence[str]) -> None:
    if lines:
        _run(("ip", "-batch", "-"), "".join(f"{line}\n" for line in lines))


def _run(command: Sequence[str], text: str) -> None:
    try:
        subprocess.run(command, input=text, text=True, capture_output=True, check=True, timeout=DEADLINE)
    except FileNotFoundError as error:
        raise Unavailable(
            f"{command[0]} is not installed", remedy="apt-get install iproute2 nftables"
        ) from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {str(error.stderr).strip()[:400]}", field="lab") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command)} did not end within {DEADLINE:.0f} s", field="lab") from error


def _switch_port(node: str) -> str:
    return f"p-{node}"


def _lay_underlay(topology: Topology, sockets: dict[str, Netlink]) -> None:
    switch = sockets[SWITCH]
    switch.change([links.create_bridge("sw0", UNDERLAY_MTU), links.configure("sw0", up=True)])
    for node in topology.underlay:
        if "eth0" not in links.read_links(sockets[node.name]):
            _plug(switch, _switch_port(node.name), node, "eth0", UNDERLAY_MTU)
    bridge = links.read_links(switch)["sw0"].index
    ports = [_switch_port(node.name) for node in topology.underlay]
    switch.change([links.configure(port, master=bridge, up=True) for port in ports])
    for node in topology.underlay:
        _bring_up(sockets[node.name], "eth0", f"{node.address}/24")


def _lay_outside(topology: Topology, sockets: dict[str, Netlink]) -> None:
    edge, client = sockets[EDGE], sockets[CLIENT]
    if "eth0" not in links.read_links(client):
        _plug(edge, "out0", topology.client, "eth0", 1500)
    _bring_up(edge, "out0", f"{OUTSIDE_GATEWAY}/24")
    _bring_up(client, "eth0", f"{OUTSIDE_CLIENT}/24")
    client.change([netlink.default_route(OUTSIDE_GATEWAY)])


def _await_carriers(topology: Topology, sockets: dict[str, Netlink]) -> None:
    """The kernel notes a carrier a moment after both ends are up; until then frames are dropped."""
    wanted = [(SWITCH, _switch_port(n.name)) for n in topology.underlay]
    wanted += [(n.name, "eth0") for n in (*topology.underlay, topology.client)] + [(EDGE, "out0")]
    deadline = time.monotonic() + DEADLINE
    while waiting := [(n, d) for n, d in wanted if not links.read_links(sockets[n])[d].running]:
        if time.monotonic() >= deadline:
            names = ", ".join(f"{device} of {node}" for node, device in waiting)
            raise Unavailable(f"no carrier on {names}", field="lab")
        wanted = waiting
        time.sleep(0.002)


def _plug(socket: Netlink, name: str, far: Node, far_name: str, mtu: int) -> None:
    """A cable from the namespace of `socket` to `far`. The near end takes an index the far one cannot have:
    with equal ones the kernel mistakes the pair for one device and takes a second to note the carrier."""
    fd = os.open(NAMESPACES / far.namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        index = NEAR_INDEX + max(link.index for link in links.read_links(socket).values())
        socket.change([links.create_veth(name, far_name, mtu, peer_namespace=fd, index=index)])
    finally:
        os.close(fd)


def _bring_up(socket: Netlink, device: str, cidr: str) -> None:
    index = links.read_links(socket)[device].index
    socket.change([links.configure(device, up=True), netlink.address(index, cidr)])


# --- faults ------------------------------------------------------------------------------------------


def set_link(topology: Topology, node: str, *, up: bool) -> None:
    """Pulls the cable between a node and the switch, or plugs it in again: the carrier is lost."""
    port = _switch_port(_cabled(topology, node).name)
    with within(topology.switch.namespace, Netlink) as switch:
        switch.change([links.configure(port, up=up)])


def stall(topology: Topology, node: str, *, on: bool) -> None:
    """Swallows every frame to and from a node while its link looks fine, or lets them pass again."""
    port = _switch_port(_cabled(topology, node).name)
    table = f"stall-{node}"
    text = f"table bridge {table}\ndelete table bridge {table}\n"
    if on:
        text += (
            f"table bridge {table} {{\n  chain pass {{\n"
            "    type filter hook forward priority 0; policy accept;\n"
            f'    iifname "{port}" drop\n    oifname "{port}" drop\n  }}\n}}\n'
        )
    _run((*topology.switch.enter, "nft", "-f", "-"), text)


def _cabled(topology: Topology, node: str) -> Node:
    found = topology.node(node)
    if found not in topology.underlay:
        raise Refused(f"{node} has no cable to the switch", field="node")
    return found
