"""The native driver: one bridge and one VXLAN device per network and host, every entry programmed.

Owns devices whose alias begins with `nahtlos/`, the nft tables of that name and the stored descriptors
`tap.*` of its host; what its parts own they say. Touches nothing else. Runs inside the host's namespace.

How frames find a port: learning is off everywhere, so the one forwarding entry for its MAC decides.

    here       entry -> tap
    elsewhere  entry -> vx<vni>, whose own entry names the tunnel end of the host that has it
    moving     both hosts hold a gate: frames that come by the tunnel re-enter the bridge through a veth pair,
               so that the entry decides for them as well and they may leave by the tunnel again

A move flips the destination's entry, then the source's (about 0.1 ms each, no process involved), lets the
running source empty its ring, and leaves the rest to the hypervisor. Everything a verb needs is in the
kernel or in the supervisor's store, so an agent that was started a moment ago can carry on.
"""

import asyncio
import socket
from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.errors import NotFound, Unavailable
from nahtlos.model.ids import PortId, ReleaseId, RouterId
from nahtlos.model.inventory import LoadBalancerStatus
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import device_names, doctor, kernel, links, nft, nft_chains, plan
from nahtlos.physical.network.bandwidth.ports import Shaping
from nahtlos.physical.network.bandwidth.underlay import Shares, ports_of
from nahtlos.physical.network.baseline import Applied, Baseline
from nahtlos.physical.network.endpoints import Endpoints
from nahtlos.physical.network.firewall.part import Firewall
from nahtlos.physical.network.handover import Handover
from nahtlos.physical.network.items import Device, Forward, Item, PortFlood, Setting
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.plan import Change
from nahtlos.physical.network.programs import Programs
from nahtlos.physical.network.provider.part import Provider
from nahtlos.physical.network.replacement import Replacement
from nahtlos.physical.network.routing.part import Routing
from nahtlos.physical.network.services import addressing
from nahtlos.physical.network.services.part import Services
from nahtlos.physical.network.shared import Shared
from nahtlos.physical.network.tracking.part import ConnectionTracking
from nahtlos.physical.network.view import View
from nahtlos.physical.ports import (
    MoveRole,
    NetworkCapabilities,
    NetworkDesired,
    NetworkObservation,
    Supervisor,
)
from nahtlos.physical.settings import AgentSettings

CHUNK = 100
"""Entries changed before other work of the agent gets a turn."""


