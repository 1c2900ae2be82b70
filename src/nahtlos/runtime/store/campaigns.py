"""Campaigns: at most one is not over. The table's rows are its history."""

from dataclasses import dataclass

import msgspec
from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import Campaign, CampaignState, Strategy
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import CampaignId, HostId, ReleaseId
from nahtlos.model.nouns import Component
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered


@dataclass(frozen=True, kw_only=True)
class CampaignRow:
    campaign: Campaign
    capacity_floor: float
    """Least share of what was promised that could have been placed, since it began."""
    moves_forecast: int
    hosts_upgraded: int


async def begin(
    tx: AsyncConnection,
    *,
    to_release: ReleaseId,
    from_releases: tuple[ReleaseId, ...],
    hosts: tuple[HostId, ...],
    moves_forecast: int,
    now: float,
    component: Component = Component.HYPERVISOR,
    strategy: Strategy = Strategy.AUTO,
    no_way_back: bool = False,
) -> Campaign:
    """Conflict while another is not over."""
    await check_none_open(tx)
    last = (await tx.execute(select(func.max(schema.campaigns.c.number)))).scalar() or 0
    campaign = Campaign(
        id=CampaignId(f"campaign-{last + 1}"),
        to_release=to_release,
        hosts=hosts,
        state=CampaignState.RUNNING,
        from_releases=from_releases,
        created_at=now,
        component=component,
        strategy=strategy,
        no_way_back=no_way_back,
    )
    await tx.execute(
        insert(schema.campaigns).values(
            number=last + 1,
            id=campaign.id,
            state=campaign.state,
            document=text_of(campaign),
            capacity_floor=1.0,
            moves_forecast=moves_forecast,
            hosts_upgraded=0,
        )
    )
    return campaign


async def check_none_open(tx: AsyncConnection) -> None:
    open_one = await current(tx)
    if open_one is not None:
        raise Conflict(
            f"campaign {open_one.campaign.id} to {open_one.campaign.to_release} is not over",
            field="campaign",
            remedy="wait until it has ended, or cancel it: nahtlos upgrade cancel",
        )


@remembered
async def current(tx: AsyncConnection) -> CampaignRow | None:
    """The one that is not over, or whose cancellation is not complete."""
    row = (
        await tx.execute(select(schema.campaigns).where(schema.campaigns.c.ended_at.is_(None)))
    ).one_or_none()
    return None if row is None else _row(row)


async def newest(tx: AsyncConnection) -> CampaignRow | None:
    query = select(schema.campaigns).order_by(schema.campaigns.c.number.desc()).limit(1)
    row = (await tx.execute(query)).one_or_none()
    return None if row is None else _row(row)


@remembered
async def history(tx: AsyncConnection) -> tuple[CampaignRow, ...]:
    """All, oldest first."""
    rows = await tx.execute(select(schema.campaigns).order_by(schema.campaigns.c.number))
    return tuple(_row(row) for row in rows)


async def set_state(
    tx: AsyncConnection, campaign: Campaign, state: CampaignState, ended_at: float | None = None
) -> Campaign:
    """Its end, unless it is cancelled, is its point of no return."""
    committed = campaign.committed or state is CampaignState.DONE
    changed = msgspec.structs.replace(campaign, state=state, ended_at=ended_at, committed=committed)
    await put(tx, changed)
    return changed


async def put(tx: AsyncConnection, campaign: Campaign) -> None:
    """What has become of one that was begun."""
    await tx.execute(
        update(schema.campaigns)
        .where(schema.campaigns.c.id == campaign.id)
        .values(state=campaign.state, document=text_of(campaign), ended_at=campaign.ended_at)
    )


async def put_progress(tx: AsyncConnection, row: CampaignRow) -> None:
    await tx.execute(
        update(schema.campaigns)
        .where(schema.campaigns.c.id == row.campaign.id)
        .values(capacity_floor=row.capacity_floor, hosts_upgraded=row.hosts_upgraded)
    )


def _row(row: Row[tuple[object, ...]]) -> CampaignRow:
    return CampaignRow(
        campaign=value_of(row.document, Campaign),
        capacity_floor=row.capacity_floor,
        moves_forecast=row.moves_forecast,
        hosts_upgraded=row.hosts_upgraded,
    )
