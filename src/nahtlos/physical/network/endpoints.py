"""Where servers are plugged in: taps on this host, and their descriptors in the supervisor's store.

Owns the devices `tp*` and the stored descriptors `tap.*`. Never decides where a port belongs.
"""

import contextlib
import os
import socket

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import PortId
from nahtlos.physical.network import kernel, links, netlink, plan, tap
from nahtlos.physical.network.plan import Change, Setting
from nahtlos.physical.network.shared import Shared, index_of, local


class Endpoints:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._descriptors: dict[PortId, int] = {}

    def close(self) -> None:
        """Lets go of this process's duplicates. The taps stay."""
        for fd in self._descriptors.values():
            os.close(fd)
        self._descriptors.clear()

    async def create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        self._shared.touch(port)
        await self._shared.ensure_network(network)
        name = plan.tap_name(port.id)
        fd = await self.descriptor(port.id)
        there = links.read_links(self._shared.fast()).get(name)
        if there is not None and fd is None:
            raise Conflict(
                f"tap {name} of port {port.id} exists, but its descriptor is not in the supervisor's store",
                field="port",
                remedy="end the process that holds it (its server's VMM), then try again",
            )
        if there is None:
            await self._drop_descriptor(port.id)
            fd = await self._new_tap(port, network)
        assert fd is not None
        self._attach(port, network)
        for part in self._shared.parts:
            await part.port_created(local(port, network))
        entry = self._shared.fast().forwarding_of(index_of(plan.bridge_name(network.spec.vni)), port.mac)
        if entry != index_of(name):
            tap.drain(fd)
        if deliver:
            self._deliver(port, network)

    async def _new_tap(self, port: PortConfig, network: NetworkConfig) -> int:
        """Stored before anything can reach it: from here on it outlives this process."""
        name = plan.tap_name(port.id)
        fd = tap.open_tap(name)
        self._descriptors[port.id] = fd
        kernel.write_settings([Change(Setting(f"net/ipv6/conf/{name}/disable_ipv6", "1"))])
        alias, mtu = plan.port_alias(port.id, port.mac.lower()), network.spec.mtu
        self._shared.fast().change([links.configure(name, mtu=mtu, alias=alias, queue=tap.QUEUE)])
        await self._shared.supervisor.store_fd(_stored(port.id), fd)
        return fd

    def _attach(self, port: PortConfig, network: NetworkConfig) -> None:
        """Enslaved and up. Silent from the first moment; what delivers already is left delivering."""
        sock, name = self._shared.fast(), plan.tap_name(port.id)
        devices = links.read_links(sock)
        link, bridge = devices[name], devices[plan.bridge_name(network.spec.vni)]
        if link.master != bridge.index:
            sock.change(
                [links.configure(name, master=bridge.index), links.set_flood(link.index, plan.SILENT, name)]
            )
        if not link.up:
            sock.change([links.configure(name, up=True)])

    def _deliver(self, port: PortConfig, network: NetworkConfig) -> None:
        sock, name = self._shared.fast(), plan.tap_name(port.id)
        link = links.read_links(sock)[name]
        bridge = index_of(plan.bridge_name(network.spec.vni))
        if link.flood != plan.DELIVERING:
            sock.change([links.set_flood(link.index, plan.DELIVERING, name)])
        if sock.forwarding_of(bridge, port.mac) != link.index:
            sock.change([netlink.forward_to_port(link.index, port.mac)])

    async def delete(self, port: PortId) -> None:
        self._shared.in_motion.add(port)
        name = plan.tap_name(port)
        with contextlib.suppress(OSError):
            socket.if_nametoindex(name)
            self._shared.fast().change([links.delete(name)])
        await self._drop_descriptor(port)
        for part in self._shared.parts:
            await part.port_deleted(port, name)

    # --- descriptors ---------------------------------------------------------------------------------

    async def descriptor(self, port: PortId) -> int | None:
        """This process's duplicate of a tap's descriptor; an agent that was restarted fetches one."""
        if port not in self._descriptors:
            fd = await self._shared.supervisor.fetch_fd(_stored(port))
            if fd is None:
                return None
            self._descriptors[port] = fd
        return self._descriptors[port]

    async def _drop_descriptor(self, port: PortId) -> None:
        fd = self._descriptors.pop(port, None)
        if fd is not None:
            os.close(fd)
        await self._shared.supervisor.drop_fd(_stored(port))


def _stored(port: PortId) -> str:
    return f"tap.{port}"
