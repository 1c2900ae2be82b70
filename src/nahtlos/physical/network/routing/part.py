"""Routers, floating addresses, outbound translation and load balancers, as a part of the native driver.

Owns the order of a pass: namespaces that are no longer wanted go, the others are made so, their packet
filters are applied, addresses that this host answers for since now are announced, load balancers are served.

A gateway's place can be taken over from another host without breaking a connection:

    new host   gateway_prepare          its namespace is there and complete, but nothing leads to it
    old host   gateway_state_export     what connection tracking remembers of the gateway
    new host   gateway_state_import
    new host   reconcile to a configuration that names it: it answers to the outside
    old host   reconcile to one by which it passes on: it leads out what others send, and answers no more
    other hosts reconcile to one that names the new host
    both       export and import again: connections that began in between
    old host   reconcile to one without: its namespace goes
"""

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Error, NotFound, Unavailable
from nahtlos.model.ids import LoadBalancerId, PortId, RouterId
from nahtlos.model.inventory import LoadBalancerStatus
from nahtlos.physical.network import kernel, links, nft
from nahtlos.physical.network.items import Item
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.plan import Place
from nahtlos.physical.network.programs import Programs
from nahtlos.physical.network.routing import announcement, translation
from nahtlos.physical.network.routing import plan as decisions
from nahtlos.physical.network.routing.balancer import Balancers, BalancerStatus
from nahtlos.physical.network.routing.connections import Connections
from nahtlos.physical.network.routing.facts import Proxy, Space
from nahtlos.physical.network.routing.spaces import Found, Spaces
from nahtlos.physical.ports import Supervisor
from nahtlos.physical.settings import AgentSettings


class Routing(Part):
    name = "routing"

    def __init__(self, settings: AgentSettings, supervisor: Supervisor, programs: Programs) -> None:
        self._place = Place(settings.host, settings.role, settings.address, kernel.forces_forwarding())
        self._spaces = Spaces(settings.run_dir)
        self._connections = Connections(self._spaces.namespaces)
        self._balancers = Balancers(settings.run_dir, settings.state_dir / "log", supervisor, programs)
        self._programs = programs
        self._lock = asyncio.Lock()

    @property
    def writes(self) -> int:
        """Netlink requests so far that could change something."""
        return self._spaces.writes

    def namespace(self, name: str) -> Path:
        """Where to enter `router-<n>`, `gateway-<n>` or `balancer-<n>`."""
        return self._spaces.namespaces.path(name)

    async def capabilities(self) -> dict[str, str]:
        program = self._programs.found("haproxy")
        return {
            "routers": "used: a namespace per router, answered by the bridge",
            "load balancers": f"used: {program}" if program else "missing: haproxy (apt-get install haproxy)",
        }

    def items(self, config: HostConfig) -> Iterable[Item]:
        if not config.routers and not config.load_balancers:
            return ()
        return decisions.bridge_items(decisions.site(config, self._place))

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        async with self._lock:
            return await self._reconcile(config)

    async def _reconcile(self, config: HostConfig) -> tuple[str, ...]:
        at = decisions.site(config, self._place)
        wanted = decisions.spaces(at)
        surplus = self._spaces.surplus(wanted)
        here = [b.spec for b in at.balancers if b.spec.host == self._place.host]
        await self._balancers.end_others(b.id for b in here)
        if surplus:
            await asyncio.to_thread(self._spaces.remove, surplus)
        if not wanted and not surplus and not self._spaces.known:
            return ()
        found = await self._make(wanted)
        failures: list[Error] = [*found.failures, *self._missing_interfaces(at)]
        words = found.words
        for spec in here:
            try:
                namespace = self.namespace(decisions.balancer_name(spec.number))
                words += await self._balancers.serve(spec, namespace)
            except Error as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return tuple(words)

    async def _make(self, wanted: tuple[Space, ...], *, silent: str = "") -> Found:
        found = await asyncio.to_thread(self._spaces.make, wanted, silent=silent)
        for space in found.filters:
            await self._filter(space)
        if found.announce:
            await asyncio.to_thread(_announce, found.announce)
        return found

    async def _filter(self, space: Space) -> None:
        enter = ("nsenter", f"--net={self.namespace(space.name)}")
        await nft.run(("-f", "-"), space.rules or translation.NOTHING, enter=enter)
        await asyncio.to_thread(self._spaces.filtered, space)

    def _missing_interfaces(self, at: decisions.Site) -> list[Error]:
        with Netlink() as host:
            there = links.read_links(host)
        return [
            Unavailable(
                f"interface {router.interface} of router {router.spec.id} does not exist",
                field="gateway",
                remedy="connect it, or name another interface",
            )
            for router in at.routers
            if router.spec.gateway is not None
            and router.spec.gateway.host == self._place.host
            and router.interface
            and router.interface not in there
        ]

    # --- moving a gateway's place ----------------------------------------------------------------------

    async def gateway_prepare(self, config: HostConfig, router: RouterId) -> None:
        """Here, where `config` says the gateway of `router` will be: everything but what leads to it. It
        stays until a configuration wants it, or `gateway_abandon`. Repeatable."""
        async with self._lock:
            at = decisions.site(config, self._place)
            wanted = next((r for r in at.routers if r.spec.id == router), None)
            if wanted is None or wanted.spec.gateway is None or not at.attached(wanted):
                raise NotFound(f"router {router} has no gateway or no network here", field="router")
            name = decisions.gateway_name(wanted.spec.number)
            found = await self._make(decisions.spaces(at), silent=name)
            if found.failures:
                raise found.failures[0]

    async def gateway_abandon(self, number: int) -> None:
        """What was prepared goes with the next reconcile that does not want it."""
        async with self._lock:
            self._spaces.abandon(decisions.gateway_name(number))

    async def gateway_state_export(self, number: int) -> bytes:
        """What connection tracking remembers of the gateway of router `number`, in a form that only this
        driver reads."""
        return await asyncio.to_thread(self._connections.read, decisions.gateway_name(number))

    async def gateway_state_import(self, number: int, state: bytes) -> int:
        """Take it up, over what may be there; returns how many connections. Repeatable."""
        return await asyncio.to_thread(self._connections.write, decisions.gateway_name(number), state)

    # --- load balancers --------------------------------------------------------------------------------

    async def load_balancers(self) -> tuple[LoadBalancerStatus, ...]:
        """Those that this host carries and that answer at once."""
        return await self._balancers.statuses()

    async def balancer_status(self, balancer: LoadBalancerId) -> BalancerStatus:
        """Of one that this host carries."""
        return await self._balancers.status(balancer)


def _announce(proxies: Iterable[Proxy]) -> None:
    with Netlink() as host:
        devices = links.read_links(host)
    by_device: dict[str, list[str]] = {}
    for proxy in proxies:
        by_device.setdefault(proxy.device, []).append(proxy.ip)
    for name, ips in by_device.items():
        if name in devices:
            announcement.announce(name, devices[name].mac, ips)
