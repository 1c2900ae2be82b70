"""The planning loop: look, take out what has come true, plan, decide, tell.

    wake (or a second) -> read -> chores -> plan until stable, each step by compare-and-set -> executor

One pass makes one attempt; whatever it could not do, the next pass finds undone. Nothing here is
remembered but for sparing people repeated words: killed at any point, another process goes on.
"""

import asyncio
import logging
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import Blueprint, Campaign, CampaignState, PlanReport, Policy
from nahtlos.model.errors import Error, Stale
from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import Inventory
from nahtlos.model.power import PowerState
from nahtlos.planner.plan import plan
from nahtlos.planner.upgrade import has, upgraded_hosts
from nahtlos.runtime.controllers import failures, outcomes, volume_records
from nahtlos.runtime.controllers.agents import Agents
from nahtlos.runtime.controllers.bookkeeping import Chores, chores
from nahtlos.runtime.controllers.event_log import EventLog
from nahtlos.runtime.controllers.keys import VolumeKeys
from nahtlos.runtime.controllers.state import State, read
from nahtlos.runtime.controllers.volume_chores import write_volume_chores
from nahtlos.runtime.controllers.waits import LastingWaits
from nahtlos.runtime.executor.decide import decide
from nahtlos.runtime.executor.world import World
from nahtlos.runtime.store import blueprints, campaigns, intent, networking, operations, volumes
from nahtlos.runtime.store.campaigns import CampaignRow
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.store import Store

PASS_SECONDS = 1.0
PAUSE_SECONDS = 0.03
"""Between two passes, so that what changes together is looked at together."""
KEYS_SECONDS = 30.0
STEPS = 64
"""Blueprints one pass may make; the next pass goes on."""

