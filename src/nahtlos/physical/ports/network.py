"""What an agent asks of the virtual network of its host."""

from enum import StrEnum
from typing import Protocol

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import PortId, ReleaseId, RouterId
from nahtlos.model.inventory import LoadBalancerStatus


class NetworkCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    lossless_move: bool
    ct_transfer: bool
    strict_stateful: bool
    shaper: bool
    details: dict[str, str] = {}
    """What is used and what is missing on this kernel, in words, for `doctor`."""


class MoveRole(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class NetworkObservation(msgspec.Struct, frozen=True, kw_only=True):
    networks: tuple[str, ...]
    local_ports: tuple[PortId, ...]
    """Ports with a tap here."""
    reflecting: tuple[PortId, ...]
    counters: dict[str, dict[str, int]] = {}
    """Per port: rx_packets, tx_packets, tx_dropped (as the tap counts them)."""


class NetworkDesired(msgspec.Struct, frozen=True, kw_only=True):
    """What `reconcile` makes true. `pinned` ports take part in a move: their entries are left alone."""

    config: HostConfig
    pinned: frozenset[PortId] = frozenset()


class Network(Protocol):
    """Frames for a port go where its one FDB entry says. Learning is off everywhere."""

    async def capabilities(self) -> NetworkCapabilities: ...

    async def host_init(self) -> None:
        """Once per agent start: sysctls, tables. Repeatable."""
        ...

    async def reconcile(self, desired: NetworkDesired) -> tuple[str, ...]:
        """Make networks, FDB, neighbours, DHCP, uplinks and reflection as desired; what is right is not
        touched. Returns what was found different and put right. Does not create or delete taps."""
        ...

    async def observe(self) -> NetworkObservation: ...

    async def release(self) -> ReleaseId | None:
        """That every network function beside the kernel runs by (`HostConfig.network_release`), as the last
        reconcile left it; None: the host's own programs."""
        ...

    async def load_balancers(self) -> tuple[LoadBalancerStatus, ...]:
        """Those this host carries, as their health checks find the members. One that does not answer at
        once is left out."""
        ...

    async def port_create(self, port: PortConfig, network: NetworkConfig, *, deliver: bool) -> None:
        """A tap for `port`, its fd in the supervisor's store as `tap.<port>` (further queues: `tap.<port>/1`
        onwards). `deliver` says whether
        frames for it go to it from now on (False for the destination of a move: its FDB entry and
        flooding come with the switch). Repeatable."""
        ...

    async def port_delete(self, port: PortId) -> None: ...

    async def move_prepare(
        self, port: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str, *, marked: bool = False
    ) -> None:
        """`vtep` is the other host's tunnel address. Source: gate on, the unused tunnel entry set.
        Destination: the same, towards the source, for an abort. Repeatable. `marked`: the source is to mark
        what its firewall has let in, the destination believes the mark and judges the rest itself. False
        where the other host's release knows no mark."""
        ...

    async def move_sacrifice(self, port: PortId) -> bool:
        """Destination, once its VMM waits: let it swallow one frame nobody misses. False if it did not
        within its deadline."""
        ...

    async def move_switch(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """Flip the one FDB entry: at the destination to its tap, at the source to the tunnel. Flooded frames
        change hands with it: the destination begins to keep its copies, then the source ends delivering."""
        ...

    async def move_drain(self, port: PortId, *, timeout: float) -> bool:
        """Source, after the switch: wait until the running guest has taken every frame from its tap."""
        ...

    async def move_revert(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> int:
        """Abort after the switch. Source: FDB back to the tap; nothing where there is none, as on a host that
        was restarted. Destination: frames parked in its tap go back through the tunnel; returns their number.
        Call at the source first."""
        ...

    async def move_state_begin(self, port: PortId) -> bytes:
        """Source, after `move_prepare`: what the firewall remembers of this port's connections, whole, in a
        form only drivers read; changes are noted from here on, until the move is settled or reverted. Empty
        for a port of which no firewall remembers anything, and where that cannot be carried (see
        `NetworkCapabilities.ct_transfer`). Called again, it begins anew."""
        ...

    async def move_state_changes(self, port: PortId) -> bytes:
        """Source: what has changed since the last call of this or of `move_state_begin`. Empty: nothing.
        What could not be noted in full is sent whole."""
        ...

    async def move_state_load(self, port: PortId, state: bytes) -> tuple[str, ...]:
        """Destination: take it up, over what may be there. What arrives twice or late is left out. Returns
        what could not be taken up, in words. Refused if this host cannot take up any, or not in this form;
        Unavailable if it has no room. `port_delete` forgets it again."""
        ...

    async def move_commit(self, port: PortConfig, network: NetworkConfig) -> None:
        """Source, once the destination owns the server: it alone knows all of the port's connections now, so
        what is passed on to it is judged there and no longer here. Repeatable; `move_settle` includes it."""
        ...

    async def move_settle(self, port: PortConfig, network: NetworkConfig, role: MoveRole) -> None:
        """After the end. Destination: broadcasts reach the tap again. Source: the tap goes; its gate
        stays while the configuration says `reflect`."""
        ...

    async def frames_from(self, port: PortId) -> int:
        """Frames its server has sent so far, by the count of its tap. NotFound without one."""
        ...

    # the server stays, its VMM is replaced

    async def replace_prepare(self, port: PortConfig) -> None:
        """Descriptors for the next VMM of this host, in the store as `spare.<port>` (further queues:
        `spare.<port>/1` onwards); nothing is delivered to them yet. Repeatable."""
        ...

    async def replace_join(self, port: PortConfig) -> bool:
        """Once the next VMM waits: it swallows one frame nobody misses (False if it did not within its
        deadline), and is ready for those that are to come."""
        ...

    async def replace_switch(self, port: PortConfig) -> None:
        """Frames go to the next VMM's queues from now on, and wait there until it runs."""
        ...

    async def replace_leave(self, port: PortConfig, *, timeout: float) -> bool:
        """Wait until the running guest has taken what is left in its queues; then nothing is put into them
        any more, and it may still send. False if it did not within `timeout` seconds: nothing has changed."""
        ...

    async def replace_revert(self, port: PortConfig) -> int:
        """The next VMM has ended or will never run: frames go to the old one again, also those its queues had
        kept. Returns their number. Repeatable, also if nothing was prepared."""
        ...

    async def replace_settle(self, port: PortConfig) -> None:
        """The old VMM has ended: the next one's descriptors are the port's `tap.<port>`. Repeatable."""
        ...

    # a router's way out goes to another host

    async def gateway_prepare(self, config: HostConfig, router: RouterId) -> None:
        """Destination: `config` is this host's, but with the gateway of `router` here. Everything of it is
        made, and nothing leads to it yet. It stays until a reconcile wants it, or `gateway_abandon`.
        Repeatable; NotFound while this host has none of the router's networks."""
        ...

    async def gateway_abandon(self, number: int) -> None:
        """What was prepared for router `number` goes with the next reconcile."""
        ...

    async def gateway_state_export(self, number: int) -> bytes:
        """What connection tracking remembers of the gateway of router `number`; only drivers read it."""
        ...

    async def gateway_state_import(self, number: int, state: bytes) -> int:
        """Take it up, over what may be there; returns how many connections. Repeatable. Refused in a form
        this host does not know, Unavailable if it has no room."""
        ...
