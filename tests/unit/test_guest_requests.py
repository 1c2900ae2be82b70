"""What can be asked of guests: who gets a channel, and when consistency is refused beforehand."""

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from volume_world import host, server, volume

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Error
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import HostInventory, Inventory, RunState, ServerStatus
from nahtlos.model.nouns import HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import BackupSpec, Consistency, SnapshotSpec
from nahtlos.runtime.controllers.guest_requests import KNOWN, check_freezable, with_channel
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_records import backup_made, snapshots_taken
from nahtlos.runtime.store.intent import HostRow

DISK = VolumeId("web-disk")
ANSWERS = GuestStatus(answers=True, version="7.2")


def seen(guest: GuestStatus | None, *knows: str) -> Inventory:
    status = ServerStatus(
        id=ServerId("web"), epoch=1, state=RunState.RUNNING, release=None, size=Size(), guest=guest
    )
    inventory = HostInventory(
        host=host(1),
        role=HostRole.COMPUTE,
        boot_id="b",
        agent_version="",
        taken_at=0.0,
        generation=1,
        target_generation=1,
        capacity=Size(),
        servers=(status,),
        knows=knows,
    )
    return Inventory(hosts={host(1): inventory}, connected=frozenset({host(1)}))


def state(*servers: ServerSpec, hosts: tuple[HostId, ...] = (host(1),)) -> State:
    """As much of one as is looked at."""
    rows = {
        name: HostRow(
            spec=HostSpec(id=name, role=HostRole.COMPUTE, address="", peer_port=1), intent=HostIntent.ACTIVE
        )
        for name in hosts
    }
    found: Any = SimpleNamespace(
        hosts=rows,
        servers={each.id: SimpleNamespace(spec=each) for each in servers},
        volumes={DISK: SimpleNamespace(spec=volume("web-disk", 1))},
    )
    return cast("State", found)


def web(*, channel: bool) -> ServerSpec:
    return msgspec.structs.replace(server("web", "web-disk"), guest_agent=channel)


@pytest.mark.parametrize(
    ("servers", "inventory", "said"),
    [
        pytest.param((), seen(None, KNOWN), "attached to no server", id="nobody-has-it"),
        pytest.param((web(channel=False),), seen(None, KNOWN), "no channel", id="older-server"),
        pytest.param((web(channel=True),), seen(None, KNOWN), "no agent answers", id="not-looked-yet"),
        pytest.param(
            (web(channel=True),),
            seen(GuestStatus(why="nobody listens"), KNOWN),
            "no agent answers in web: nobody listens",
            id="no-agent",
        ),
        pytest.param((web(channel=True),), seen(ANSWERS), "freezes no guests", id="older-host"),
    ],
)
def test_consistent_file_systems_are_refused_where_nobody_could_freeze_them(
    servers: tuple[ServerSpec, ...], inventory: Inventory, said: str
) -> None:
    with pytest.raises(Error, match=said) as refused:
        check_freezable(state(*servers), inventory, (DISK,), Consistency.FILESYSTEM)
    assert refused.value.field == "consistency"
    assert refused.value.remedy
    check_freezable(state(*servers), inventory, (DISK,), Consistency.PREFERRED)
    check_freezable(state(*servers), inventory, (DISK,), Consistency.CRASH)


def test_they_are_not_where_the_agent_answers() -> None:
    check_freezable(state(web(channel=True)), seen(ANSWERS, KNOWN), (DISK,), Consistency.FILESYSTEM)


@pytest.mark.parametrize(
    ("hosts", "knows", "expected"),
    [
        pytest.param((host(1),), (KNOWN,), True, id="every-host-knows"),
        pytest.param((host(1),), (), False, id="an-older-agent"),
        pytest.param((host(1), host(2)), (KNOWN,), False, id="one-was-not-heard-yet"),
    ],
)
def test_a_new_server_has_a_channel_once_it_could_be_taken_anywhere(
    hosts: tuple[HostId, ...], knows: tuple[str, ...], expected: bool
) -> None:
    made = with_channel(state(hosts=hosts), seen(None, *knows), web(channel=False))
    assert made.guest_agent is expected


def test_what_hosts_tell_of_frozen_guests_is_recorded() -> None:
    specs = tuple(SnapshotSpec(id=SnapshotId(name), volume=VolumeId(name)) for name in ("a", "b"))
    one, other = snapshots_taken(specs, {"filesystem": "b"}, 5.0)
    assert (one.consistent, other.consistent) == (Consistency.CRASH, Consistency.FILESYSTEM)
    assert (one.created_at, other.created_at) == (5.0, 5.0)
    spec = BackupSpec(id=cast("Any", "m"), volume=VolumeId("a"), target="/srv")
    assert backup_made(spec, {"filesystem": "m"}, 5.0).consistent is Consistency.FILESYSTEM
    assert backup_made(spec, {"filesystem": ""}, 5.0).consistent is Consistency.CRASH
    assert backup_made(spec, {}, 5.0).consistent is Consistency.CRASH
