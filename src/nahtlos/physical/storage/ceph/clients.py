"""Who has an image open, and that whoever should not writes no more.

A client that died is a client for another half a minute, by the cluster's clock: so long would it wait for an
answer before it let others write, or take a snapshot. Here it is told by its silence, and shut out at once
where nobody may have the image open. One that is only slow is never taken for dead while its server may run.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from nahtlos.model.config import RbdEndpoint, VolumeAttachment
from nahtlos.model.errors import Conflict, Unavailable
from nahtlos.physical.settings import CephSettings
from nahtlos.physical.storage.ceph.images import ImageFacts, facts_of
from nahtlos.physical.storage.ceph.process import RbdProcess

BLOCKED_SECONDS = 7 * 24 * 3600
"""For a client that stood still while it was fenced and writes again when it is let go on."""


class Reach:
    """Of images as servers are told of them: a host that runs a server need not administer its volumes."""

    def __init__(self) -> None:
        self._processes: dict[CephSettings, RbdProcess] = {}

    async def alone(self, attachments: Iterable[VolumeAttachment]) -> None:
        """Whoever else has them open is shut out."""
        for image in (each.rbd for each in attachments if each.rbd is not None):
            await fence(self._process(image), image.image)

    async def close(self) -> None:
        for process in self._processes.values():
            await process.close()

    def _process(self, image: RbdEndpoint) -> RbdProcess:
        way = CephSettings(configuration=Path(image.configuration), user=image.user, pool=image.pool)
        return self._processes.setdefault(way, RbdProcess(way))


async def fence(rbd: RbdProcess, image: str) -> list[str]:
    """Whoever has it open never writes again; their addresses."""
    return msgspec.convert(await rbd.ask("fence", name=image, seconds=BLOCKED_SECONDS), type=list[str])


async def let_go(rbd: RbdProcess, image: ImageFacts) -> None:
    """Nobody has it open on return: one that has died is shut out. Conflict while somebody has."""
    if len(image.clients) == 1 and await _silent(rbd, image):
        await fence(rbd, image.name)
        return
    # One that died may have been given up while it was asked.
    now = facts_of(await rbd.ask("facts", name=image.name)) if image.clients else None
    if now is not None and now.clients:
        raise Conflict(
            f"'{image.name}' is open at {', '.join(now.clients)}",
            field="volume",
            remedy="detach it first",
        )


async def check_answers(rbd: RbdProcess, image: ImageFacts) -> None:
    """Whoever writes an image takes part in its snapshots: Unavailable if it does not answer."""
    if image.clients and await _silent(rbd, image):
        raise Unavailable(
            f"'{image.name}' is open at {', '.join(image.clients)}, which does not answer",
            field="volume",
            remedy="it is taken for dead after 30 s, or as soon as its server is started again",
        )


async def _silent(rbd: RbdProcess, image: ImageFacts) -> bool:
    return msgspec.convert(await rbd.ask("silent", name=image.name), type=bool)
