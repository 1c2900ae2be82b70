"""A simulated guest that is written down while it runs: it goes round as a move does, and what is saved is of
the moment at which it stands still."""

import asyncio

from nahtlos.model.errors import Unavailable
from nahtlos.physical.ports import MigrationPhase, Sink
from nahtlos.physical.sim.guests import Vmm
from nahtlos.physical.sim.world import World

LOOK_SECONDS = 0.002


async def save_live(world: World, vmm: Vmm, sink: Sink) -> None:
    stream = world.begin_saving(vmm)
    try:
        await sink(b"\n")  # what is sent again later is of no use to who reads it
        while stream.phase is MigrationPhase.ACTIVE:
            await asyncio.sleep(LOOK_SECONDS)
        if stream.phase is not MigrationPhase.COMPLETED:
            raise Unavailable(f"{vmm.id.unit} was not saved: {stream.error or stream.phase}")
        for piece in stream.taken:
            await sink(piece)
    finally:
        stream.cancel()
