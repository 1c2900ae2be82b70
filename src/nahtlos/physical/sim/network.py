"""`physical.ports.Network` over the simulated world: the gate protocol on `sim.paths`.

Owns nothing. Decides, as the native driver does, which entries a configuration means; leaves pinned ports
alone.
"""

import asyncio
import itertools

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import PortId, ReleaseId, RouterId
from nahtlos.model.inventory import LoadBalancerStatus
from nahtlos.physical.ports import MoveRole, NetworkCapabilities, NetworkDesired, NetworkObservation
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.facts import SimGateway, SimHost
from nahtlos.physical.sim.faults import Life
from nahtlos.physical.sim.taps import TO_TUNNEL, Frame, Tap
from nahtlos.physical.sim.world import World

POLL_SECONDS = 0.0005
EMPTY_POLLS = 3
SACRIFICE_SECONDS = 0.3
_begins = itertools.count(1)


class _State(msgspec.Struct, frozen=True):
    """What a simulated firewall remembers of a port, on its way."""

    began: int
    number: int
    whole: bool
    opened: tuple[int, ...]
    closed: tuple[int, ...] = ()


class SimNetwork(SimDriver):
    name = "network"

    def __init__(self, world: World, host: SimHost, life: Life) -> None:
        super().__init__(world, host, life)
        self._sent: dict[PortId, tuple[int, int]] = {}
        """By port that leaves: when this agent began to note changes, and how often it sent some."""
        self._loaded: dict[PortId, tuple[int, int]] = {}

    async def capabilities(self) -> NetworkCapabilities:
        async with self.verb("capabilities"):
            return NetworkCapabilities(
                lossless_move=True,
                ct_transfer=True,
                strict_stateful=True,
                shaper=False,
                details={"driver": "simulated"},
            )

    async def host_init(self) -> None:
        async with self.verb("host_init"):
            pass

    async def reconcile(self, desired: NetworkDesired) -> tuple[str, ...]:
        async with self.verb("reconcile", f"generation {desired.config.generation}"):
            found: list[str] = []
            for network in desired.config.networks:
                for port in network.ports:
                    if port.id not in desired.pinned:
                        found += self._put_right(desired.config, port)
            found += self._lead_out(desired.config)
            wanted = desired.config.network_release
            if wanted != self.host.network_release:
                if wanted is not None:
                    self.host.check_release(wanted)
                self.world.note(self.host.id, "network functions replaced", wanted or "own")
                self.host.network_release = wanted
            return tuple(found)

    async def release(self) -> ReleaseId | None:
        async with self.verb("release"):
            return self.host.network_release

    async def load_balancers(self) -> tuple[LoadBalancerStatus, ...]:
        return ()

    def _put_right(self, config: HostConfig, port: PortConfig) -> list[str]:
        paths, board = self.world.paths, self.host.board
        found: list[str] = []
        here = port.host == self.host.id
        if not here and board.tunnels.get(port.mac) != port.vtep:
            found.append(f"tunnel of {port.id}")
            paths.tunnel(self.host.id, port.mac, port.vtep)
        entry = (port.id if port.id in board.taps else None) if here else TO_TUNNEL
        if board.entries.get(port.mac) != entry:
            found.append(f"entry of {port.id}")
            paths.lead(self.host.id, port.mac, entry)
        reflect = port.id in config.reflect
        if (port.mac in board.gates) != reflect:
            found.append(f"gate of {port.id}")
            paths.gate(self.host.id, port.mac, on=reflect)
        return found

    async def observe(self) -> NetworkObservation:
        async with self.verb("observe"):
            board = self.host.board
            return NetworkObservation(
                networks=(),
                local_ports=tuple(sorted(board.taps)),
                reflecting=tuple(sorted(t.port for t in board.taps.values() if t.mac in board.gates)),
                counters={
                    t.port: {
                        "rx_packets": t.sent,
                        "tx_packets": t.received - t.dropped - len(t.ring),
                        "tx_dropped": t.dropped,
                    }
                    for t in board.taps.values()
                },
            )

    async def port_create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        async with self.verb("port_create", port.id):
            known = port.id in self.host.board.taps
            self.world.add_tap(self.host, port)
            if port.security_groups:
                self.world.paths.firewalls.guarded.add(port.mac)
            if deliver:
                self.world.paths.lead(self.host.id, port.mac, port.id)
            elif not known and self.host.board.entries.get(port.mac) == port.id:
                self.world.paths.lead(self.host.id, port.mac, TO_TUNNEL)

    async def port_delete(self, port: PortId) -> None:
        async with self.verb("port_delete", port):
            self._remove(port)

    def _remove(self, port: PortId) -> None:
        tap = self.host.board.taps.get(port)
        self.world.remove_tap(self.host, port)
        self._sent.pop(port, None)
        self._loaded.pop(port, None)
        if tap is not None:
            self.world.paths.firewalls.forget(self.host.id, tap.mac)

    # --- moves ---

    async def move_prepare(
        self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str, *, marked: bool = False
    ) -> None:
        async with self.verb("move_prepare", f"{port.id} {role}"):
            paths, host = self.world.paths, self.host.id
            paths.tunnel(host, port.mac, vtep)
            paths.gate(host, port.mac, on=True)

    async def move_sacrifice(self, port: PortId) -> bool:
        async with self.verb("move_sacrifice", port):
            tap = self._tap(port)
            tap.put(Frame(None, 0, self.world.now()))
            return await self._emptied(tap, SACRIFICE_SECONDS, polls=1)

    async def move_switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        async with self.verb("move_switch", f"{port.id} {role}"):
            to = self._tap(port.id).port if role is MoveRole.DESTINATION else TO_TUNNEL
            self.world.paths.lead(self.host.id, port.mac, to)

    async def move_drain(self, port: PortId, *, timeout: float) -> bool:
        async with self.verb("move_drain", port):
            return await self._emptied(self._tap(port), timeout, polls=EMPTY_POLLS)

    async def move_revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        async with self.verb("move_revert", f"{port.id} {role}"):
            paths, host, tap = self.world.paths, self.host.id, self.host.board.taps.get(port.id)
            if role is MoveRole.SOURCE:
                if tap is not None:
                    paths.lead(host, port.mac, tap.port)
                paths.firewalls.stop_noting(host, port.mac)
                self._sent.pop(port.id, None)
                return 0
            if tap is None:
                return 0
            returned = paths.reinject(tap)
            paths.lead(host, port.mac, TO_TUNNEL)
            return returned + paths.reinject(tap)

    async def move_state_begin(self, port: PortId) -> bytes:
        mac = self._guarded(port)
        if mac is None:
            return b""
        async with self.verb("move_state_begin", port):
            return self._whole(port, mac)

    def _whole(self, port: PortId, mac: str) -> bytes:
        began = next(_begins)
        self._sent[port] = (began, 1)
        known = self.world.paths.firewalls.note_changes(self.host.id, mac)
        return msgspec.json.encode(_State(began, 1, whole=True, opened=tuple(sorted(known))))

    async def move_state_changes(self, port: PortId) -> bytes:
        mac = self._guarded(port)
        if mac is None:
            return b""
        async with self.verb("move_state_changes", port):
            if port not in self._sent:
                return self._whole(port, mac)
            switched = self.host.board.entries.get(mac) == TO_TUNNEL
            noted = self.world.paths.firewalls.noted_changes(self.host.id, mac, switched=switched)
            if noted is None:
                return self._whole(port, mac)
            if not noted.opened and not noted.closed:
                return b""
            began, number = self._sent[port]
            self._sent[port] = (began, number + 1)
            opened, closed = tuple(sorted(noted.opened)), tuple(sorted(noted.closed))
            return msgspec.json.encode(_State(began, number + 1, False, opened, closed))

    async def move_state_load(self, port: PortId, state: bytes) -> tuple[str, ...]:
        async with self.verb("move_state_load", port):
            try:
                told = msgspec.json.decode(state, type=_State)
            except msgspec.DecodeError as error:
                raise Refused(f"state of a form unknown here: {error}", field="state") from error
            began, number = self._loaded.get(port, (0, 0))
            if began == told.began and told.number <= number:
                return ()
            if began == told.began and told.number > number + 1 and not told.whole:
                raise Refused(f"changes to {port} before number {told.number} are missing", field="state")
            mac = self._tap(port).mac
            self.world.paths.touch(mac)
            self.world.paths.firewalls.take_up(self.host.id, mac, told.opened, told.closed, whole=told.whole)
            self._loaded[port] = (told.began, told.number)
            return ()

    def _guarded(self, port: PortId) -> str | None:
        """Its MAC, if a firewall remembers anything of it."""
        tap = self.host.board.taps.get(port)
        return tap.mac if tap is not None and tap.mac in self.world.paths.firewalls.guarded else None

    async def move_commit(self, port: PortConfig, network: NetworkConfig) -> None:
        async with self.verb("move_commit", port.id):
            pass

    async def move_settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        async with self.verb("move_settle", f"{port.id} {role}"):
            self._loaded.pop(port.id, None)
            if role is MoveRole.SOURCE:
                self._remove(port.id)

    # --- ways out of routers ---

    def _lead_out(self, config: HostConfig) -> list[str]:
        held, found = self.host.gateways, list[str]()
        for router in config.routers:
            gateway, number = router.spec.gateway, router.spec.number
            self.host.leads_to[number] = router.gateway_vtep
            here = gateway is not None and gateway.host == self.host.id
            now = held.get(number)
            if here or (router.passing and now is not None):
                state = now or held.setdefault(number, SimGateway())
                answers = here and not router.passing
                if state.answers != answers:
                    what = "way out" if answers else "way out passes on"
                    self.world.note(self.host.id, what, router.spec.id)
                state.answers, state.passes, state.prepared = answers, router.passing, False
        wanted = {
            r.spec.number
            for r in config.routers
            if r.passing or (r.spec.gateway is not None and r.spec.gateway.host == self.host.id)
        }
        for number in [n for n, g in held.items() if n not in wanted and not g.prepared]:
            del held[number]
            found.append(f"way out of router {number}")
        return found

    async def gateway_prepare(self, config: HostConfig, router: RouterId) -> None:
        async with self.verb("gateway_prepare", router):
            spec = next((r.spec for r in config.routers if r.spec.id == router), None)
            if spec is None:
                raise NotFound(f"router {router} has no network here", field="router")
            if spec.number not in self.host.gateways:
                self.host.gateways[spec.number] = SimGateway(prepared=True)

    async def gateway_abandon(self, number: int) -> None:
        async with self.verb("gateway_abandon", str(number)):
            held = self.host.gateways.get(number)
            if held is not None and held.prepared:
                held.prepared = False

    async def gateway_state_export(self, number: int) -> bytes:
        async with self.verb("gateway_state_export", str(number)):
            return msgspec.json.encode(sorted(self._gateway(number).connections))

    async def gateway_state_import(self, number: int, state: bytes) -> int:
        async with self.verb("gateway_state_import", str(number)):
            known = msgspec.json.decode(state, type=list[int])
            self._gateway(number).connections.update(known)
            return len(known)

    def _gateway(self, number: int) -> SimGateway:
        held = self.host.gateways.get(number)
        if held is None:
            raise Unavailable(f"{self.host.id} has no way out of router {number}")
        return held

    # --- replacements ---

    async def frames_from(self, port: PortId) -> int:
        """Its guests answer each frame."""
        async with self.verb("frames_from", port):
            tap, spare = self._tap(port), self.host.board.spares.get(port)
            self.world.paths.touch(tap.mac)
            return tap.sent + (spare.sent if spare is not None else 0)

    async def replace_prepare(self, port: PortConfig) -> None:
        async with self.verb("replace_prepare", port.id):
            tap = self._tap(port.id)
            if port.id in self.host.board.spares:
                return
            self.world.paths.add_spare(Tap(port=port.id, mac=tap.mac, host=tap.host, delay=tap.delay))
            self.host.fds[f"spare.{port.id}"] = -1

    async def replace_join(self, port: PortConfig) -> bool:
        async with self.verb("replace_join", port.id):
            spare = self._spare(port.id)
            if not self._serves_next(port.id) and spare.swallowed is None:
                spare.put(Frame(None, 0, self.world.now()))
            return await self._emptied(spare, SACRIFICE_SECONDS, polls=1)

    async def replace_switch(self, port: PortConfig) -> None:
        async with self.verb("replace_switch", port.id):
            self._spare(port.id)
            if not self._serves_next(port.id):
                self.world.paths.swap(self.host.id, port.id)
                self._next_serves.add(port.id)

    async def replace_leave(self, port: PortConfig, *, timeout: float) -> bool:
        async with self.verb("replace_leave", port.id):
            return await self._emptied(self._spare(port.id), timeout, polls=EMPTY_POLLS)

    async def replace_revert(self, port: PortConfig) -> int:
        async with self.verb("replace_revert", port.id):
            if port.id not in self.host.board.spares:
                return 0
            returned = 0
            if self._serves_next(port.id):
                self.world.paths.swap(self.host.id, port.id)
                returned = self.world.paths.deliver_again(self.host.id, port.id)
            self._forget_spare(port.id)
            return returned

    async def replace_settle(self, port: PortConfig) -> None:
        async with self.verb("replace_settle", port.id):
            if port.id in self.host.board.spares:
                self._forget_spare(port.id)

    @property
    def _next_serves(self) -> set[PortId]:
        """Ports whose frames go to the next VMM's queues. Lasts, as in a kernel."""
        return self.host.board.switched

    def _serves_next(self, port: PortId) -> bool:
        return port in self._next_serves

    def _spare(self, port: PortId) -> Tap:
        spare = self.host.board.spares.get(port)
        if spare is None:
            raise Unavailable(f"port {port} is not prepared for another VMM", field="port")
        return spare

    def _forget_spare(self, port: PortId) -> None:
        self.world.paths.remove_spare(self.host.id, port)
        self.host.fds.pop(f"spare.{port}", None)

    async def _emptied(self, tap: Tap, timeout: float, *, polls: int) -> bool:
        """True once the ring was seen empty `polls` times in a row."""
        empty, end = 0, self.world.now() + timeout
        while empty < polls:
            await asyncio.sleep(POLL_SECONDS)
            self.world.paths.touch(tap.mac, probe=False)
            empty = 0 if tap.ring else empty + 1
            if self.world.now() >= end:
                return False
        return True

    def _tap(self, port: PortId) -> Tap:
        tap = self.host.board.taps.get(port)
        if tap is None:
            raise NotFound(f"{self.host.id} has no tap for {port}", field="port")
        return tap
