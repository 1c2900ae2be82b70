"""The agents of an order, as its coordinator speaks to them; its own host is one of them."""

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.agent.volumes.peers import ForVolume, carry_out
from nahtlos.wire.message import Message
from nahtlos.wire.volumes import PeerAddress

A = TypeVar("A", bound=Message)


class Hosts:
    def __init__(self, context: Context, named: Iterable[PeerAddress]) -> None:
        self._context = context
        self._named = {each.host: each for each in named}
        self._peers: dict[HostId, Peer] = {}

    @property
    def all(self) -> tuple[HostId, ...]:
        """Those of the order, and those this host's configuration has come to name since."""
        config = self._context.ledger.config()
        more = (spec.id for spec in config.hosts) if config else ()
        return tuple(dict.fromkeys((*self._named, *more)))

    async def ask(self, host: HostId, body: ForVolume, timeout: float) -> None:
        """Returns when it was done. Raises what the other agent refused it with, or Unavailable; it may have
        been carried out all the same."""
        if host != self._context.settings.host:
            await self._peer(host).tell(body, timeout)
            return
        try:
            async with asyncio.timeout(timeout):
                await carry_out(self._context, body)
        except TimeoutError:
            raise Unavailable(f"{type(body).__name__} took longer than {timeout:g} s") from None

    async def request(self, host: HostId, body: ForVolume, answer: type[A], timeout: float) -> A:
        """What another host answers."""
        return await self._peer(host).ask(body, answer, timeout)

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer.close()

    def _peer(self, host: HostId) -> Peer:
        if host not in self._peers:
            self._peers[host] = Peer(self._context, self._address(host))
        return self._peers[host]

    def _address(self, host: HostId) -> PeerAddress:
        if host in self._named:
            return self._named[host]
        config = self._context.ledger.config()
        for spec in config.hosts if config else ():
            if spec.id == host:
                return PeerAddress(host=host, address=spec.address, peer_port=spec.peer_port)
        raise Refused(f"nothing says where the agent of {host} is reached", field="hosts")
