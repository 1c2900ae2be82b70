"""How long programming a host takes, against the kernel's own batch tools in the same run.

The floor does what has to be done for the same ports and nothing else: `ip -batch` makes taps, enslaves them
and brings them up and sets neighbours, `bridge -batch` sets port flags and forwarding entries, `nft -f` loads
the very rules the driver made, all with everything known in advance, in another namespace of the same lab.
The driver, besides, compares with what is there, stores every tap's descriptor, serves DHCP, and remembers
what it did.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

from benchmarks.figures import Figures, Goal
from benchmarks.network_hosts import Host, World, server_port
from nahtlos.model.config import PortConfig
from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, SecurityGroupSpec, SecurityRule
from nahtlos.physical.network import device_names, tap
from nahtlos.physical.network.native import NativeNetwork

PORTS = 1000
AT_ONCE = 100
"""Servers that start together."""
MORE_PORTS = 10
FLOOR_GOAL = Goal(at_most=1.5, of_ratio=True)
GROUP, FIRST_PORT, RULE_CHANGES = SecurityGroupId("everybody"), 8000, 5
RULE_GOAL = Goal(at_most=100.0)
ADD_GOAL = Goal(at_most=20.0)
NOTHING = "nothing to do"


async def timed_ms(act: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await act()
    return (time.perf_counter() - began) * 1000


async def measure(figures: Figures, ports: int = PORTS) -> None:
    """Ports that live on host-1, as host-1 and as host-2 have to be told of them; the floor of each in
    the namespaces of host-3 and host-4, which have no driver's devices."""
    with World(4) as world:
        here, there, bare_here, bare_there = (world.compute[n] for n in range(4))
        for host in world.compute:
            await host.call(lambda d: d.host_init())
        for host in (here, there):
            await world.reconcile_host(host.name)
        placed = [world.place(server_port(n + 1), here.name) for n in range(ports)]

        remote = await timed_ms(lambda: world.reconcile_host(there.name))
        remote_floor = floor(bare_there, placed, rules(there), local=False)
        figures.add(
            f"{ports} ports of another host, programmed",
            remote,
            "ms",
            baseline=remote_floor,
        )

        local = await timed_ms(lambda: program(world, here, placed))
        local_floor = floor(bare_here, placed, rules(here), local=True)
        figures.add(
            f"{ports} ports of this host, programmed", local, "ms", baseline=local_floor, goal=FLOOR_GOAL
        )
        await again(figures, world, here, there, ports)
        await change_rule(figures, world, here)


async def program(world: World, host: Host, placed: list[PortConfig]) -> None:
    """As an agent does when many servers start together: the host's configuration, taps, and once more what
    is known of them only when they are there."""
    await world.reconcile_host(host.name)
    network = world.network

    async def taps(driver: NativeNetwork) -> None:
        for start in range(0, len(placed), AT_ONCE):
            chunk = placed[start : start + AT_ONCE]
            await asyncio.gather(*(driver.port_create(port, network, deliver=True) for port in chunk))

    await host.call(taps)
    await world.reconcile_host(host.name)


async def again(figures: Figures, world: World, here: Host, there: Host, ports: int) -> None:
    """One port more, and nothing at all."""
    idle_here, idle_there, more, worked = [], [], [], []
    for extra in range(MORE_PORTS):
        idle_here.append(await timed_ms(lambda: world.reconcile_host(here.name)))
        idle_there.append(await timed_ms(lambda: world.reconcile_host(there.name)))
        world.place(server_port(ports + extra + 1), here.name)
        before = time.process_time()
        more.append(await timed_ms(lambda: world.reconcile_host(there.name)))
        worked.append((time.process_time() - before) * 1000)
    figures.add(
        f"another host is told of one more port of {ports}, median",
        statistics.median(more),
        "ms",
        goal=ADD_GOAL,
        samples=MORE_PORTS,
    )
    figures.add("the same, longest", max(more), "ms", samples=MORE_PORTS)
    figures.add("the same, processor time", statistics.median(worked), "ms", samples=MORE_PORTS)
    for where, times in (("of this host", idle_here), ("of another host", idle_there)):
        figures.add(
            f"reconcile with {NOTHING}, {ports} ports {where}",
            statistics.median(times),
            "ms",
            samples=MORE_PORTS,
        )


