"""One orchestrator: leads when it can, listens to agents, plans, answers operators.

    standby --lease--> term (agents, planning loop, renewals) --lease lost--> standby --...

Owns the life of a term and nothing in it. Real and simulated clouds run this same class; the composition
root brings the store, the identity, the catalogues and the listener.
"""

import asyncio
import logging

from nahtlos.runtime.controllers.agents import Agents
from nahtlos.runtime.controllers.catalogues import Identity, ImageCatalog, ReleaseCatalog
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.event_log import EventLog
from nahtlos.runtime.controllers.keys import Secrets, VolumeKeys
from nahtlos.runtime.controllers.leader import Leader, LeadershipLost
from nahtlos.runtime.controllers.loop import PlanningLoop
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.store import Store
from nahtlos.wire.transport import Channel

_log = logging.getLogger("nahtlos.runtime.orchestrator")


class Orchestrator:
    """`holder` names this process among those that share the database; `alone` says that there is no
    other."""

    def __init__(
        self,
        store: Store,
        *,
        holder: str,
        alone: bool,
        identity: Identity,
        releases: ReleaseCatalog,
        images: ImageCatalog,
        keyring: Secrets | None = None,
    ) -> None:
        self.log = EventLog(store)
        self.leader = Leader(store, holder, alone=alone)
        wake = asyncio.Event()
        self.agents = Agents(store, self.log, epoch=lambda: self.leader.epoch, wake=wake.set)
        keys = VolumeKeys(store, keyring) if keyring is not None else None
        if keys is not None:
            self.agents.secret_for = keys.secret_for
        self.loop = PlanningLoop(store, self.agents, self.log, wake=wake, keys=keys)
        self.cloud = CloudService(
            store,
            self.agents,
            self.log,
            leader_epoch=lambda: self.leader.epoch,
            wake=wake.set,
            identity=identity,
            releases=releases,
            images=images,
            keys=keyring,
        )

    async def serve_agent(self, channel: Channel) -> None:
        """`OnChannel` for the listener at which agents dial in."""
        await self.agents.serve(channel)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.log.run())
            while True:
                await self._term()

    async def resign(self) -> None:
        """After `run` was cancelled, to end in order: what is pending is written, the lease given back."""
        await self.leader.resign()
        await self.log.flush()

    async def _term(self) -> None:
        epoch = await self.leader.acquire()
        _log.info("leading, epoch %d", epoch)
        self._say("orchestrator.leads", f"leads by epoch {epoch}")
        try:
            async with asyncio.TaskGroup() as term:
                term.create_task(self.leader.hold())
                term.create_task(self.loop.run(epoch))
                term.create_task(self.cloud.power_fence.run(epoch))
        except* LeadershipLost as lost:
            _log.warning("no longer leading: %s", lost.exceptions[0])
            self._say("orchestrator.stands-by", f"no longer leads: {lost.exceptions[0]}")
        finally:
            await self.agents.disconnect_all()

    def _say(self, kind: str, text: str) -> None:
        self.log.say(EventDraft(kind=kind, subject="orchestrator", text=text))
