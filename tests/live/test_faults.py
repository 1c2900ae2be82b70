"""Faults at every step of a move, in a lab of real processes, packets and disks.

About four minutes on two quiet cores. One lab for all of it, two servers under load: one is moved and hit,
the other must not notice. Whatever is done, never do two copies of a server run, no acknowledged block is
lost, memory stays whole, the server goes on as the same boot, and the move, tried again by the cloud,
arrives in the end.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from faults import BYSTANDER, MOVER, Fault, FaultLab, Monitors, Step, Window, until

from nahtlos.lab.datacentre import LabShape, opened, unique_name
from nahtlos.model.blueprint import CampaignState
from nahtlos.model.ids import HostId
from nahtlos.model.nouns import Size

pytestmark = [
    pytest.mark.live,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
SHAPE = LabShape(hosts=2, capacity=Size(vcpus=4, memory_mib=1024), promised=Size(vcpus=4, memory_mib=1024))
CAMPAIGN_SECONDS = 150.0
KILLS = (Fault.ORCHESTRATOR, Fault.SOURCE_AGENT, Fault.DESTINATION_AGENT, Fault.DESTINATION_VMM)
CASES = [
    *((fault, step) for step in Step for fault in KILLS if (fault, step) != (KILLS[-1], Step.COMMITTED)),
    *((Fault.LINK_STALLED, step) for step in Step),
    *((Fault.LINK_CUT, step) for step in Step),
    (Fault.SOURCE_SUPERVISOR, Step.PRECOPY),
    (Fault.DESTINATION_SUPERVISOR, Step.PRECOPY),
    (Fault.DESTINATION_VMM, Step.COMMITTED),  # the only one after which a server has to be started again
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[FaultLab]:
    out: Path = tmp_path_factory.mktemp("faults")
    async with opened(unique_name("flt"), SHAPE) as datacentre, datacentre.client as client:
        monitors = Monitors(datacentre.paths.run)
        watching = asyncio.create_task(monitors.watch())
        lab = FaultLab(datacentre, client, monitors, out)
        try:
            await lab.populate()
            lab.start_probe()
            yield lab
        finally:
            lab.end_probe()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize(("fault", "step"), CASES, ids=str)
async def test_a_fault_at_a_step_of_a_move(lab: FaultLab, fault: Fault, step: Step) -> None:
    print(await lab.move_with(fault, step))


async def test_an_agent_killed_finds_its_servers_and_no_guest_notices(lab: FaultLab) -> None:
    await lab.settle()
    began = time.time()
    for host in [h.id for h in await lab.client.hosts()]:
        killed = time.time()
        os.kill(await lab.pid(host, "agent"), signal.SIGKILL)

        async def is_back(host: HostId = host, killed: float = killed) -> bool:
            """A report that was taken by the new one. The old one's last is older than its end."""
            inventory = (await lab.client.host(host)).inventory
            return inventory is not None and inventory.taken_at > killed

        await until(f"the agent of {host}", is_back, 30)
    await lab.settle()
    assert lab.monitors.longest_pause(MOVER, began) == lab.monitors.longest_pause(BYSTANDER, began) == 0
    for server in (MOVER, BYSTANDER):
        await lab.check(server)
        lab.windows.append(Window("agents killed in peace", server, began, time.time(), lossless=True))


@pytest.mark.timeout(600)
async def test_a_campaign_outlives_its_orchestrator_and_an_agent(lab: FaultLab) -> None:
    await lab.settle()
    _, new = lab.releases()
    began = time.time()

    async def kill_orchestrator() -> None:
        os.kill(await lab.pid("ctl", "orchestrator"), signal.SIGKILL)

    async def upgraded(count: int) -> bool:
        return (await lab.client.campaign(None)).hosts_upgraded >= count

    await lab.client.start_upgrade(new.id, None)
    first = await lab.monitors.until("a move", lambda m: m.seen_at > began and m.alive, CAMPAIGN_SECONDS)
    await kill_orchestrator()
    await until("one host upgraded", lambda: upgraded(1), CAMPAIGN_SECONDS)
    await kill_orchestrator()
    os.kill(await lab.pid(first.host, "agent"), signal.SIGKILL)

    async def ended() -> bool:
        return (await lab.client.campaign(None)).campaign.state is not CampaignState.RUNNING

    await until("the campaign's end", ended, CAMPAIGN_SECONDS, every=0.2)
    view = await lab.client.campaign(None)
    assert view.campaign.state is CampaignState.DONE
    assert (view.hosts_upgraded, view.hosts_total) == (2, 2)
    await lab.settle()
    assert {s.release for s in await lab.client.servers()} == {new.id}
    for server in (MOVER, BYSTANDER):
        await lab.check(server)
        lab.windows.append(Window("campaign", server, began, time.time(), lossless=True))


async def test_nothing_was_lost_where_nothing_may_be_lost(lab: FaultLab) -> None:
    """Of everything above that was run; the probe has counted all the time."""
    await lab.settle()
    lab.end_probe()
    losses = lab.losses()
    for window, lost in losses.items():
        print(f"{window.name}: {window.server} lost {lost}")
    assert not {f"{w.name}: {w.server}": lost for w, lost in losses.items() if w.lossless and lost}
