"""The transport inside one process: for the simulated world and for tests.

Serves `wire.transport` with an event loop's clock only (`loop.time`, `loop.call_at`, `asyncio.sleep`), so
it runs in virtual time and, given a seed, always the same way. Never opens a socket, never reads a wall
clock.

Parties listen at (address, port) as on a real underlay. `Faults` decides what befalls frames; frames of one
direction never overtake each other, as on TCP, so a late frame makes those behind it late:

    drop        the frame is lost (no real channel does this; a party must survive it all the same)
    duplicate   it arrives twice
    delay       it arrives late
    break       the channel breaks at it; it may have arrived
    partition   two parties cannot reach each other: frames wait, new channels do not come about, and a
                channel partitioned for longer than `patience` breaks at both ends
    cut         the same in one direction only: what the other one sends still arrives
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.wire.transport import Channel, ChannelClosed, OnChannel

FIRST_FREE_PORT = 49152


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to one frame."""

    copies: int = 1
    delay: float = 0.0
    breaks: bool = False


class Faults:
    """Seeded chance. Probabilities are per frame; `delay` is a range of seconds drawn from evenly."""

    def __init__(
        self,
        seed: int = 0,
        *,
        drop: float = 0.0,
        duplicate: float = 0.0,
        late: float = 0.0,
        late_by: tuple[float, float] = (0.05, 2.0),
        breaks: float = 0.0,
        delay: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.random = random.Random(seed)
        self.drop = drop
        self.duplicate = duplicate
        self.late = late
        self.late_by = late_by
        self.breaks = breaks
        self.delay = delay
        self._applies: Callable[[str, str], bool] = lambda _sender, _receiver: True

    def only_between(self, applies: Callable[[str, str], bool]) -> None:
        """Confine chance to frames for which `applies(sender, receiver)`."""
        self._applies = applies

    def calm(self) -> None:
        """From now on nothing goes wrong by chance; partitions stay."""
        self.drop = self.duplicate = self.late = self.breaks = 0.0
        self.delay = (0.0, 0.0)

    def fate(self, sender: str, receiver: str) -> Fate:
        if not self._applies(sender, receiver):
            return Fate()
        delay = self._between(self.delay)
        if self._chance(self.breaks):
            return Fate(copies=self.random.randint(0, 1), delay=delay, breaks=True)
        if self._chance(self.drop):
            return Fate(copies=0)
        if self._chance(self.late):
            delay += self._between(self.late_by)
        return Fate(copies=2 if self._chance(self.duplicate) else 1, delay=delay)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def _between(self, bounds: tuple[float, float]) -> float:
        return self.random.uniform(*bounds) if bounds[1] > 0 else 0.0


class MemoryChannel:
    """One end of a link. Once it has learned of the end, nothing is received or sent any more."""

    def __init__(self, link: "_Link", party: str, peer: str) -> None:
        self._link = link
        self.party = party
        self._peer = peer
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.ended = False

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, frame: bytes) -> None:
        if self.ended:
            raise self._closed()
        self._link.carry(self, bytes(frame))
        # A real send gives others a turn, too.
        await asyncio.sleep(0)

    async def receive(self) -> bytes:
        frame = await self._inbox.get()
        if frame is None:
            self._inbox.put_nowait(None)
            raise self._closed()
        return frame

    async def close(self) -> None:
        self.hang_up()
        await asyncio.sleep(0)

    def hang_up(self) -> None:
        """Close: the other end is told in order, after the frames that are under way to it."""
        if not self.ended:
            self._link.carry_end(self)
            self.deliver(None)

    def deliver(self, frame: bytes | None) -> None:
        """What arrives here; None is the end."""
        if self.ended:
            return
        self.ended = frame is None
        self._inbox.put_nowait(frame)
        if self.ended:
            self._link.forget_if_over()

    def _closed(self) -> ChannelClosed:
        return ChannelClosed(f"connection to {self.peer} is closed")


