"""How a server reaches its copies is the ledger's: what others write there while a lost copy is recorded, or
while a guest is looked at, is never taken back."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.nouns import ServerSpec, Size
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.volumes.replicas import DiskKeeper, reached_by_copies
from nahtlos.physical.ports import DiskProblem, DiskTrouble, Drivers, VmmId
from nahtlos.physical.settings import AgentSettings
from nahtlos.wire.message import Message
from nahtlos.wire.transport import Transport
from nahtlos.wire.volumes import ReplicaLost, ReplicasRecorded

VOLUME = VolumeId("data")
VMM = VmmId(ServerId("web"), 1)
LOST = DiskProblem(
    volume=VOLUME, trouble=DiskTrouble.REPLICA_LOST, replica=HostId("host-2"), text="nobody answers"
)


def copy(number: int, *, joining: bool = False) -> VolumeEndpoint:
    return VolumeEndpoint(
        host=HostId(f"host-{number}"),
        address=f"10.0.0.{number}",
        port=10809,
        export=f"data.e{number}",
        joining=joining,
    )


def reached(*copies: VolumeEndpoint) -> ServerConfig:
    spec = ServerSpec(
        id=VMM.server, size=Size(vcpus=1, memory_mib=64), volume=VOLUME, ports=(), machine="pc-q35-10.0"
    )
    first = copies[0]
    blank = VolumeAttachment(volume=VOLUME, address=first.address, port=first.port, export=first.export)
    return ServerConfig(spec=spec, epoch=VMM.epoch, volume=reached_by_copies(blank, copies))


JOINING = reached(copy(1), copy(2), copy(3, joining=True))


class Guest:
    """One that its disks have stopped."""

    def __init__(self, problems: tuple[DiskProblem, ...], on_resume: Callable[[], None]) -> None:
        self._problems = problems
        self._on_resume = on_resume
        self.led: list[ServerConfig] = []
        self.runs = False

    async def disks_watch(self, *, timeout: float) -> tuple[VmmId, ...]:
        return (VMM,)

    async def disks_check(self, vmm: VmmId) -> tuple[DiskProblem, ...]:
        return self._problems

    async def disks_reconcile(self, vmm: VmmId, server: ServerConfig) -> tuple[str, ...]:
        self.led.append(server)
        return ()

    async def resume(self, vmm: VmmId) -> None:
        self.runs = True
        self._on_resume()


async def recorded(_body: Message, _timeout: float) -> Message:
    return ReplicasRecorded(attachment=reached(copy(1)).volume)


def kept(
    folder: Path,
    ask: Callable[[Ledger], Callable[[Message, float], Awaitable[Message]]],
    *problems: DiskProblem,
    on_resume: Callable[[Ledger], None] = lambda _: None,
) -> tuple[Ledger, Guest]:
    """After a look at the guest, which reached copies 1 and 2 at first."""
    ledger = Ledger(folder / "ledger")
    ledger.own(reached(copy(1), copy(2)))
    guest = Guest(problems, lambda: on_resume(ledger))

    async def look() -> None:
        context = Context(
            settings=cast(AgentSettings, _Named(HostId("host-1"))),
            drivers=cast(Drivers, _Only(guest)),
            ledger=ledger,
            transport=cast(Transport, None),
            now=lambda: 0.0,
            emit=lambda _: None,
            changed=lambda: None,
            on_bug=_raised,
            ask=ask(ledger),
        )
        await DiskKeeper(context).look()

    asyncio.run(look())
    return ledger, guest


class _Only(msgspec.Struct):
    hypervisor: Guest


class _Named(msgspec.Struct):
    host: HostId


def _raised(error: BaseException) -> None:
    raise error


def test_a_copy_that_joins_while_another_one_is_recorded_as_lost_is_written_to(tmp_path: Path) -> None:
    def meanwhile(ledger: Ledger) -> Callable[[Message, float], Awaitable[Message]]:
        async def ask(body: Message, timeout: float) -> Message:
            assert isinstance(body, ReplicaLost)
            ledger.adopt(JOINING)
            return await recorded(body, timeout)

        return ask

    ledger, guest = kept(tmp_path, meanwhile, LOST)
    owner = ledger.owner(VMM.server)
    assert owner is not None
    wanted = reached(copy(1), copy(3, joining=True))
    assert owner.server == wanted
    assert guest.led == [wanted, wanted]
    assert guest.runs


def test_a_copy_that_joins_while_the_guest_is_let_go_is_written_to(tmp_path: Path) -> None:
    def joins(ledger: Ledger) -> None:
        ledger.adopt(JOINING)

    ledger, guest = kept(tmp_path, lambda _: recorded, on_resume=joins)
    owner = ledger.owner(VMM.server)
    assert owner is not None
    assert owner.server == JOINING
    assert guest.led == [reached(copy(1), copy(2)), JOINING]
    assert guest.runs


def test_a_lost_copy_is_left(tmp_path: Path) -> None:
    ledger, guest = kept(tmp_path, lambda _: recorded, LOST)
    owner = ledger.owner(VMM.server)
    assert owner is not None
    assert owner.server == reached(copy(1)) == guest.led[-1]
    assert guest.runs
