"""What this cloud has measured of moves and replacements, as the planner's predictions use it."""

from collections.abc import Mapping

from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import HostInventory
from nahtlos.model.prediction import Experience, Sample
from nahtlos.planner.estimate import learn, slowest
from nahtlos.runtime.controllers import outcomes
from nahtlos.runtime.store import operations
from nahtlos.runtime.store.intent import ServerRow

SAMPLES = 200
"""Of each kind, at most."""


async def measured(tx: AsyncConnection, servers: Mapping[ServerId, ServerRow]) -> list[Sample]:
    """Newest first."""
    records = [
        *await operations.newest(tx, "move", SAMPLES),
        *await operations.newest(tx, outcomes.REPLACE, SAMPLES),
    ]
    records.sort(key=lambda record: max(record.times.values(), default=0.0), reverse=True)
    specs = {str(name): row.spec for name, row in servers.items()}
    known = (
        outcomes.sample_of(record, specs[record.subject]) for record in records if record.subject in specs
    )
    return [sample for sample in known if sample is not None]


async def experience(
    tx: AsyncConnection,
    servers: Mapping[ServerId, ServerRow],
    seen: Mapping[HostId, HostInventory],
    *,
    campaign: bool,
    parallel: int,
) -> Experience:
    """Read only where something depends on it: a campaign goes on, or a server has a budget."""
    budgets = any(row.spec.blackout_budget_ms for row in servers.values())
    if not campaign and not budgets:
        return Experience()
    accelerator = slowest(host.accelerator.name for host in seen.values() if host.accelerator is not None)
    return learn(await measured(tx, servers), accelerator, parallel)
