"""`nahtlos snapshot … --memory` and `nahtlos server revert` against the API at a real socket."""

import json

import msgspec
import pytest
from conftest import FakeCloud, Run

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import ReleaseId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.power import Power, SavedState
from nahtlos.model.server_snapshots import ServerSnapshot
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)

SAVED = SavedState(
    volume=VolumeId("then-memory"),
    serial=0,
    digest="0" * 64,
    bytes=1 << 20,
    release=ReleaseId("qemu-10.0.8-000000000001"),
    machine="pc-q35-10.0",
    vcpus=1,
    memory_mib=256,
)


class NoVolumes:
    async def tasks(self) -> tuple[()]:
        return ()

    async def volumes(self) -> tuple[()]:
        return ()

    async def snapshots(self) -> tuple[()]:
        return ()

    async def snapshot(self, snapshot: SnapshotId) -> None:
        raise NotFound(f"no snapshot '{snapshot}'", field="snapshot", remedy="snapshots: none")


class KeptSnapshots:
    """What is asked for has come about at the next look."""

    def __init__(self, cloud: FakeCloud) -> None:
        self._cloud = cloud
        self.asked: list[object] = []
        self.kept: dict[SnapshotId, ServerSnapshotView] = {}

    async def server_snapshots(self) -> tuple[ServerSnapshotView, ...]:
        return tuple(self.kept.values())

    async def server_snapshot(self, snapshot: SnapshotId) -> ServerSnapshotView:
        if snapshot not in self.kept:
            raise NotFound(f"no snapshot '{snapshot}' of a whole server", field="snapshot")
        return self.kept[snapshot]

    async def create(self, request: ServerSnapshotRequest) -> tuple[SnapshotId, ...]:
        self.asked.append(request)
        names = (SnapshotId(f"{request.name}-web-1-disk"),)
        spec = ServerSnapshot(
            id=SnapshotId(request.name),
            server=request.server,
            snapshots=names,
            saved=SAVED,
            pause_seconds=0.042,
        )
        self.kept[spec.id] = ServerSnapshotView(spec=spec)
        return names

    async def delete(self, snapshot: SnapshotId) -> None:
        self.asked.append(snapshot)
        del self.kept[snapshot]

    async def revert(self, server: ServerId, request: ServerRevertRequest) -> ServerView:
        if request.snapshot not in self.kept:
            raise Conflict("it is of another server", field="snapshot", remedy="nahtlos snapshot clone")
        self.asked.append((server, request.snapshot))
        return await self._cloud.server(server)


class SnapshotCloud(FakeCloud):
    def __init__(self) -> None:
        super().__init__()
        self.server_snapshots = KeptSnapshots(self)
        self.volumes = NoVolumes()

    async def server(self, server: ServerId) -> ServerView:
        view = await super().server(server)
        return msgspec.structs.replace(view, state=RunState.RUNNING, power=Power(), power_pending=False)


@pytest.fixture
def cloud() -> SnapshotCloud:
    return SnapshotCloud()


async def test_it_is_taken_shown_gone_back_to_and_deleted(ask: Run, cloud: SnapshotCloud) -> None:
    taken = await ask("snapshot create then --server web-1 --memory --pause 0.5 --json")
    assert taken.exit_code == 0, taken.output
    assert json.loads(taken.stdout)["spec"]["pause_seconds"] == 0.042
    assert cloud.server_snapshots.asked == [
        ServerSnapshotRequest(name="then", server=ServerId("web-1"), pause_seconds=0.5)
    ]
    shown = await ask("snapshot show then")
    assert "42 ms" in shown.stdout
    back = await ask("server revert web-1 --snapshot then --json")
    assert json.loads(back.stdout)["state"] == "running"
    assert cloud.server_snapshots.asked[-1] == (ServerId("web-1"), SnapshotId("then"))
    gone = await ask("snapshot delete then --json")
    assert json.loads(gone.stdout) == {"id": "then", "deleted": True}
    assert cloud.server_snapshots.kept == {}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ("--memory", "server"),
        ("--server web-1", "memory"),
        ("--server web-1 --memory --volume data", "volume"),
        ("--server web-1 --memory --consistency filesystem", "consistency"),
    ],
)
async def test_what_does_not_go_together_is_refused_before_anything_is_asked(
    ask: Run, cloud: SnapshotCloud, options: str, field: str
) -> None:
    result = await ask(f"snapshot create then {options} --json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["field"] == field
    assert error["remedy"]
    assert cloud.server_snapshots.asked == []


async def test_a_refusal_of_the_way_back_names_the_remedy(ask: Run) -> None:
    result = await ask("server revert web-1 --snapshot others --json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["remedy"] == "nahtlos snapshot clone"
