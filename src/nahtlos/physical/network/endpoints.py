"""Where servers are plugged in: taps on this host, and their descriptors in the supervisor's store.

Owns the devices `tp*` and the stored descriptors: `tap.<port>`, and `tap.<port>/1` onwards for further
queues. Never decides where a port belongs.
"""

import contextlib
import os
import socket

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Conflict, Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import device_names, kernel, links, netlink, plan, tap
from nahtlos.physical.network.items import Setting
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Request
from nahtlos.physical.network.plan import Change
from nahtlos.physical.network.shared import Shared, index_of, local


class Endpoints:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._descriptors: dict[PortId, list[int]] = {}

    def close(self) -> None:
        """Lets go of this process's duplicates. The taps stay."""
        for fds in self._descriptors.values():
            for fd in fds:
                os.close(fd)
        self._descriptors.clear()

    async def create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        self._shared.touch(port)
        await self._shared.ensure_network(network)
        name = device_names.tap_name(port.id)
        fds = await self.descriptors(port.id)
        there = links.read_link(self._shared.fast(), name)
        if there is not None and not fds:
            raise Conflict(
                f"tap {name} of port {port.id} exists, but its descriptor is not in the supervisor's store",
                field="port",
                remedy="end the process that holds it (its server's VMM), then try again",
            )
        if there is None:
            if fds:
                await self._drop_descriptors(port.id)
            fds = await self._new_tap(port)
        await self._add_queues(port, fds)
        tap.refuse_own(fds[0], netlink.mac_bytes(port.mac), queues=port.queues)
        self._attach(port, network, there)
        for part in self._shared.parts:
            await part.port_created(local(port, network))
        if there is not None:
            self._empty_unless_in_use(port, network, fds)
        if deliver:
            self._deliver(port, network, new=there is None)

    async def _new_tap(self, port: PortConfig) -> list[int]:
        """Stored before anything can reach it: from here on it outlives this process. Made for many queues
        also where there is one: the next VMM's descriptor becomes another (see `replacement`)."""
        name = device_names.tap_name(port.id)
        fd = tap.open_tap(name, many_queues=True)
        self._descriptors[port.id] = [fd]
        kernel.write_settings([Change(Setting(f"net/ipv6/conf/{name}/disable_ipv6", "1"))])
        await self._shared.supervisor.store_fd(stored_name(port.id, 0), fd)
        return self._descriptors[port.id]

    async def _add_queues(self, port: PortConfig, fds: list[int]) -> None:
        """Those that are missing. A tap that was made for one queue keeps to it: its server knows no more."""
        if not tap.takes_queues(fds[0]):
            return
        for number in range(len(fds), port.queues):
            fds.append(tap.open_tap(device_names.tap_name(port.id), many_queues=True))
            await self._shared.supervisor.store_fd(stored_name(port.id, number), fds[number])

    def _attach(self, port: PortConfig, network: NetworkConfig, there: LinkInfo | None) -> None:
        """Enslaved and up. Silent from the first moment; what delivers already is left delivering."""
        name, bridge = device_names.tap_name(port.id), index_of(device_names.bridge_name(network.spec.vni))
        requests: list[Request] = []
        alias, mtu = device_names.port_alias(port.id, port.mac.lower()), network.spec.mtu
        if there is None or there.alias != alias:
            requests.append(links.configure(name, mtu=mtu, alias=alias, queue=tap.QUEUE))
        if there is None or there.master != bridge:
            requests.append(links.configure(name, master=bridge))
            requests.append(links.set_flood(index_of(name), plan.SILENT, name))
        if there is None or not there.up:
            requests.append(links.no_queue(index_of(name), name))
            requests.append(links.configure(name, up=True))
        self._shared.fast().change(requests)

    def _link(self, port: PortConfig) -> LinkInfo:
        """Its tap."""
        name = device_names.tap_name(port.id)
        link = links.read_link(self._shared.fast(), name)
        if link is None:
            raise Unavailable(f"tap {name} of port {port.id} has gone", field="port", remedy="try again")
        return link

    def _empty_unless_in_use(self, port: PortConfig, network: NetworkConfig, fds: list[int]) -> None:
        """Nothing that an earlier attempt left behind is ever delivered."""
        sock, name = self._shared.fast(), device_names.tap_name(port.id)
        index = index_of(name)
        if sock.forwarding_of(index_of(device_names.bridge_name(network.spec.vni)), port.mac) == index:
            return
        if self._link(port).flood != plan.SILENT:
            sock.change([links.set_flood(index, plan.SILENT, name)])
        tap.empty(fds)

    def _deliver(self, port: PortConfig, network: NetworkConfig, *, new: bool) -> None:
        sock, name = self._shared.fast(), device_names.tap_name(port.id)
        index, bridge = index_of(name), index_of(device_names.bridge_name(network.spec.vni))
        requests: list[Request] = []
        if new or self._link(port).flood != plan.DELIVERING:
            requests.append(links.set_flood(index, plan.DELIVERING, name))
        if new or sock.forwarding_of(bridge, port.mac) != index:
            requests.append(netlink.forward_to_port(index, port.mac))
        sock.change(requests)

    async def delete(self, port: PortId) -> None:
        self._shared.in_motion.add(port)
        name = device_names.tap_name(port)
        with contextlib.suppress(OSError):
            socket.if_nametoindex(name)
            self._shared.fast().change([links.delete(name)])
        await self._drop_descriptors(port)
        self._shared.baseline.applied.dropped.pop(port, None)
        self._shared.held_frame(port).unlink(missing_ok=True)
        for part in self._shared.parts:
            await part.port_deleted(port, name)

    # --- descriptors ---------------------------------------------------------------------------------

    async def descriptors(self, port: PortId) -> list[int]:
        """This process's duplicates of a tap's descriptors, one per queue; an agent that was restarted
        fetches them. Empty: there is no tap."""
        if port not in self._descriptors:
            fds: list[int] = []
            while (fd := await self._shared.supervisor.fetch_fd(stored_name(port, len(fds)))) is not None:
                fds.append(fd)
            if not fds:
                return []
            self._descriptors[port] = fds
        return self._descriptors[port]

    async def required(self, port: PortId) -> list[int]:
        fds = await self.descriptors(port)
        if not fds:
            raise Unavailable(f"port {port} has no tap on this host", field="port")
        return fds

    async def replace(self, port: PortId, queues: list[int]) -> None:
        """These descriptors, queues of the same tap, take the place of those it has. They are the caller's no
        more. One by one, lowest first: the kernel puts the last queue in the place of one that goes."""
        for number, fd in enumerate(self._descriptors.pop(port, ())):
            os.close(fd)
            await self._shared.supervisor.store_fd(stored_name(port, number), queues[number])
        for number, fd in enumerate(queues):
            await self._shared.supervisor.store_fd(stored_name(port, number), fd)
        self._descriptors[port] = queues

    async def _drop_descriptors(self, port: PortId) -> None:
        for fd in self._descriptors.pop(port, ()):
            os.close(fd)
        first = stored_name(port, 0)
        names = await self._shared.supervisor.stored()
        ours = [name for name in names if name == first or name.startswith(f"{first}/")]
        for name in sorted(ours, reverse=True):  # the first goes last: without it there are none
            await self._shared.supervisor.drop_fd(name)


def stored_name(port: PortId, queue: int) -> str:
    """Under which the supervisor holds a descriptor. No port's name has a `/`."""
    return f"tap.{port}/{queue}" if queue else f"tap.{port}"
