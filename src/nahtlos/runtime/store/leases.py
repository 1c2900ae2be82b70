"""Who leads: one row with an epoch, judged by the database's clock.

The epoch rises with every change of leader and never falls. Agents refuse an epoch lower than one they
have obeyed, so a leader that froze and woke is harmless even before it notices.
"""

from typing import Any

from sqlalchemy import Float, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from nahtlos.model.errors import Stale
from nahtlos.runtime.store.schema import leases

CLOCK_FUNCTION = "nahtlos_now"
LEADER = "leader"


class DatabaseNow(FunctionElement[float]):
    """Seconds since 1970 by the database's clock."""

    type = Float()
    inherit_cache = True


def _now_sqlite(_element: Any, _compiler: Any, **_: Any) -> str:
    return f"{CLOCK_FUNCTION}()"


def _now_default(_element: Any, _compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())"


compiles(DatabaseNow)(_now_default)
compiles(DatabaseNow, "sqlite")(_now_sqlite)


async def acquire(tx: AsyncConnection, holder: str, ttl: float, *, take_over: bool = False) -> int | None:
    """Lead for `ttl` seconds; the new epoch, or None while another's lease runs. `take_over`: the caller
    knows that the former holder is gone (it holds the lock on the database's folder)."""
    row = (
        await tx.execute(
            select(leases.c.epoch, leases.c.expires_at, DatabaseNow().label("now")).where(
                leases.c.name == LEADER
            )
        )
    ).one_or_none()
    if row is None:
        values = {"name": LEADER, "holder": holder, "epoch": 1, "expires_at": DatabaseNow() + ttl}
        await tx.execute(insert(leases).values(values))
        return 1
    if row.expires_at > row.now and not take_over:
        return None
    epoch = int(row.epoch) + 1
    await tx.execute(
        update(leases)
        .where(leases.c.name == LEADER)
        .values(holder=holder, epoch=epoch, expires_at=DatabaseNow() + ttl)
    )
    return epoch


async def renew(tx: AsyncConnection, epoch: int, ttl: float) -> None:
    """Raises Stale if the lease has passed to another, or has run out."""
    await check(tx, epoch)
    await tx.execute(update(leases).where(leases.c.name == LEADER).values(expires_at=DatabaseNow() + ttl))


async def release(tx: AsyncConnection, epoch: int) -> None:
    """Let another lead at once. Nothing happens if this epoch is over already."""
    await tx.execute(
        update(leases).where(leases.c.name == LEADER, leases.c.epoch == epoch).values(expires_at=0.0)
    )


async def now(tx: AsyncConnection) -> float:
    """By the database's clock."""
    return float((await tx.execute(select(DatabaseNow()))).scalar_one())


async def check(tx: AsyncConnection, epoch: int) -> None:
    row = (
        await tx.execute(
            select(leases.c.epoch, leases.c.expires_at, DatabaseNow().label("now")).where(
                leases.c.name == LEADER
            )
        )
    ).one_or_none()
    if row is None or row.epoch != epoch:
        raise Stale(f"epoch {epoch} does not lead: {row.epoch if row else 'nobody'} does")
    if row.expires_at <= row.now:
        raise Stale(f"the lease of epoch {epoch} ran out")
