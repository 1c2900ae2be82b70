"""The arithmetic of the benchmark of replacements in place: what memory counts, what journals tell."""

from pathlib import Path

import pytest
from benchmarks.in_place import FIRST, ROUND, phases_of
from benchmarks.in_place_guest import memory_of
from benchmarks.in_place_memory import used_bytes

from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.ids import HostId, OperationId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.physical.agent.ledger import Journal, Role
from nahtlos.wire.messages import ReplaceOrder

MIB = 1 << 20


def process(proc: Path, pid: int, anon_kib: int, file_kib: int, tables_kib: int) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "smaps_rollup").write_text(
        "564607b0d000-7ffe33491000 ---p 00000000 00:00 0      [rollup]\n"
        f"Pss:  99999999 kB\nPss_Anon:  {anon_kib} kB\nPss_File:  {file_kib} kB\nPss_Shmem:  8388608 kB\n"
    )
    (proc / str(pid) / "status").write_text(f"VmRSS:\t 777 kB\nVmPTE:\t  {tables_kib} kB\n")


def test_a_ram_file_counts_once_and_a_second_copy_shows(tmp_path: Path) -> None:
    proc, ram = tmp_path / "proc", tmp_path / "ram"
    proc.mkdir()
    ram.mkdir()
    (ram / "vm.1.ram").write_bytes(b"x" * MIB)
    process(proc, 10, 1024, 512, 256)
    alone = used_bytes([10], ram, proc)
    assert alone == (1024 + 512 + 256) * 1024 + (ram / "vm.1.ram").stat().st_blocks * 512
    (ram / "vm.2.ram").hardlink_to(ram / "vm.1.ram")
    process(proc, 11, 100, 0, 8)
    assert used_bytes([10, 11, 12], ram, proc) - alone == 108 * 1024  # 12 has ended
    (ram / "vm.3.ram").write_bytes(b"x" * MIB)
    assert used_bytes([10, 11], ram, proc) - alone >= MIB


def journal(number: int, state: OperationState, **times: float) -> Journal:
    spec = ServerSpec(id=ServerId("vm"), size=Size(), volume=VolumeId("vm-disk"), ports=(), machine="m")
    volume = VolumeAttachment(volume=spec.volume, address="10.99.0.11", port=10809, export="v.e1")
    order = ReplaceOrder(
        id=OperationId(f"op-{number}"),
        host=HostId("host-1"),
        server=ServerConfig(spec=spec, epoch=number, volume=volume),
        ports=(),
        release=ReleaseId("r"),
    )
    return Journal(
        id=order.id, kind=OperationKind.REPLACE, role=Role.HOST, state=state, replace=order, times=times
    )


def test_phases_are_those_of_replacements_that_ended_well() -> None:
    whole = {"prepare": 1.0, "switch": 1.5, "stopped": 1.502, "arrived": 1.51, "running": 1.52}
    found = phases_of(
        [
            journal(1, OperationState.DONE, **whole),
            journal(2, OperationState.UNDONE, prepare=2.0, switch=9.0),
            journal(3, OperationState.RUNNING, prepare=3.0, switch=9.0),
        ]
    )
    assert found["begin to switch"] == pytest.approx([500])
    assert found["switch to stop"] == pytest.approx([2])
    assert found["stop to arrival"] == pytest.approx([8])
    assert found["arrival to go-on"] == pytest.approx([10])
    # Journals of releases before this one lack a step.
    assert phases_of([journal(1, OperationState.DONE, prepare=1.0, switch=2.0)])["stop to arrival"] == []


def test_a_round_goes_through_every_pair_there_and_back() -> None:
    steps = [*zip((FIRST, *ROUND), ROUND, strict=False)]
    assert set(steps) == {("7.2", "10.0"), ("10.0", "11.1"), ("11.1", "10.0"), ("10.0", "7.2")}
    assert ROUND[-1] == FIRST


def test_a_server_has_more_memory_than_its_guest_touches() -> None:
    assert all(memory_of(touched) > touched * 1.03 for touched in (256, 8192))