class _Pipe:
    """Frames from one end to the other, in order."""

    def __init__(self, network: "MemoryNetwork", sender: MemoryChannel, receiver: MemoryChannel) -> None:
        self._network = network
        self._sender = sender
        self._receiver = receiver
        self._under_way: deque[bytes | None] = deque()
        self._held: deque[bytes | None] = deque()
        self._last_arrival = 0.0

    def send(self, frame: bytes | None, *, copies: int, delay: float) -> float:
        """Returns the loop's time at which it arrives if nothing is in the way."""
        loop = asyncio.get_running_loop()
        self._last_arrival = max(self._last_arrival, loop.time() + delay)
        for _ in range(copies):
            self._under_way.append(frame)
            loop.call_at(self._last_arrival, self._arrive)
        return self._last_arrival

    def _arrive(self) -> None:
        frame = self._under_way.popleft()
        if self._held or self._network.partitioned(self._sender.party, self._receiver.party):
            self._held.append(frame)
        else:
            self._receiver.deliver(frame)

    def heal(self) -> None:
        while self._held:
            self._receiver.deliver(self._held.popleft())


class _Link:
    """Both directions between two parties."""

    def __init__(self, network: "MemoryNetwork", dialler: str, listener: str) -> None:
        self._network = network
        self.parties = (dialler, listener)
        self.dialled = MemoryChannel(self, dialler, listener)
        self.accepted = MemoryChannel(self, listener, dialler)
        self._pipes = {
            self.dialled: _Pipe(network, self.dialled, self.accepted),
            self.accepted: _Pipe(network, self.accepted, self.dialled),
        }

    def carry(self, sender: MemoryChannel, frame: bytes) -> None:
        fate = self._network.faults.fate(sender.party, sender.peer)
        arrival = self._pipes[sender].send(frame, copies=fate.copies, delay=fate.delay)
        if fate.breaks:
            asyncio.get_running_loop().call_at(arrival, self.breaks)

    def carry_end(self, sender: MemoryChannel) -> None:
        self._pipes[sender].send(None, copies=1, delay=0.0)

    def breaks(self) -> None:
        """Both ends learn of it at once; frames under way are lost."""
        self.dialled.deliver(None)
        self.accepted.deliver(None)

    def heal(self) -> None:
        for pipe in self._pipes.values():
            pipe.heal()

    def forget_if_over(self) -> None:
        if self.dialled.ended and self.accepted.ended:
            self._network.links.pop(self, None)

    def end_of(self, party: str) -> MemoryChannel | None:
        return next((end for end in (self.dialled, self.accepted) if end.party == party), None)


class MemoryListener:
    def __init__(self, network: "MemoryNetwork", party: str, place: tuple[str, int], on: OnChannel) -> None:
        self._network = network
        self.party = party
        self._place = place
        self._on_channel = on
        self._serving: dict[asyncio.Task[None], MemoryChannel] = {}

    @property
    def port(self) -> int:
        return self._place[1]

    def accept(self, channel: MemoryChannel) -> None:
        # Held here and cancelled by `close`: a listener's life is no lexical scope a TaskGroup could have.
        task = asyncio.get_running_loop().create_task(self._serve(channel))
        self._serving[task] = channel
        task.add_done_callback(self._ended)

    async def _serve(self, channel: MemoryChannel) -> None:
        await self._on_channel(channel)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Here rather than in `_serve`: a task cancelled before its first step runs no `finally`.
        self._serving.pop(task).hang_up()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._network.failed(self.party, error)

    def abandon(self) -> None:
        """Stop at once, without waiting for what is being served."""
        self._network.listeners.pop(self._place, None)
        for task in tuple(self._serving):
            task.cancel()

    async def close(self) -> None:
        self.abandon()
        if self._serving:
            await asyncio.wait(tuple(self._serving))


class MemoryTransport:
    """The network as one party sees it."""

    def __init__(self, network: "MemoryNetwork", party: str) -> None:
        self._network = network
        self.party = party

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        where = f"{address}:{port}"
        listener = self._network.listeners.get((address, port))
        if self._network.parted(self.party, listener.party if listener else expect):
            await asyncio.sleep(timeout)
            raise Unavailable(f"{expect} at {where} did not answer within {timeout:g} s")
        await asyncio.sleep(0)
        listener = self._network.listeners.get((address, port))
        if listener is None:
            raise Unavailable(f"{expect} at {where} cannot be reached: nobody listens there")
        if listener.party != expect:
            raise Unavailable(
                f"{where} proved to be {listener.party}, not {expect}",
                field="address",
                remedy="check which host has this address",
            )
        return self._network.connect(self.party, listener)

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> MemoryListener:
        return self._network.listen(self.party, address, port, on_channel)


