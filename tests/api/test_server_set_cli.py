"""What running servers are given, from the command line to agents' configurations: the real API over a real
orchestrator and store, with scripted agents that report what they were told."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from click.testing import Result
from scripted_cloud import ScriptedCloud

from nahtlos.model.config import PortConfig, ServerConfig
from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ProjectId, ServerId, VolumeId
from nahtlos.model.inventory import ComputeStatus
from nahtlos.model.networking import DEFAULT_PROJECT, PortBandwidth, Rate
from nahtlos.model.nouns import CpuShare, Size
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.model.storage import DiskLimits
from nahtlos.ops.cli.amounts import per_cent
from nahtlos.ops.cli.volume_amounts import count
from nahtlos.runtime.controllers.cloud import ServerChange, ServerRequest
from nahtlos.runtime.controllers.projects import ProjectChange
from nahtlos.runtime.controllers.volumes import VolumeChange

H1, WEB = HostId("host-1"), ServerId("web")
BAD = (
    ("--vcpus 0", "vcpus"),
    ("--vcpus -1", "vcpus"),
    ("--memory 0", "memory_mib"),
    ("--memory 100G", "memory_mib"),
    ("--memory 300T", "memory_mib"),
    ("--memory 257", "memory_mib"),
    ("--cpu-quota 301%", "cpu_quota"),
    ("--cpu-quota 0%", "cpu_quota"),
    ("--blackout-budget 0", "blackout_budget_ms"),
    ("--blackout-budget -5", "blackout_budget_ms"),
    ("--restart-priority 101", "restart_priority"),
    ("--iops 0", "iops"),
    ("--bandwidth 0", "bytes_per_second"),
    ("--net-out 0", "net_out"),
)
MADE = ServerRequest(name=WEB, memory_mib=256, max_vcpus=3, max_memory_mib=768, host=H1)
CREATE = "server create web --host host-1 --vcpus 1 --memory-mib 256 --max-vcpus 3 --max-memory 768"
Run = Callable[..., Awaitable[Result]]


def told(scripted: ScriptedCloud) -> tuple[ServerConfig, PortConfig]:
    config = scripted.agents[H1].config
    assert config is not None
    (server,) = (s for s in config.servers if s.spec.id == WEB)
    (port,) = (p for n in config.networks for p in n.ports if p.server == WEB)
    return server, port


async def error_of(run: Run, line: str) -> Any:
    return json.loads((await run(f"{line} --json", 2)).stdout)["error"]


async def test_everything_is_given_in_one_call_and_says_how_long_it_took(
    run: Run, scripted: ScriptedCloud
) -> None:
    made = json.loads((await run(f"{CREATE} --cpu-weight 50 --iops 800 --json")).stdout)
    assert (made["max_vcpus"], made["boot_memory_mib"], made["max_memory_mib"]) == (3, 256, 768)
    assert made["limits"]["web-disk"]["iops"] == 800
    line = "server set web --vcpus 3 --memory 512M --cpu-quota 150% --net-in 50M --net-out 1G --iops 500"
    given = json.loads((await run(f"{line} --bandwidth 10M --json")).stdout)
    server, port = told(scripted)
    assert server.spec.size == Size(vcpus=3, memory_mib=512)
    assert (server.spec.boot_memory_mib, server.spec.cpu) == (256, CpuShare(quota=150, weight=50))
    rates = PortBandwidth(ingress=Rate(bits_per_second=50 * 10**6), egress=Rate(bits_per_second=10**9))
    assert port.bandwidth == rates
    assert server.volume.limits == DiskLimits(iops=500, bytes=10 << 20)
    took = {change["what"]: change["took_ms"] for change in given["changes"]}
    assert {what: took[what] for what in ("vcpus", "memory", "cpu")} == {"vcpus": 21, "memory": 43, "cpu": 7}
    assert took["network"] == took["disks"] >= 0
    assert given["server"]["compute"]["memory_mib"] == 512

    shown = (await run("server set web --cpu-quota none --net-in none")).stdout
    assert "not limited, weight 50" in shown and "7 ms" in shown
    shown = (await run("server show web")).stdout
    assert "3 vCPU, 512 MiB" in shown and "1 to 3 vCPU, 256 to 768 MiB" in shown
    assert "in not limited, out 1 Gbit/s" in shown


async def test_its_owner_permits_that_its_memory_follows_it_and_takes_it_back(run: Run) -> None:
    made = json.loads((await run(f"{CREATE} --allow-post-copy --json")).stdout)
    assert made["allow_post_copy"]
    for flag, permitted in (("--no-allow-post-copy", False), ("--allow-post-copy", True)):
        given = json.loads((await run(f"server set web {flag} --json")).stdout)
        assert given["server"]["allow_post_copy"] is permitted


async def test_moves_by_several_connections_are_a_matter_of_the_underlay(run: Run) -> None:
    set_to = json.loads((await run("network underlay set --move-channels 4 --json --no-wait")).stdout)
    assert set_to["move_channels"] == 4
    refused = await error_of(run, "network underlay set --move-channels 17 --no-wait")
    assert refused["field"] == "move_channels"
    assert "1 to 16" in refused["remedy"]
    assert set_to["move_compression"] == "auto"
    compressed = json.loads(
        (await run("network underlay set --compress-moves always --json --no-wait")).stdout
    )
    assert (compressed["move_compression"], compressed["move_channels"]) == ("always", 4)
    assert "always" in (await run("network underlay show")).stdout


async def test_nothing_is_written_if_one_part_is_refused(run: Run, scripted: ScriptedCloud) -> None:
    await scripted.cloud.create_server(MADE)
    await scripted.until(scripted.all_run)
    before = told(scripted)
    error = await error_of(run, "server set web --cpu-weight 7 --iops 5 --vcpus 4")
    assert (error["kind"], error["field"], error["remedy"]) == ("refused", "vcpus", "ask for 1 to 3")
    assert (await error_of(run, "server set web --cpu-weight 7 --net-in 1"))["field"] == "net_in"
    assert (await error_of(run, "server set web"))["message"] == "nothing to change"
    for line, field in BAD:
        error = await error_of(run, f"server set web --cpu-weight 7 {line}")
        assert (error["field"], bool(error["remedy"])) == (field, True), line
    await scripted.cloud.change_server(WEB, ServerChange(cpu_weight=100))
    await scripted.until(scripted.converged)
    assert told(scripted) == before


async def test_a_guest_that_keeps_its_memory_is_waited_for_and_says_so(
    run: Run, scripted: ScriptedCloud
) -> None:
    await scripted.cloud.create_server(MADE)
    await scripted.cloud.change_server(WEB, ServerChange(memory_mib=768))
    await scripted.until(scripted.all_run)
    agent = scripted.agents[H1]
    agent.has[WEB] = ComputeStatus(vcpus=1, memory_mib=768, waits_for="the guest to give back 512 MiB")
    waited = await run("server set web --memory 256 --deadline 0.5 --json", 3)
    assert "give back 512 MiB" in json.loads(waited.stdout)["error"]["message"]
    shown = (await run("server show web")).stdout
    assert "1 vCPU, 256 MiB; has 1 vCPU, 768 MiB (the guest to give back 512 MiB)" in shown
    big = ServerRequest(name="big", memory_mib=512, host=H1)
    with pytest.raises(Conflict, match="256 MiB"):
        await scripted.cloud.create_server(big)
    agent.has.clear()
    agent.changed()

    async def given_back() -> bool:
        return (await scripted.cloud.server(WEB)).compute.memory_mib == 256

    await scripted.until(given_back)
    await scripted.cloud.create_server(big)


async def test_what_was_asked_of_a_killed_orchestrator_is_given_by_the_next(scripted: ScriptedCloud) -> None:
    await scripted.cloud.create_server(MADE)
    await scripted.until(scripted.all_run)
    agent = scripted.agents[H1]
    agent.converges = False
    await scripted.cloud.change_server(WEB, ServerChange(vcpus=2, cpu_quota=20))
    await scripted.kill()
    await scripted.start()

    async def asked() -> bool:
        return told(scripted)[0].spec.cpu.quota == 20

    await scripted.until(asked)
    assert not (await scripted.cloud.server(WEB)).converged
    agent.converge()

    async def holds() -> bool:
        view = await scripted.cloud.server(WEB)
        return view.converged and (view.compute.vcpus, view.compute.cpu.quota) == (2, 20)

    await scripted.until(holds)


async def test_it_keeps_what_it_is_given_where_it_moves(scripted: ScriptedCloud) -> None:
    await scripted.cloud.create_server(MADE)
    await scripted.cloud.change_server(WEB, ServerChange(vcpus=2, memory_mib=384, cpu_quota=50))
    await scripted.until(scripted.all_run)
    agent = scripted.agents[H1]
    agent.hold_moves = True
    await scripted.cloud.move_server(WEB, HostId("host-2"))

    async def begun() -> bool:
        return bool(agent.begun)

    await scripted.until(begun)
    with pytest.raises(Conflict, match="moving to host-2"):
        await scripted.cloud.change_server(WEB, ServerChange(vcpus=3))
    order = agent.orders[agent.begun[0]]
    assert order.server.spec.size == Size(vcpus=2, memory_mib=384)
    await scripted.cloud.change_server(WEB, ServerChange(cpu_quota=70))
    agent.end_move(agent.begun[0])
    await scripted.until(scripted.converged)
    view = await scripted.cloud.server(WEB)
    assert (view.host, view.size, view.cpu.quota) == ("host-2", Size(vcpus=2, memory_mib=384), 70)
    assert (view.compute.vcpus, view.compute.cpu.quota, view.converged) == (2, 70, True)


async def test_projects_are_limited_in_all(run: Run, scripted: ScriptedCloud) -> None:
    cloud = scripted.cloud
    await cloud.create_server(msgspec.structs.replace(MADE, limits=DiskLimits(iops=600)))
    limited = json.loads((await run("project set default --vcpus 2 --memory 1G --iops 1000 --json")).stdout)
    assert limited["limits"] == {"vcpus": 2, "memory_mib": 1024, "iops": 1000, "bytes_per_second": 0}
    assert (limited["servers"], limited["used"]["memory_mib"]) == (1, 256)
    error = await error_of(run, "server create db --vcpus 2 --iops 1")
    assert "may have 2 vCPUs and would have 3" in error["message"]
    assert (await error_of(run, "server create db --iops 500"))["remedy"].startswith("400 are left")
    with pytest.raises(Conflict, match="may have 2 vCPUs"):
        await cloud.change_server(WEB, ServerChange(vcpus=3))
    with pytest.raises(Conflict, match="web-disk of web is not limited"):
        await cloud.volumes.change_volume(VolumeId("web-disk"), VolumeChange(limits=DiskLimits()))
    shown = (await run("project show default")).stdout
    assert "1 of 2" in shown and "600 of 1000" in shown
    assert "default" in (await run("project list")).stdout
    none = ProjectChange(vcpus=0, memory_mib=0, iops=0)
    assert (await cloud.projects.change_project(DEFAULT_PROJECT, none)).limits == ProjectLimits()
    assert (await cloud.change_server(WEB, ServerChange(vcpus=3))).size.vcpus == 3
    with pytest.raises(Refused):
        await cloud.projects.change_project(ProjectId("Default"), ProjectChange(vcpus=9))
    assert (await cloud.projects.change_project(ProjectId("other"), ProjectChange(vcpus=1))).servers == 0


@pytest.mark.parametrize(("text", "value"), [("50%", 50), ("200", 200), ("none", 0), ("0", 0)])
def test_shares_as_people_type_them(text: str, value: int) -> None:
    assert per_cent(text, "cpu_quota") == value


@pytest.mark.parametrize("text", ["", "%", "-5", "half", "50 %"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(Refused) as caught:
        per_cent(text, "cpu_quota")
    assert caught.value.field == "cpu_quota" and caught.value.remedy


def test_numbers_as_people_type_them() -> None:
    assert (count("500", "iops"), count("none", "iops")) == (500, 0)
    with pytest.raises(Refused):
        count("5k", "iops")