class NativeNetwork:
    """Implements `ports.Network`."""

    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._place = plan.Place(settings.host, settings.role, settings.address, kernel.forces_forwarding())
        self._baseline = Baseline(settings.run_dir / "network.json")
        self._reconciling = asyncio.Lock()
        self._bulk: Netlink | None = None
        self._view: View | None = None
        self._built: dict[int, tuple[int, ...]] = {}
        """By VNI: indices of a network's bridge and tunnel when they were last found to be ours."""
        self._checked: set[NetworkSpec] = set()
        """Networks that ports may be created in, as they were described."""
        self._rules: tuple[int, nft.Ruleset] | None = None
        """The packet filter's generation, and what there was of ours at it."""
        self._capabilities: NetworkCapabilities | None = None
        shaping = Shaping(settings.run_dir / "shaping.json", self._fast_socket, self._bulk_socket)
        self._underlay = settings.underlay_interface
        self._programs = Programs(settings.releases_dir, settings.run_dir)
        services = Services(settings, supervisor, self._programs)
        self._tracking = ConnectionTracking(settings.run_dir)
        ports, record = ports_of(settings), settings.run_dir / "shares.json"
        shares = Shares(settings.underlay_interface, ports, record, self._bulk_socket)
        self.routing = Routing(settings, supervisor, self._programs)
        firewall = Firewall(settings.role, settings.run_dir / "firewall.json", self._pass_over)
        self._provider = Provider(settings.run_dir / "provider.json", self._underlay, self._fast_socket)
        self._parts: tuple[Part, ...] = (
            firewall,
            shaping,
            shares,
            self._tracking,
            services,
            self.routing,
            self._provider,
        )
        self._shared = Shared(
            self._place, supervisor, self._baseline, self._parts, settings.run_dir, self._ensure_network
        )
        self._endpoints = Endpoints(self._shared)
        self._handover = Handover(self._shared, self._endpoints)
        self._replacement = Replacement(self._shared, self._endpoints, self._handover)

    # --- sockets -------------------------------------------------------------------------------------

    @property
    def writes(self) -> int:
        """Netlink requests so far that could change something."""
        return self._shared.writes + (self._bulk.writes if self._bulk is not None else 0)

    def _fast_socket(self) -> Netlink:
        """For verbs, also those of parts, which are made before what is shared."""
        return self._shared.fast()

    def _bulk_socket(self) -> Netlink:
        """For reconcile and observe: used under `_reconciling` only, also from worker threads."""
        if self._bulk is None:
            self._bulk = Netlink()
        return self._bulk

    def _see(self) -> View:
        """The kernel's tables, likewise."""
        if self._view is None:
            self._view = View()
        return self._view

    def close(self) -> None:
        """Lets go of sockets and duplicates. The host's network stays as it is."""
        if self._view is not None:
            self._view.close()
            self._view = None
        self._shared.close()
        self._endpoints.close()
        self._replacement.close()
        for part in self._parts:
            part.close()
        if self._bulk is not None:
            self._bulk.close()
            self._bulk = None

    # --- what there is -------------------------------------------------------------------------------

    async def capabilities(self) -> NetworkCapabilities:
        if self._capabilities is None:
            found = await doctor.examine(self._shared.fast())
            for part in self._parts:
                found = msgspec.structs.replace(found, details={**found.details, **await part.capabilities()})
            shaper = found.details["bandwidth of ports"].startswith("used")
            carried = found.details[self._tracking.name].startswith("used")
            self._capabilities = msgspec.structs.replace(found, shaper=shaper, ct_transfer=carried)
        return self._capabilities

    async def host_init(self) -> None:
        capabilities = await self.capabilities()
        if self._place.role is HostRole.COMPUTE and not capabilities.lossless_move:
            raise Unavailable(
                f"this host cannot move servers without loss: {_missing(capabilities)}",
                field="network",
                remedy="see `nahtlos doctor`",
            )
        for part in self._parts:
            await part.init()

    async def observe(self) -> NetworkObservation:
        async with self._reconciling:
            devices = await asyncio.to_thread(links.read_links, self._bulk_socket())
        gates = self._baseline.applied.gates  # as reconcile last saw and verbs have changed them since
        taps = kernel.taps_of(devices)
        networks = [d.alias.split("/")[2] for d in devices.values() if _is_network(d)]
        return NetworkObservation(
            networks=tuple(sorted(networks)),
            local_ports=tuple(sorted(taps)),
            reflecting=tuple(sorted({PortId(port) for _, _, port in gates if port not in taps})),
            counters={port: _counters(devices[name]) for port, (name, _) in taps.items()},
        )

    # --- converge ------------------------------------------------------------------------------------

    async def reconcile(self, desired: NetworkDesired) -> tuple[str, ...]:
        async with self._reconciling:
            self._shared.in_motion.clear()
            return await self._reconcile(desired.config, desired.pinned)

    async def _reconcile(self, config: HostConfig, pinned: frozenset[PortId]) -> tuple[str, ...]:
        """Everything that can be put right is; what cannot be is raised at the end."""
        todo, wanted, found = await self._compare(config, pinned)
        words = self._drift(todo)
        births = [c for c in todo if isinstance(c.item, Device) and not c.remove]
        if births:
            kernel.refuse_foreign((c.item for c in births), found.links)
            kernel.create_devices(self._bulk_socket(), births)
            self._rules = None  # a rule knows a device by its number: one born again is not meant by it
            todo, wanted, found = await self._compare(config, pinned)
        kernel.write_settings(todo)
        words += await self._filter(config, pinned, found, quiet=bool(births))
        await self._put(todo, found, config)
        local = self._local_ports(config)
        await self._programs.choose(config.network_release)
        for part in self._parts:
            words += await part.reconcile(config, local)
        self._programs.settled()
        self._baseline.record(wanted)
        applied = self._baseline.applied
        applied.touched &= self._held_names(pinned, config, found)
        words += self._baseline.take_notes()
        self._baseline.save()
        _check_uplinks(config, found)
        self._check_addressing(config.networks, found.links)
        return tuple(words)

    def _check_addressing(
        self, networks: Iterable[NetworkConfig], devices: Mapping[str, links.LinkInfo]
    ) -> None:
        underlay = devices.get(self._underlay)
        for network in networks:
            addressing.check(network.spec, underlay.mtu if underlay else 0)

    def _local_ports(self, config: HostConfig) -> dict[PortId, LocalPort]:
        """Ports of `config` that have a tap here now."""
        taps = self._see().look().taps
        return {
            port.id: LocalPort(port, network, taps[port.id][0])
            for network in config.networks
            for port in network.ports
            if port.id in taps
        }

    async def _compare(
        self, config: HostConfig, pinned: frozenset[PortId]
    ) -> tuple[tuple[Change, ...], frozenset[Item], kernel.Observed]:
        settings = plan.desired_settings(config, self._place)
        found = await asyncio.to_thread(self._see().look, settings)
        taps = {port: mac for port, (_, mac) in found.taps.items()}
        ways = self._provider.ways(config.networks, found.links)
        wanted = plan.desired_items(config, self._place, taps, ways)
        wanted |= {item for part in self._parts for item in part.items(config)}
        held = self._held_names(pinned | self._shared.in_motion, config, found)
        # A kernel that does not know a setting is not asked for it again and again.
        present = {item.key for item in found.items if isinstance(item, Setting)}
        wanted -= {item for item in settings if item.key not in present}
        return plan.without(plan.changes(wanted, found.items), held), wanted, found

    def _held_names(
        self, ports: Iterable[PortId], config: HostConfig, found: kernel.Observed
    ) -> frozenset[str]:
        """MACs and taps of `ports`, whether the configuration knows them or only a tap here does."""
        wanted = frozenset(ports)
        names = {p.mac.lower() for n in config.networks for p in n.ports if p.id in wanted}
        for port, (device, mac) in found.taps.items():
            if port in wanted:
                names |= {device, mac}
        return frozenset(names)

    def _drift(self, todo: tuple[Change, ...]) -> list[str]:
        """Changes nobody asked for, in words; what a missing device explains is not listed again."""
        applied = self._baseline.applied
        devices = [(c.item, c.before) for c in todo if isinstance(c.item, Device) and not c.remove]
        missing = {d.name for d, before in devices if before is None}
        cut_off = missing | {d.name for d, _ in devices if d.master in missing}
        return [str(c) for c in todo if _is_drift(c, applied) and not _explained(c, missing, cut_off)]

    async def _put(self, todo: tuple[Change, ...], found: kernel.Observed, config: HostConfig) -> None:
        rest = [c for c in todo if not isinstance(c.item, Setting) and (c.remove or c.item.rank > 0)]
        for start in range(0, len(rest), CHUNK):
            held = self._held_names(self._shared.in_motion, config, found)
            part = [c for c in rest[start : start + CHUNK] if plan.concerns(c.item) not in held]
            self._bulk_socket().change(kernel.requests_of(part, found.links))
            await asyncio.sleep(0)

    async def _filter(
        self, config: HostConfig, pinned: frozenset[PortId], found: kernel.Observed, *, quiet: bool
    ) -> list[str]:
        networks = [_filtered(n, config, self._provider.port(n.spec)) for n in config.networks]
        applied, digest = self._baseline.applied, nft.digest(networks)
        async with self._shared.filtering:
            present = await self._listed_rules()
            gates = self._gates(config, pinned | self._shared.in_motion, present)
            if digest != applied.rules or present.fingerprint != applied.listed:
                drift = digest == applied.rules and not quiet
                await nft.apply(nft.compose(networks, gates))
                applied.rules, applied.listed = digest, (await self._listed_rules()).fingerprint
            else:
                drift = False
                text = nft.gate_commands(gates - present.gates, present.gates - gates)
                if text:
                    await nft.apply(text)
            applied.gates = {(g.vni, g.mac, g.port) for g in gates}
        return ["packet filter rules were different: put right"] if drift else []

    async def _listed_rules(self) -> nft.Ruleset:
        """What the kernel has of ours; read again only after somebody has changed any rule."""
        generation = nft_chains.generation()
        if self._rules is None or self._rules[0] != generation:
            self._rules = generation, await nft.listing()
        return self._rules[1]

    def _pass_over(self, before: int, after: int) -> None:
        """A transaction about other tables than those listed here."""
        if self._rules is not None and self._rules[0] == before:
            self._rules = after, self._rules[1]

    def _gates(
        self, config: HostConfig, held: frozenset[PortId] | set[PortId], present: nft.Ruleset
    ) -> frozenset[nft.Gate]:
        """Ports that are reflected, and those that move, if their gate is on or was on."""
        known = present.gates | {nft.Gate(v, m, PortId(p)) for v, m, p in self._baseline.applied.gates}
        vnis = {network.spec.vni for network in config.networks}
        keep = {g for g in known if g.port in held and g.vni in vnis}
        reflect = {
            nft.Gate(network.spec.vni, port.mac.lower(), port.id)
            for network in config.networks
            for port in network.ports
            if port.id in config.reflect
        }
        return frozenset(keep | reflect)

    async def release(self) -> ReleaseId | None:
        return self._programs.release

    async def load_balancers(self) -> tuple[LoadBalancerStatus, ...]:
        return await self.routing.load_balancers()

    # --- verbs ---------------------------------------------------------------------------------------

    async def port_create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        if network.spec not in self._checked:
            underlay = links.read_link(self._shared.fast(), self._underlay)
            self._check_addressing([network], {self._underlay: underlay} if underlay else {})
            self._checked.add(network.spec)
        self._provider.check(network.spec)
        await self._endpoints.create(port, network, deliver=deliver)

    async def port_delete(self, port: PortId) -> None:
        await self._endpoints.delete(port)

    async def move_prepare(
        self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str, *, marked: bool = False
    ) -> None:
        await self._handover.prepare(port, network, role, vtep, marked=marked)

    async def move_sacrifice(self, port: PortId) -> bool:
        return await self._handover.sacrifice(port)

    async def move_switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        await self._handover.switch(port, network, role)

    async def move_drain(self, port: PortId, *, timeout: float) -> bool:
        return await self._handover.drain(port, timeout=timeout)

    async def move_revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        return await self._handover.revert(port, network, role)

    async def move_commit(self, port: PortConfig, network: NetworkConfig) -> None:
        await self._handover.commit(port, network)

    async def move_settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        await self._handover.settle(port, network, role)

    async def move_state_begin(self, port: PortId) -> bytes:
        return await self._tracking.begin(port)

    async def move_state_changes(self, port: PortId) -> bytes:
        return await self._tracking.changes(port)

    async def move_state_load(self, port: PortId, state: bytes) -> tuple[str, ...]:
        return await self._tracking.load(port, state)

    async def replace_prepare(self, port: PortConfig) -> None:
        await self._replacement.prepare(port)

    async def frames_from(self, port: PortId) -> int:
        device = links.read_link(self._shared.fast(), plan.tap_name(port))
        if device is None:
            raise NotFound(f"this host has no tap for {port}", field="port")
        return device.stats.rx_packets

    async def replace_join(self, port: PortConfig) -> bool:
        return await self._replacement.join(port)

    async def replace_switch(self, port: PortConfig) -> None:
        await self._replacement.switch(port)

    async def replace_leave(self, port: PortConfig, *, timeout: float) -> bool:
        return await self._replacement.leave(port, timeout=timeout)

    async def replace_revert(self, port: PortConfig) -> int:
        return await self._replacement.revert(port)

    async def replace_settle(self, port: PortConfig) -> None:
        await self._replacement.settle(port)

    async def gateway_prepare(self, config: HostConfig, router: RouterId) -> None:
        await self.routing.gateway_prepare(config, router)

    async def gateway_abandon(self, number: int) -> None:
        await self.routing.gateway_abandon(number)

    async def gateway_state_export(self, number: int) -> bytes:
        return await self.routing.gateway_state_export(number)

    async def gateway_state_import(self, number: int, state: bytes) -> int:
        return await self.routing.gateway_state_import(number, state)

    def _is_built(self, vni: int, names: tuple[str, ...]) -> bool:
        """The devices that were there the last time are there still."""
        try:
            return self._built.get(vni) == tuple(map(socket.if_nametoindex, names))
        except OSError:
            return False

    async def _ensure_network(self, network: NetworkConfig) -> None:
        """Builds the network's devices if no reconcile has done so yet; its filter comes with the next."""
        async with self._reconciling:
            names = (device_names.bridge_name(network.spec.vni), device_names.tunnel_name(network.spec.vni))
            if self._is_built(network.spec.vni, names):
                return
            there = [links.read_link(self._shared.fast(), name) for name in names]
            if all(link is not None and link.alias.startswith(device_names.OWNED) for link in there):
                self._built[network.spec.vni] = tuple(link.index for link in there if link is not None)
                return
            devices = {link.name: link for link in there if link is not None}
            devices_now = self._see().look().links
            way = self._provider.ways([network], devices_now).get(network.spec.id)
            wanted = plan.network_items(network, self._place, way)
            kernel.refuse_foreign(wanted, devices)
            sock = self._bulk_socket()
            kernel.create_devices(sock, plan.changes(wanted, self._see().look().items & wanted))
            self._rules = None
            found = self._see().look()
            todo = plan.changes(wanted, found.items & wanted)
            kernel.write_settings(todo)
            sock.change(kernel.requests_of(todo, found.links))


