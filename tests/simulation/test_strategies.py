"""Undisturbed campaigns of a simulated cloud: in place, and with servers that may not be moved."""

import tempfile
from pathlib import Path

import pytest
from campaign import Campaign, Plan, Verdict
from crash_plays import memory
from quick_database import database_in_the_loop

from nahtlos.model import version_pairs
from nahtlos.model.blueprint import Strategy
from nahtlos.model.nouns import Component
from nahtlos.model.version_pairs import PAIRS, Pair, Way
from nahtlos.model.version_pairs import Verdict as Said
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.runtime.controllers.cloud_service import CloudService

NOT_TO_BE_MOVED = Pair(
    way=Way.MOVE,
    old="1",
    new="*",
    accelerator="sim",
    verdict=Said.REFUSED,
    why="it loses what it copies",
    source="this test",
)


class Strategic(Campaign):
    strategy = Strategy.AUTO
    in_place = 0

    async def _start(self, service: CloudService) -> None:
        await service.start_upgrade(NEW, None, Component.HYPERVISOR, self.strategy)

    async def _check_releases(self) -> None:
        await super()._check_releases()
        view = await self.cloud.ask(lambda service: service.campaign(None))
        done = [record for record in view.operations if record.kind == "replace" and record.state == "done"]
        self.in_place = len(done)
        assert all(record.predicted is not None for record in done)
        carried = [r for r in view.operations if r.kind in ("move", "replace") and r.state == "done"]
        assert carried
        assert all(record.times["running"] < record.times["answered"] for record in carried)


def calm_plan() -> Plan:
    found = (Plan.of(seed) for seed in range(1, 100))
    return next(
        plan
        for plan in found
        if plan.events == 0
        and plan.failing == plan.drop == plan.late == 0.0
        and plan.component is Component.HYPERVISOR
    )


def played(strategy: Strategy) -> tuple[Verdict, int]:
    plan = calm_plan()
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
        campaign = Strategic(plan, Path(folder))
        campaign.strategy = strategy
        run_virtual(campaign.cloud.run(campaign.play), seed=plan.seed, limit_seconds=5000)
        return campaign.judge(), campaign.in_place


def test_in_place_no_server_leaves_its_host_and_nothing_is_lost() -> None:
    verdict, in_place = played(Strategy.IN_PLACE)
    assert not verdict.problems and not verdict.waits
    assert (verdict.moves, verdict.lost) == (0, 0)
    assert in_place >= calm_plan().servers


def test_auto_takes_over_in_place_what_the_table_does_not_let_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_pairs, "PAIRS", (NOT_TO_BE_MOVED, *PAIRS))
    verdict, in_place = played(Strategy.AUTO)
    assert not verdict.problems and not verdict.waits
    assert (verdict.moves, verdict.lost) == (0, 0)
    assert in_place >= calm_plan().servers
