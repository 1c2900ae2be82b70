"""The chain of blueprints, the one target, and what each host was last told.

The target is set by compare-and-set on the parent: who planned on something older gets Stale.
"""

import hashlib

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import Blueprint
from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Stale
from nahtlos.model.ids import BlueprintId, HostId
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered

KEPT = 1000
"""Blueprints kept for looking back."""

ONLY = 1


def number_of(blueprint: BlueprintId) -> int:
    """`bp-17` -> 17"""
    return int(blueprint.removeprefix("bp-"))


@remembered
async def target(tx: AsyncConnection) -> Blueprint | None:
    query = select(schema.blueprints.c.document).join(
        schema.target, schema.target.c.blueprint == schema.blueprints.c.id
    )
    text = (await tx.execute(query)).scalar_one_or_none()
    return None if text is None else value_of(text, Blueprint)


async def set_target(tx: AsyncConnection, blueprint: Blueprint, *, epoch: int, now: float) -> None:
    """Make `blueprint` the target. Stale unless its parent is the target now."""
    is_now = (await tx.execute(select(schema.target.c.blueprint))).scalar_one_or_none()
    if is_now != blueprint.parent:
        raise Stale(f"{blueprint.id} was planned on {blueprint.parent}, but the target is {is_now}")
    number = number_of(blueprint.id)
    await tx.execute(
        insert(schema.blueprints).values(
            number=number,
            id=blueprint.id,
            parent=blueprint.parent,
            decided_at=now,
            epoch=epoch,
            document=text_of(blueprint),
        )
    )
    if is_now is None:
        await tx.execute(insert(schema.target).values(only=ONLY, blueprint=blueprint.id))
    else:
        await tx.execute(update(schema.target).values(blueprint=blueprint.id))
    await tx.execute(delete(schema.blueprints).where(schema.blueprints.c.number <= number - KEPT))


async def blueprint(tx: AsyncConnection, wanted: BlueprintId) -> Blueprint | None:
    query = select(schema.blueprints.c.document).where(schema.blueprints.c.id == wanted)
    text = (await tx.execute(query)).scalar_one_or_none()
    return None if text is None else value_of(text, Blueprint)


def digest_of(config: HostConfig) -> str:
    """Of everything but the generation."""
    return hashlib.sha256(text_of(msgspec.structs.replace(config, generation=0)).encode()).hexdigest()


@remembered
async def host_configs(tx: AsyncConnection) -> dict[HostId, HostConfig]:
    rows = await tx.execute(select(schema.host_configs).order_by(schema.host_configs.c.host))
    return {HostId(row.host): value_of(row.document, HostConfig) for row in rows}


async def put_host_config(tx: AsyncConnection, config: HostConfig) -> None:
    """Before it is sent. Stale unless its generation is above the stored one, so that no generation ever
    has two contents."""
    table = schema.host_configs
    before = (
        await tx.execute(select(table.c.generation).where(table.c.host == config.host))
    ).scalar_one_or_none()
    if before is not None and before >= config.generation:
        raise Stale(f"{config.host} was given generation {before} already")
    values = {
        "generation": config.generation,
        "digest": digest_of(config),
        "document": text_of(config),
    }
    statement = upsert(table).values(host=config.host, **values)
    await tx.execute(statement.on_conflict_do_update(index_elements=["host"], set_=values))
