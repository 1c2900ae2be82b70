"""What can wait waits while a path is switched, and never for long."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import HostId, OperationId
from nahtlos.physical.agent import agent as agent_module
from nahtlos.physical.agent import context as module
from nahtlos.physical.agent.agent import Agent
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.converge import Converger
from nahtlos.physical.agent.leases import Leases
from nahtlos.physical.agent.ledger import Journal, Ledger
from nahtlos.wire import websocket
from nahtlos.wire.messages import Message

MOVE = OperationId("op-1")


async def no_orchestrator(body: Message, timeout: float) -> Message:
    raise Unavailable(f"none is connected to answer {type(body).__name__} within {timeout} s")


def context(**parts: Any) -> Context:
    given: dict[str, Any] = {
        "settings": None,
        "drivers": None,
        "ledger": None,
        "transport": None,
        "now": lambda: 0.0,
        "emit": lambda _: None,
        "changed": lambda: None,
        "on_bug": lambda _: None,
        "ask": no_orchestrator,
    }
    return Context(**{**given, **parts})


def begin_nothing(_: Journal) -> None:
    raise AssertionError("no operation is to begin")


async def test_convergence_takes_no_step_while_a_path_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "breath_after", lambda _: 0.0)
    taken: list[str] = []

    class Driver:
        async def reconcile(self, *_: object) -> tuple[str, ...]:
            taken.append("reconcile")
            ctx.switches(MOVE)  # the path is switched while this step is under way
            return ()

        async def observe(self) -> tuple[object, ...]:
            taken.append("observe")
            return ()

    ledger = Ledger(":memory:")
    ledger.accept(HostConfig(host=HostId("host-1"), generation=1, release=None))
    drivers = SimpleNamespace(storage=Driver(), network=Driver(), hypervisor=Driver())
    ctx = context(drivers=drivers, ledger=ledger)
    attempt = asyncio.create_task(Converger(ctx, begin_nothing, Leases(ctx, "boot")).attempt())
    await asyncio.sleep(0.02)
    assert taken == ["reconcile"]
    ctx.switched(MOVE)
    await asyncio.sleep(0.02)
    assert taken == ["reconcile", "reconcile"]
    ctx.switched(MOVE)
    await attempt
    assert taken == ["reconcile", "reconcile", "observe"]


async def test_a_bug_in_one_part_does_not_keep_the_others_from_being_put_right() -> None:
    taken: list[str] = []

    class Driver:
        def __init__(self, name: str) -> None:
            self.name = name

        async def reconcile(self, *_: object) -> tuple[str, ...]:
            taken.append(self.name)
            raise ProcessLookupError("dnsmasq ended a moment ago")

        async def observe(self) -> tuple[object, ...]:
            taken.append("servers")
            return ()

    ledger = Ledger(":memory:")
    ledger.accept(HostConfig(host=HostId("host-1"), generation=1, release=None))
    drivers = SimpleNamespace(
        storage=Driver("volumes"), network=Driver("network"), hypervisor=Driver("servers")
    )
    ctx = context(drivers=drivers, ledger=ledger)
    converger = Converger(ctx, begin_nothing, Leases(ctx, "boot"))
    await converger.attempt()
    assert taken == ["volumes", "network", "servers"]
    assert [problem.kind for problem in converger.problems] == ["bug", "bug"]
    assert converger.generation == 0


async def test_an_orchestrator_that_stays_away_does_not_drown_what_happened_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dialled = 0

    class Nobody:
        async def dial(self, *_: object, **__: object) -> None:
            nonlocal dialled
            dialled += 1
            raise Unavailable("orchestrator cannot be reached")

    monkeypatch.setattr(agent_module, "REDIAL_SECONDS", 0.001)
    settings = SimpleNamespace(
        host=HostId("host-1"), orchestrator_address="10.99.0.1", orchestrator_port=7443
    )
    agent = Agent(
        cast("Any", settings), cast("Any", None), cast("Any", Nobody()), tmp_path / "ledger", boot_id="b"
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await agent._orchestrator_loop()
    assert dialled > 5
    assert agent._events.qsize() == 1


async def test_a_switch_that_does_not_end_holds_nothing_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.02)
    ctx = context()
    ctx.switches(MOVE)
    async with asyncio.timeout(1.0):
        await ctx.calm()


async def test_a_guest_that_was_just_resumed_gets_a_breath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "breath_after", lambda _: 0.02)
    ctx = context()
    ctx.switches(MOVE)
    ctx.switched(MOVE)
    waiting = asyncio.create_task(ctx.calm())
    await asyncio.sleep(0.005)
    assert not waiting.done()
    async with asyncio.timeout(0.5):
        await waiting
    assert not ctx.switching


def test_what_no_contract_names_becomes_an_error_and_is_told() -> None:
    told: list[BaseException] = []
    ctx = context(on_bug=told.append)
    known, odd = Unavailable("later"), OSError(5, "disk")
    assert ctx.error_of(known) is known
    assert isinstance(ctx.error_of(odd), Error)
    assert told == [odd]


def test_a_peer_that_closes_at_once_is_no_surprise() -> None:
    """A standby orchestrator closes what it accepts: the socket may be gone before it is tuned."""
    closed = socket.socket()
    closed.close()
    transport = SimpleNamespace(get_extra_info=lambda _: closed)
    websocket._no_delay(cast("Any", SimpleNamespace(transport=transport)))


@pytest.mark.parametrize(("pause", "breath"), [(0.02, 0.25), (0.2, 0.6), (5.0, 0.75)])
def test_the_breath_is_longer_on_a_host_that_took_longer_for_the_switch(pause: float, breath: float) -> None:
    assert module.breath_after(pause) == pytest.approx(breath)
