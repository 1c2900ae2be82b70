"""Any volume of the cloud, read and written by an agent itself, over NBD with both sides proven: what is kept
of a server's memory while it is suspended. Writes go to every copy, reads to the first one that answers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.physical.storage.nbd import Address, NbdClient
from nahtlos.wire.tls import client_context, host_party

T = TypeVar("T")


class RawNbdVolume:
    def __init__(self, attachment: VolumeAttachment, pki_dir: Path) -> None:
        self._attachment = attachment
        self._pki_dir = pki_dir
        self._clients: list[NbdClient] = []
        self.size = attachment.size_mib << 20

    async def open(self, *, writing: bool) -> None:
        """All copies, or for reading one. Unavailable while they are not served."""
        ends = self._ends()
        why = ""
        for end in ends:
            try:
                self._clients.append(await asyncio.to_thread(self._client, end))
            except Error as error:
                why = error.message
                if writing:
                    await self.close()
                    raise Unavailable(
                        f"a copy of {self._attachment.volume} cannot be written: {why}"
                    ) from error
            else:
                if not writing:
                    return
        if not self._clients:
            raise Unavailable(f"no copy of {self._attachment.volume} can be read: {why}")

    def _ends(self) -> tuple[VolumeEndpoint, ...]:
        at = self._attachment
        alone = VolumeEndpoint(host=HostId(""), address=at.address, port=at.port, export=at.export)
        return tuple(copy for copy in at.copies if not copy.joining) or (alone,)

    def _client(self, end: VolumeEndpoint) -> NbdClient:
        return NbdClient(
            Address(end.address, end.port, end.export),
            tls=client_context(self._pki_dir),
            expect=host_party(end.host) if end.host else None,
            contexts=(),
        )

    async def write(self, offset: int, data: bytes) -> None:
        await self._each(lambda client: client.write(offset, data))

    async def flush(self) -> None:
        await self._each(lambda client: client.flush())

    async def read(self, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(self._clients[0].read, offset, length)

    async def _each(self, act: Callable[[NbdClient], T]) -> None:
        for client in self._clients:
            await asyncio.to_thread(act, client)

    async def close(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            await asyncio.to_thread(client.close)
