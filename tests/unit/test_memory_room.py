"""What a host offers of its memory."""

from pathlib import Path

import msgspec
import pytest

from nahtlos.model.ids import HostId
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical import memory_room
from nahtlos.physical.memory_room import offered, room_mib, within_room
from nahtlos.physical.settings import AgentSettings


def settings(folder: Path, memory_mib: int) -> AgentSettings:
    return AgentSettings(
        host=HostId("host-1"),
        role=HostRole.COMPUTE,
        address="10.99.0.1",
        peer_port=7444,
        orchestrator_address="10.99.0.9",
        orchestrator_port=7443,
        state_dir=folder,
        run_dir=folder,
        ram_dir=folder,
        releases_dir=folder,
        images_dir=folder,
        cache_dir=folder,
        pki_dir=folder,
        supervisor_socket=folder / "supervisor.sock",
        capacity=Size(vcpus=4, memory_mib=memory_mib),
    )


def test_no_more_than_fits_is_offered() -> None:
    assert offered(Size(vcpus=8, memory_mib=65536), 32768) == Size(vcpus=8, memory_mib=32768)
    assert offered(Size(vcpus=8, memory_mib=16384), 32768) == Size(vcpus=8, memory_mib=16384)


def test_a_host_says_why_it_offers_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twelve(folder: Path) -> int:
        assert folder == tmp_path
        return 12 * 1024

    monkeypatch.setattr(memory_room, "room_mib", twelve)
    told = settings(tmp_path, 24 * 1024)
    kept, why = within_room(told)
    assert kept.capacity == Size(vcpus=4, memory_mib=12 * 1024)
    assert msgspec.structs.replace(kept, capacity=told.capacity) == told
    assert "12288 of 24576 MiB" in why
    assert "remount,size=24576m" in why
    assert within_room(kept) == (kept, "")


def test_the_whole_file_system_counts(tmp_path: Path) -> None:
    before = room_mib(tmp_path)
    (tmp_path / "file").write_bytes(bytes(1 << 21))
    assert room_mib(tmp_path) == before > 0
