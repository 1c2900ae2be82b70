"""Servers that are not to run: when that is believed, what it frees, where they are kept, when they run."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import OperationId, ReleaseId, VolumeId
from nahtlos.model.inventory import (
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
    RunState,
    ServerStatus,
)
from nahtlos.model.nouns import Size
from nahtlos.model.power import Power, PowerState, SavedState
from nahtlos.physical.agent.power import PowerStep, power_step
from nahtlos.physical.ports import VmmId, VmmStatus
from nahtlos.planner.plan import plan

ONE, H1, H2 = server_id(1), host_id(1), host_id(2)


def ask(cloud: Cloud, power: Power) -> None:
    spec = msgspec.structs.replace(cloud.policy.servers[ONE], power=power)
    cloud.want(servers={**cloud.policy.servers, ONE: spec})


def told(cloud: Cloud, state: RunState, power: int, saved: SavedState | None = None) -> Inventory:
    """What is seen, with hosts that know of servers that are stopped."""
    seen = cloud.world.look()

    def of(status: ServerStatus) -> ServerStatus:
        changes = {"state": state, "power": power, "saved": saved} if status.id == ONE else {}
        return msgspec.structs.replace(status, **changes)

    hosts = {
        host: msgspec.structs.replace(
            each, knows=("power", "suspend"), servers=tuple(of(status) for status in each.servers)
        )
        for host, each in seen.hosts.items()
    }
    return msgspec.structs.replace(seen, hosts=hosts)


def plan_on(cloud: Cloud, seen: Inventory) -> None:
    for _ in range(4):
        following, cloud.report = plan(cloud.policy, seen, cloud.blueprint)
        if following is cloud.blueprint:
            return
        cloud.blueprint = following


def stopped_cloud(*layout: int) -> Cloud:
    cloud = running_cloud(layout)
    ask(cloud, Power(state=PowerState.OFF, serial=3))
    plan_on(cloud, told(cloud, RunState.STOPPED, 3))
    return cloud


@pytest.mark.parametrize(("state", "power"), [(RunState.RUNNING, 3), (RunState.STOPPED, 2)])
def test_a_stop_is_believed_of_the_newest_request_only(state: RunState, power: int) -> None:
    """One seen stopped by an older request may have been told to run since."""
    cloud = running_cloud((1, 0))
    ask(cloud, Power(state=PowerState.OFF, serial=3))
    plan_on(cloud, told(cloud, state, power))
    assert not cloud.now.off
    plan_on(cloud, told(cloud, RunState.STOPPED, 3))
    assert cloud.now.off == {ONE: 3}


def test_a_campaign_switches_its_host_under_it() -> None:
    cloud = stopped_cloud(1, 0)
    cloud.campaign(hosts=(1,))
    plan_on(cloud, told(cloud, RunState.STOPPED, 3))
    assert (cloud.where(1), cloud.release(1), cloud.now.moves) == (H1, NEW, ())


def test_a_drain_takes_it_along_without_a_move() -> None:
    cloud = stopped_cloud(1, 0)
    cloud.intend(1, HostIntent.DRAINED)
    plan_on(cloud, told(cloud, RunState.STOPPED, 3))
    assert (cloud.where(1), cloud.now.servers[ONE].epoch, cloud.now.moves) == (H2, 2, ())
    assert cloud.now.off == {ONE: 3}


def test_it_runs_again_where_there_is_room_and_waits_where_there_is_none() -> None:
    cloud = stopped_cloud(1, 0)
    ask(cloud, Power(state=PowerState.ON, serial=4, boot=4))
    seen = told(cloud, RunState.STOPPED, 3)
    full = {
        h: msgspec.structs.replace(i, capacity=Size(vcpus=1, memory_mib=64)) for h, i in seen.hosts.items()
    }
    plan_on(cloud, msgspec.structs.replace(seen, hosts=full))
    assert cloud.now.off == {ONE: 3}
    assert "is to run again" in cloud.reasons(ONE)
    full[H2] = seen.hosts[H2]
    plan_on(cloud, msgspec.structs.replace(seen, hosts=full))
    assert (cloud.now.off, cloud.where(1)) == ({}, H2)


def test_what_was_saved_goes_on_only_by_a_release_the_table_allows() -> None:
    cloud = running_cloud((1, 0))
    cloud.want(release_versions={OLD: "10.0.2", NEW: "11.1.3", ReleaseId("q"): "6.0"})
    saved = SavedState(
        volume=VolumeId("m"),
        serial=3,
        digest="",
        bytes=1,
        release=ReleaseId("q"),
        machine="m",
        vcpus=1,
        memory_mib=256,
        accelerator="tcg",
    )
    ask(cloud, Power(state=PowerState.SUSPENDED, serial=3))
    plan_on(cloud, told(cloud, RunState.SUSPENDED, 3, saved))
    assert (cloud.now.off, cloud.now.saved) == ({ONE: 3}, {ONE: saved})
    ask(cloud, Power(state=PowerState.ON, serial=4))
    plan_on(cloud, told(cloud, RunState.SUSPENDED, 3, saved))
    assert ONE in cloud.now.off
    assert "cannot go on from what was saved" in cloud.reasons(ONE)
    known = {**cloud.policy.release_versions, ReleaseId("q"): "10.0.2"}
    cloud.want(release_versions=known)
    plan_on(cloud, told(cloud, RunState.SUSPENDED, 3, saved))
    assert (cloud.now.off, cloud.now.saved) == ({}, {ONE: saved})
    plan_on(cloud, told(cloud, RunState.RUNNING, 4))
    assert not cloud.now.saved


def test_why_it_is_not_carried_out_yet_is_told() -> None:
    cloud = running_cloud((1, 0))
    ask(cloud, Power(state=PowerState.SUSPENDED, serial=1))
    seen = told(cloud, RunState.RUNNING, 0)
    failed = OperationStatus(
        id=OperationId("suspend-1"),
        kind=OperationKind.SUSPEND,
        state=OperationState.UNDONE,
        step="done",
        server=ONE,
        error=ErrorRecord(kind="unavailable", message="a copy cannot be written"),
    )
    at = msgspec.structs.replace(seen.hosts[H1], operations=(failed,))
    plan_on(cloud, msgspec.structs.replace(seen, hosts={**seen.hosts, H1: at}))
    assert "is to be suspended; the last attempt was undone: a copy cannot be written" in cloud.reasons(ONE)
    plan_on(cloud, told(cloud, RunState.RUNNING, 1))
    assert "suspended" not in cloud.reasons(ONE)


# --- what an agent does of it ----------------------------------------------------------------------------


def config(state: PowerState, serial: int, boot: int = 0, *, saved: int = 0) -> ServerConfig:
    spec = Cloud(1)
    spec.create(1)
    server = msgspec.structs.replace(
        spec.policy.servers[ONE], power=Power(state=state, serial=serial, boot=boot)
    )
    kept = None
    if saved:
        kept = SavedState(
            volume=VolumeId("m"),
            serial=saved,
            digest="",
            bytes=1,
            release=OLD,
            machine="m",
            vcpus=1,
            memory_mib=256,
        )
    at = VolumeAttachment(volume=VolumeId("v"), address="", port=0, export="v.e1")
    return ServerConfig(spec=server, epoch=1, volume=at, saved=kept)


ON, OFF, SUSPENDED = PowerState


@pytest.mark.parametrize(
    ("held", "wanted", "vmm", "step"),
    [
        (config(ON, 1), config(ON, 1), RunState.RUNNING, None),
        (config(ON, 1), config(ON, 1), None, None),
        (config(ON, 1), config(ON, 1), RunState.STOPPED, PowerStep.STOP),
        (config(ON, 2), config(OFF, 1), RunState.RUNNING, None),
        (config(ON, 1), config(OFF, 2), RunState.RUNNING, PowerStep.STOP),
        (config(ON, 1), config(OFF, 2), None, PowerStep.STOP),
        (config(OFF, 2), config(OFF, 2), RunState.PAUSED, PowerStep.STOP),
        (config(OFF, 2), config(OFF, 2), None, None),
        (config(OFF, 2), config(ON, 3, 3), None, PowerStep.BOOT),
        (config(ON, 1), config(ON, 2, 2), RunState.RUNNING, PowerStep.REBOOT),
        (config(ON, 1), config(ON, 2, 2), None, PowerStep.BOOT),
        (config(ON, 1), config(ON, 2), RunState.RUNNING, PowerStep.ADOPT),
        (config(ON, 1), config(SUSPENDED, 2), RunState.RUNNING, PowerStep.SUSPEND),
        (config(ON, 1), config(SUSPENDED, 2), None, None),
        (config(ON, 1), config(SUSPENDED, 2), RunState.STOPPED, PowerStep.STOP),
        (config(SUSPENDED, 2), config(ON, 3, saved=2), None, PowerStep.GO_ON),
        (config(SUSPENDED, 2), config(ON, 4, 4, saved=2), None, PowerStep.BOOT),
        (config(SUSPENDED, 2), config(OFF, 3), None, PowerStep.STOP),
    ],
)
def test_what_an_agent_does_of_a_request(
    held: ServerConfig, wanted: ServerConfig, vmm: RunState | None, step: PowerStep | None
) -> None:
    status = None if vmm is None else VmmStatus(id=VmmId(ONE, 1), state=vmm, release=OLD, size=Size())
    assert power_step(held, wanted, status) is step