_log = logging.getLogger("nahtlos.runtime.loop")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a pass has led to."""

    policy: Policy
    inventory: Inventory
    blueprint: Blueprint
    report: PlanReport


class PlanningLoop:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        log: EventLog,
        *,
        wake: asyncio.Event,
        keys: VolumeKeys | None = None,
    ) -> None:
        self._store = store
        self._agents = agents
        self._log = log
        self._wake = wake
        self._keys = keys
        self._keys_looked_at: float | None = None
        self._waits = LastingWaits()
        self._share: float | None = None
        self._bug = ""
        self.planned: Planned | None = None

    async def run(self, epoch: int) -> None:
        """Until cancelled, under `epoch`."""
        while True:
            self._wake.clear()
            try:
                await self.pass_once(epoch)
            except Stale as error:
                _log.info("lost a race: %s", error)
            except (Error, TimeoutError, OSError, SQLAlchemyError):
                _log.exception("pass failed")
            except Exception as error:
                # A bug in planning must not end the loop: agents go on with what they were told.
                self._tell_bug(error)
            await asyncio.sleep(PAUSE_SECONDS)
            await self._news()

    async def _news(self) -> None:
        try:
            async with asyncio.timeout(PASS_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def pass_once(self, epoch: int) -> Planned:
        """Raises Stale when a race was lost (to another leader, or to a request): look again."""
        state = await self._read()
        state = await self._do_chores(epoch, state)
        await self._destroy_spent_keys(epoch)
        planned = await self._plan(epoch, state)
        await self._execute(epoch, planned, state)
        self._report(planned)
        self.planned = planned
        return planned

    async def _read(self) -> State:
        async with self._store.reading() as tx:
            return await read(tx, self._agents.latest)

    # --- chores ---

    async def _do_chores(self, epoch: int, state: State) -> State:
        if state.blueprint is None:
            return state
        world = state.world(state.blueprint, self._agents.connected, self._store.clock())
        found = chores(state, world.policy, world.inventory, world)
        if not found:
            return state
        await self._write_chores(epoch, found, state, world)
        return await self._read()

    async def _write_chores(self, epoch: int, found: Chores, state: State, world: World) -> None:
        now = self._store.clock()
        drafts: list[EventDraft] = []
        async with self._store.deciding(epoch) as tx:
            for server in found.served_requests:
                await intent.clear_move_request(tx, server)
            for server in found.served_replacements:
                await intent.request_replacement(tx, server, None)
            for server in found.gone_servers:
                await intent.forget_server(tx, server)
                drafts.append(EventDraft(kind="server.gone", subject=server, text=f"{server} is gone"))
            for spec in found.started_again:
                await volumes.put_server(tx, spec)
                if spec.power.state is PowerState.OFF:
                    text = f"{spec.id} does not go back to its snapshot: that was given up; it stays stopped"
                    drafts.append(EventDraft(kind="server.revert", subject=spec.id, text=text))
            for spec in found.spent_memory:
                if spec.memory_volume is not None and spec.going_back is None:
                    await volumes.mark_removed(tx, spec.memory_volume)
                after = msgspec.structs.replace(spec, memory_volume=None, going_back=None)
                await volumes.put_server(tx, after)
            for spec in found.switched_off:
                await volumes.put_server(tx, spec)
                text = f"{spec.id} has switched itself off, and stays so until it is started"
                drafts.append(EventDraft(kind="server.off", subject=spec.id, text=text))
            drafts += await write_volume_chores(tx, found.of_volumes, now)
            for volume in found.gone_volumes:
                await volumes.forget_losses(tx, volume)
                await intent.forget_volume(tx, volume)
                drafts.append(EventDraft(kind="volume.gone", subject=volume, text=f"{volume} is gone"))
            for host, operation in found.stray_ends:
                status = world.status(host, operation)
                if status is not None:
                    await operations.end(tx, outcomes.stray_record(status, host), now)
            for router, before, at in found.moved_gateways:
                await networking.place_gateway(tx, router, before, at)
            for balancer in found.leaving_balancers:
                await networking.put_load_balancer(tx, balancer)
                text = f"{balancer.id} is carried by {balancer.host}"
                drafts.append(EventDraft(kind="load-balancer.moved", subject=balancer.id, text=text))
            for host, operation, error in found.impossible_moves:
                await operations.refuse(tx, operation, host, error)
            if found.campaign_over and state.campaign is not None:
                drafts.append(await self._end_campaign(tx, state, world))
        for draft in drafts:
            self._log.say(draft)

    async def _destroy_spent_keys(self, epoch: int) -> None:
        """Once in a while: what makes a key spent (a volume, a backup is gone) lasts longer than that."""
        now = self._store.clock()
        looked_at = self._keys_looked_at
        if self._keys is None or (looked_at is not None and now < looked_at + KEYS_SECONDS):
            return
        async with self._store.deciding(epoch) as tx:
            spent = await self._keys.destroy_spent(tx)
        self._keys_looked_at = now
        for key in spent:
            text = f"nothing is encrypted by {key} any more: it is destroyed"
            self._log.say(EventDraft(kind="key.destroyed", subject=key, text=text))

    async def _end_campaign(self, tx: AsyncConnection, state: State, world: World) -> EventDraft:
        assert state.campaign is not None
        campaign = state.campaign.campaign
        cancelled = campaign.state is CampaignState.CANCELLED
        ended = CampaignState.CANCELLED if cancelled else CampaignState.DONE
        upgraded = len(upgraded_hosts(world.policy, world.blueprint))
        await campaigns.put_progress(tx, replace(state.campaign, hosts_upgraded=upgraded))
        await campaigns.set_state(tx, campaign, ended, ended_at=self._store.clock())
        if not cancelled and _is_everywhere(world, campaign):
            await intent.set_setting(tx, intent.DEFAULTS[campaign.component], campaign.to_release)
        text = f"{campaign.id} to {campaign.to_release} is {'cancelled' if cancelled else 'done'}"
        return EventDraft(kind="campaign.ended", subject=campaign.id, text=text, data={"state": ended.value})

    # --- planning ---

    async def _plan(self, epoch: int, state: State) -> Planned:
        policy, parent = state.policy(), state.blueprint
        inventory = state.inventory(self._agents.connected)
        blueprint, report = plan(policy, inventory, parent)
        steps = 1
        while blueprint is not parent and steps <= STEPS:
            await self._set_target(epoch, policy, inventory, parent, blueprint)
            parent = blueprint
            blueprint, report = plan(policy, inventory, parent)
            steps += 1
        assert parent is not None
        if blueprint is not parent:
            self._wake.set()
        return Planned(policy=policy, inventory=inventory, blueprint=parent, report=report)

    async def _set_target(
        self, epoch: int, policy: Policy, inventory: Inventory, parent: Blueprint | None, blueprint: Blueprint
    ) -> None:
        now = self._store.clock()
        begun = outcomes.begun(parent, blueprint, policy, inventory)
        tasks = volume_records.begun(parent, blueprint)
        async with self._store.deciding(epoch) as tx:
            known = await operations.get(tx, outcomes.left(parent, blueprint))
            ended = outcomes.ended(parent, blueprint, inventory, known)
            await blueprints.set_target(tx, blueprint, epoch=epoch, now=now)
            for volume in failures.volumes_to_fence(policy, parent, blueprint):
                await volumes.fence(tx, volume, policy.hosts.keys() - inventory.connected)
            for record in (*begun, *(record for record, _ in tasks)):
                await operations.begin(tx, record, now)
            for record in ended:
                await operations.end(tx, record, now)
        _log.info("%s: %s", blueprint.id, blueprint.reason)
        for draft in outcomes.announcements(parent, blueprint, begun, ended):
            self._log.say(draft)
        for _, draft in tasks:
            self._log.say(draft)

    # --- telling ---

    async def _execute(self, epoch: int, planned: Planned, state: State) -> None:
        """Configurations are stored before anyone is told of them."""
        if planned.blueprint is not state.blueprint:
            state = await self._read()
        if state.blueprint is None or state.blueprint.id != planned.blueprint.id:
            raise Stale("the target has changed since it was planned")
        orders = decide(state.world(planned.blueprint, self._agents.connected, self._store.clock()))
        late, progress = _late_times(state), _progress(planned, state)
        if orders.new_configs or late or progress:
            async with self._store.deciding(epoch) as tx:
                for config in orders.new_configs:
                    await blueprints.put_host_config(tx, config)
                for operation, times in late:
                    await operations.add_times(tx, operation, times)
                if progress is not None:
                    await campaigns.put_progress(tx, progress)
        self._agents.post(orders.hosts)

    # --- saying ---

    def _report(self, planned: Planned) -> None:
        self._bug = ""
        for wait in self._waits.lasting(planned.report.waiting, self._store.clock()):
            text = wait.reason + (f" ({wait.remedy})" if wait.remedy else "")
            self._log.say(
                EventDraft(kind="waiting", subject=wait.subject, text=text, data={"for": wait.kind.value})
            )
        share = planned.report.capacity.share
        if share != self._share:
            if self._share is not None or share < 1.0:
                text = f"{share:.0%} of what was promised could be placed now"
                self._log.say(EventDraft(kind="capacity", subject="cloud", text=text, data={"share": share}))
            self._share = share

    def _tell_bug(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self._bug:
            _log.exception("bug in the planning loop")
            self._log.say(EventDraft(kind="bug", subject="orchestrator", text=text))
        self._bug = text


def _is_everywhere(world: World, campaign: Campaign) -> bool:
    """Then hosts that join are given it, too."""
    plans = world.blueprint.hosts
    concerned = [h for h, spec in world.policy.hosts.items() if has(spec.role, campaign.component)]
    return all(
        h in plans and plans[h].release_of(campaign.component) == campaign.to_release for h in concerned
    )


def _progress(planned: Planned, state: State) -> CampaignRow | None:
    """What is new of the campaign that is not over; the capacity's floor only falls."""
    row = state.campaign
    if row is None:
        return None
    now = replace(
        row,
        capacity_floor=min(row.capacity_floor, planned.report.capacity.share),
        hosts_upgraded=len(upgraded_hosts(planned.policy, planned.blueprint)),
    )
    return now if now != row else None


def _late_times(state: State) -> list[tuple[OperationId, dict[str, float]]]:
    """What the slower side of a recorded operation adds to its times, before it may forget it."""
    return [
        (o.id, o.times)
        for seen in state.inventories.values()
        for o in seen.operations
        if o.id in state.ended and o.times
    ]