async def change_rule(figures: Figures, world: World, here: Host) -> None:
    """All ports of the host are in one group; one of its rules becomes another, and is in force."""
    members = world.members(GROUP)
    world.groups = (group_of(FIRST_PORT),)
    await world.reconcile_host(here.name)
    times: list[float] = []
    for number in range(RULE_CHANGES):
        world.groups = (group_of(FIRST_PORT + 1 + number),)
        times.append(await timed_ms(lambda: world.reconcile_host(here.name)))
        if f"{FIRST_PORT + 1 + number}" not in rules(here):
            raise RuntimeError("the rule is not in force")
    figures.add(
        f"a changed rule reaches {members} ports, median",
        statistics.median(times),
        "ms",
        goal=RULE_GOAL,
        samples=RULE_CHANGES,
    )


def group_of(tcp_port: int) -> SecurityGroupSpec:
    rule = SecurityRule(direction=Direction.INGRESS, protocol="tcp", port_min=tcp_port, port_max=tcp_port)
    return SecurityGroupSpec(id=GROUP, rules=(SecurityRule(direction=Direction.EGRESS), rule))


def rules(host: Host) -> str:
    """The packet filter the driver made, to be loaded elsewhere."""
    return host.command("nft", "list", "ruleset")


def floor(host: Host, placed: list[PortConfig], ruleset: str, *, local: bool) -> float:
    """The same with batch tools, in ms. Names of devices are those of the driver."""
    vni = 100
    bridge, tunnel = device_names.bridge_name(vni), device_names.tunnel_name(vni)
    gate = device_names.gate_name(vni)
    before = [
        f"link add {bridge} type bridge forward_delay 0 mcast_snooping 0",
        f"link add {tunnel} type vxlan id {vni} local {host.node.address} dstport 4789 nolearning",
        f"link add {gate} type veth peer name {device_names.gate_port_name(vni)}",
        f"link set {tunnel} master {bridge} up",
        f"link set {bridge} up",
    ]
    host.command("ip", "-batch", "-", text="\n".join(before))
    host.command("sysctl", "-qw", f"net.ipv6.conf.{bridge}.disable_ipv6=0")
    devices, entries, neighbours = batches(placed, bridge, tunnel, local=local)
    began = time.perf_counter()
    if devices:
        host.command("ip", "-batch", "-", text="\n".join(devices))
    host.command("bridge", "-batch", "-", text="\n".join(entries))
    host.command("ip", "-batch", "-", text="\n".join(neighbours))
    host.command("nft", "-f", "-", text=ruleset)
    return (time.perf_counter() - began) * 1000


def batches(
    placed: list[PortConfig], bridge: str, tunnel: str, *, local: bool
) -> tuple[list[str], list[str], list[str]]:
    """Lines for `ip` (devices), `bridge`, and `ip` (neighbours)."""
    devices: list[str] = []
    entries: list[str] = []
    neighbours = [
        f"neigh replace {ip} lladdr {port.mac} dev {bridge} nud permanent"
        for port in placed
        for ip in port.all_addresses
    ]
    for port in placed:
        if local:
            name = device_names.tap_name(port.id)
            devices += [
                f"tuntap add {name} mode tap vnet_hdr",
                f"link set {name} alias {device_names.port_alias(port.id, port.mac)} txqueuelen {tap.QUEUE}"
                f" master {bridge} up",
            ]
            entries += [
                f"link set dev {name} learning off flood off neigh_suppress off",
                f"fdb replace {port.mac} dev {name} master static",
            ]
        else:
            entries += [
                f"fdb replace {port.mac} dev {tunnel} self permanent dst {port.vtep}",
                f"fdb replace {port.mac} dev {tunnel} master static",
            ]
    return devices, entries, neighbours
