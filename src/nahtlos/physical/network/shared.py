"""What the pieces of the native driver share on one host: who it is, its socket for verbs, what moves.

Owns the netlink socket that verbs use. Never decides anything.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network import device_names, plan
from nahtlos.physical.network.baseline import Baseline
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.ports import Supervisor


class Shared:
    def __init__(
        self,
        place: plan.Place,
        supervisor: Supervisor,
        baseline: Baseline,
        parts: tuple[Part, ...],
        run_dir: Path,
        ensure_network: Callable[[NetworkConfig], Awaitable[None]],
    ) -> None:
        self.place = place
        self.supervisor = supervisor
        self.baseline = baseline
        self.parts = parts
        self.run_dir = run_dir
        self.ensure_network = ensure_network
        """Builds a network's devices if no reconcile has done so yet."""
        self.filtering = asyncio.Lock()
        """Held while the packet filter is compared or changed."""
        self.in_motion: set[PortId] = set()
        """Ports changed by a verb since the running reconcile began: it must not put them back."""
        self._fast: Netlink | None = None

    def fast(self) -> Netlink:
        """The socket for verbs: used on the event loop's thread only."""
        if self._fast is None:
            self._fast = Netlink()
        return self._fast

    @property
    def writes(self) -> int:
        return self._fast.writes if self._fast is not None else 0

    def touch(self, port: PortConfig) -> None:
        self.in_motion.add(port.id)
        self.baseline.touch((port.mac.lower(), device_names.tap_name(port.id)))

    def held_frame(self, port: PortId) -> Path:
        """Where a frame on its way from a port's ring is held; see `parking`."""
        return self.run_dir / f"{device_names.tap_name(port)}.frame"

    def close(self) -> None:
        if self._fast is not None:
            self._fast.close()
            self._fast = None


def local(port: PortConfig, network: NetworkConfig) -> LocalPort:
    return LocalPort(port, network, device_names.tap_name(port.id))


def index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise Unavailable(
            f"interface {name} does not exist on this host",
            field="network",
            remedy="wait for the next reconcile",
        ) from error
