"""What the parts of one agent share: its settings, drivers and ledger, and how they make themselves heard."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Refused
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.ports import Drivers
from nahtlos.physical.settings import AgentSettings
from nahtlos.wire.messages import Event
from nahtlos.wire.transport import Transport


@dataclass(frozen=True)
class Context:
    settings: AgentSettings
    drivers: Drivers
    ledger: Ledger
    transport: Transport
    now: Callable[[], float]
    """Wall clock, seconds."""
    emit: Callable[[Event], None]
    changed: Callable[[], None]
    """Something worth a report, and a look at whether the host still is as configured."""
    waits: dict[str, str] = field(default_factory=dict[str, str])
    """By operation: what it waits for right now, in words."""
    progress: dict[str, float] = field(default_factory=dict[str, float])

    paths: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the network is brought to the configuration. An operation passes through it once after
    its journal began, so that no older decision about its ports is still being carried out."""

    async def pass_paths(self) -> None:
        async with self.paths:
            pass

    def say(self, kind: str, subject: str, text: str, **data: str | int | float) -> None:
        self.emit(
            Event(
                host=self.settings.host, at=self.now(), kind=kind, subject=subject, text=text, data=dict(data)
            )
        )

    def network_of(self, port: PortConfig) -> NetworkConfig:
        """By the configuration held. Refused if this host has no part in that network."""
        config = self.ledger.config()
        for network in config.networks if config else ():
            if any(p.id == port.id for p in network.ports):
                return network
        raise Refused(
            f"{self.settings.host} has no network with port {port.id}",
            field="port",
            remedy="configure the network on this host first",
        )
