"""What the native driver is put together from, besides paths: firewall, shaping, addressing, routing.

A part owns one subject on this host and says so in its module. The driver calls all of them in their order
at the same moments; a part that has nothing to do at one leaves it out. Everything is repeatable, and a part
of an agent that was started a moment ago knows only what the kernel and its own files tell.
"""

from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import PortId
from nahtlos.physical.network.items import Item
from nahtlos.physical.ports import MoveRole


class LocalPort(msgspec.Struct, frozen=True):
    """A port that has a tap on this host."""

    port: PortConfig
    network: NetworkConfig
    tap: str
    """Its device."""


class Part:
    """Base: does nothing at every moment."""

    name = ""

    async def init(self) -> None:
        """Once per agent start, before anything else: sysctls and the like."""

    def close(self) -> None:
        """Lets go of sockets and the like; the driver does, too. The host's network stays as it is."""

    async def capabilities(self) -> dict[str, str]:
        """What is used and what is missing on this kernel: subject to words, which begin with `used` or
        `missing`. Changes nothing."""
        return {}

    def items(self, config: HostConfig) -> Iterable[Item]:
        """Entries on the driver's own bridges and tunnels that this part needs besides those of servers:
        put right, removed and reported with them. Pure."""
        return ()

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        """Make this part's share of `config` true, after devices and paths are. What is right is not
        touched, and nothing is removed that a move needs. Returns what was different without having been
        asked for, in words."""
        return ()

    async def port_created(self, port: LocalPort) -> None:
        """Its tap exists and is enslaved; nothing is delivered to it yet."""

    async def port_deleted(self, port: PortId, tap: str) -> None:
        """Its tap is gone."""

    async def move_prepared(self, port: LocalPort, role: MoveRole, *, marked: bool = False) -> None:
        """The path will be switched. At the destination `port_created` came before. `marked`: see
        `ports.Network.move_prepare`."""

    def move_switched(self, port: LocalPort, role: MoveRole) -> None:
        """This host's entry for it has been flipped. In the middle of the switch: waits for nothing."""

    def release(self, port: PortId, tap: str) -> None:
        """Frames of this port that are held back go on at once: at the source its server is about to be
        stopped, at the destination what came for it is about to be returned. Waits for nothing."""

    async def move_committed(self, port: LocalPort) -> None:
        """At the source: the destination owns the server. `move_settled` may come without it."""

    async def move_settled(self, port: LocalPort, role: MoveRole) -> None:
        """The move has ended well, here at its `role`."""

    async def move_reverted(self, port: LocalPort, role: MoveRole) -> None:
        """The move has ended as if it had never begun."""