class MemoryNetwork:
    """Everything that connects the parties of one simulated cloud.

    `on_failure(party, error)` is told when serving an accepted channel ended with an error; without it
    they are collected in `failures`.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        patience: float = 15.0,
        on_failure: Callable[[str, BaseException], None] | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.patience = patience
        self.failures: list[tuple[str, BaseException]] = []
        self.listeners: dict[tuple[str, int], MemoryListener] = {}
        self.links: dict[_Link, None] = {}
        self._on_failure = on_failure
        self._cuts: dict[tuple[str, str], int] = {}
        """Sender and receiver, numbered."""
        self._cut_count = 0
        self._next_port = FIRST_FREE_PORT

    def transport(self, party: str) -> MemoryTransport:
        return MemoryTransport(self, party)

    def partitioned(self, sender: str, receiver: str) -> bool:
        """Whether what `sender` sends does not arrive."""
        return (sender, receiver) in self._cuts

    def parted(self, one: str, other: str) -> bool:
        """Whether they cannot talk to each other."""
        return self.partitioned(one, other) or self.partitioned(other, one)

    def partition(self, one: str, other: str) -> None:
        """Cut `one` from `other` until `heal`."""
        self.cut(one, other)
        self.cut(other, one)

    def cut(self, sender: str, receiver: str) -> None:
        """In this direction only, until `heal`."""
        if (sender, receiver) in self._cuts:
            return
        self._cut_count += 1
        self._cuts[sender, receiver] = self._cut_count
        for link in self._links_of(frozenset((sender, receiver))):
            asyncio.get_running_loop().call_later(
                self.patience, self._break_if_cut, link, (sender, receiver), self._cut_count
            )

    def heal(self, one: str, other: str) -> None:
        self._cuts.pop((one, other), None)
        self._cuts.pop((other, one), None)
        for link in self._links_of(frozenset((one, other))):
            link.heal()

    def heal_all(self) -> None:
        for sender, receiver in tuple(self._cuts):
            self.heal(sender, receiver)

    def break_channels(self, one: str, other: str) -> int:
        """Break every channel between the two; returns how many there were."""
        links = self._links_of(frozenset((one, other)))
        for link in links:
            link.breaks()
        return len(links)

    def vanish(self, party: str) -> None:
        """What the network sees when a party's process is killed: nothing of it listens, nothing stays
        connected, nothing it was serving goes on."""
        for listener in [x for x in self.listeners.values() if x.party == party]:
            listener.abandon()
        for link in tuple(self.links):
            if (end := link.end_of(party)) is not None:
                end.hang_up()

    # for transports, listeners and links

    def listen(self, party: str, address: str, port: int, on_channel: OnChannel) -> MemoryListener:
        if port == 0:
            self._next_port += 1
            port = self._next_port
        place = (address, port)
        if place in self.listeners:
            raise Unavailable(f"cannot listen at {address}:{port}: address already in use", field="port")
        if not address:
            raise Refused("an address is needed", field="address")
        self.listeners[place] = MemoryListener(self, party, place, on_channel)
        return self.listeners[place]

    def connect(self, dialler: str, listener: MemoryListener) -> MemoryChannel:
        link = _Link(self, dialler, listener.party)
        self.links[link] = None
        listener.accept(link.accepted)
        return link.dialled

    def failed(self, party: str, error: BaseException) -> None:
        if self._on_failure:
            self._on_failure(party, error)
        else:
            self.failures.append((party, error))

    def _links_of(self, pair: frozenset[str]) -> list[_Link]:
        return [link for link in self.links if frozenset(link.parties) == pair]

    def _break_if_cut(self, link: _Link, direction: tuple[str, str], cut: int) -> None:
        if self._cuts.get(direction) == cut:
            link.breaks()