def _is_network(device: links.LinkInfo) -> bool:
    return device.kind == "bridge" and device.alias.startswith(device_names.network_alias(""))


def _counters(device: links.LinkInfo) -> dict[str, int]:
    stats = device.stats
    return {
        "rx_packets": stats.rx_packets,
        "tx_packets": stats.tx_packets,
        "tx_dropped": stats.tx_dropped,
    }


def _missing(capabilities: NetworkCapabilities) -> str:
    """What a lossless move needs and this kernel lacks, in words."""
    needed = (f"{name} {text}" for name, text in capabilities.details.items() if name in doctor.NEEDED)
    return "; ".join(text for text in needed if "missing" in text)


def _check_uplinks(config: HostConfig, found: kernel.Observed) -> None:
    for uplink in config.uplinks:
        if uplink.interface not in found.links:
            raise Unavailable(
                f"uplink interface {uplink.interface} of network {uplink.network} does not exist",
                field="uplinks",
                remedy="connect it, or name another interface",
            )


def _filtered(network: NetworkConfig, config: HostConfig, outward: str) -> nft.FilteredNetwork:
    uplinks = tuple(sorted(u.interface for u in config.uplinks if u.network == network.spec.id))
    return nft.FilteredNetwork(network.spec.vni, uplinks, outward, network.spec.dhcp_ip if outward else "")


def _is_drift(change: Change, applied: Applied) -> bool:
    if plan.concerns(change.item) in applied.touched:
        return False
    return (str(change.item) in applied.items) != change.remove


def _explained(change: Change, missing: set[str], cut_off: set[str]) -> bool:
    """Nothing but a consequence of devices being `missing`, or `cut_off` because their bridge is."""
    item = change.item
    if isinstance(item, Device):
        return item.master in missing
    if isinstance(item, Setting):
        return any(f"/{name}/" in item.path for name in missing)
    if isinstance(item, PortFlood):
        return item.device in cut_off
    return item.device in missing or (isinstance(item, Forward) and item.bridge in missing)
