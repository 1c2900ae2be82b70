"""Which volumes this host knows better than its configuration: those that came and those that left by an
operation the orchestrator may not have heard the end of.

    (none) --receive--> RECEIVED(e + 1) --it counts--> KEPT(e + 1) --a configuration names it--> (none)
                              `--undone--> DROPPED
    (none) --the copy that counts is elsewhere--> LEFT(e) --no configuration names it any more--> (none)

A volume that left must never be made again, blank, because an older configuration still names it; one that
was dropped must not come back by a message that arrives late. Rows are facts of the ledger.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Conflict, Stale
from nahtlos.model.ids import OperationId, VolumeId
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.values import Value
from nahtlos.physical.agent.ledger import Journal, Ledger

PREFIX = "volume/"


class VolumeHold(StrEnum):
    RECEIVED = "received"
    KEPT = "kept"
    """What was received is what counts."""
    DROPPED = "dropped"
    LEFT = "left"


class Held(Value, frozen=True, kw_only=True):
    volume: VolumeId
    epoch: int
    hold: VolumeHold
    operation: OperationId

    def outranks(self, spec: VolumeSpec) -> bool:
        """What the configuration says of it is older than what happened to it here."""
        match self.hold:
            case VolumeHold.LEFT:
                return spec.epoch <= self.epoch
            case VolumeHold.RECEIVED | VolumeHold.KEPT:
                return spec.epoch < self.epoch
            case VolumeHold.DROPPED:
                return False


def held(ledger: Ledger) -> dict[VolumeId, Held]:
    found = (msgspec.msgpack.decode(raw, type=Held) for raw in ledger.facts(PREFIX).values())
    return {each.volume: each for each in found}


def wanted(volumes: Iterable[VolumeSpec], held: Mapping[VolumeId, Held]) -> tuple[VolumeSpec, ...]:
    """Those of a configuration that are to be as it says."""
    return tuple(v for v in volumes if v.id not in held or not held[v.id].outranks(v))


def receive(ledger: Ledger, operation: OperationId, volume: VolumeSpec) -> None:
    """This host is to have a copy. Stale if the operation was undone, or the volume has been here and left;
    Conflict while this host is told to delete it."""
    config = ledger.config()
    if config is not None and volume.id in config.removed_volumes:
        raise Conflict(f"{config.host} is told to delete {volume.id}", field="volume")
    known = held(ledger).get(volume.id)
    if known is not None and known.hold is VolumeHold.KEPT and known.operation == operation:
        return  # said late
    if known is not None and known.hold is VolumeHold.KEPT:
        raise Conflict(f"{volume.id} is here since {known.operation}", field="volume")
    if known is not None and _past(known, operation, volume):
        raise Stale(f"{volume.id} is past epoch {volume.epoch} here", field="volume")
    fact = Held(volume=volume.id, epoch=volume.epoch, hold=VolumeHold.RECEIVED, operation=operation)
    if fact != known:
        ledger.remember("receive", {_key(volume.id): msgspec.msgpack.encode(fact)})


def _past(known: Held, operation: OperationId, volume: VolumeSpec) -> bool:
    if known.hold is VolumeHold.DROPPED:
        return known.operation == operation
    if known.hold is VolumeHold.LEFT:
        return known.epoch >= volume.epoch
    return known.epoch > volume.epoch


def forget(ledger: Ledger, operation: OperationId, volume: VolumeId) -> bool:
    """The operation was undone. False if what is here is of another one, which stays."""
    known = held(ledger).get(volume)
    if known is not None and known.operation != operation:
        return False
    if known is not None and known.hold in (VolumeHold.LEFT, VolumeHold.KEPT):
        return False
    fact = Held(
        volume=volume, epoch=known.epoch if known else 0, hold=VolumeHold.DROPPED, operation=operation
    )
    ledger.remember("forget", {_key(volume): msgspec.msgpack.encode(fact)})
    return True


def keep(ledger: Ledger, operation: OperationId, volume: VolumeSpec) -> bool:
    """What was received is the volume from now on; False if a configuration says so already. Stale if it has
    left again, or an operation of a later epoch has brought another."""
    known = held(ledger).get(volume.id)
    config = ledger.config()
    if config is not None and any(v.id == volume.id and v.epoch >= volume.epoch for v in config.volumes):
        return False
    if known is not None and known.operation != operation and known.epoch >= volume.epoch:
        raise Stale(f"{volume.id} is past epoch {volume.epoch} here", field="volume")
    fact = Held(volume=volume.id, epoch=volume.epoch, hold=VolumeHold.KEPT, operation=operation)
    if fact != known:
        ledger.remember("keep", {_key(volume.id): msgspec.msgpack.encode(fact)})
    return True


def leave(ledger: Ledger, volume: VolumeSpec, journal: Journal, name: str) -> None:
    """The copy that counts is elsewhere; written with the step of `journal` from which on that is so."""
    fact = Held(volume=volume.id, epoch=volume.epoch, hold=VolumeHold.LEFT, operation=journal.id)
    ledger.remember(name, {_key(volume.id): msgspec.msgpack.encode(fact)}, journal)


def settle(ledger: Ledger, config: HostConfig) -> None:
    """Drop what the configuration this host has converged to says, too."""
    named = {volume.id: volume for volume in config.volumes}
    over: dict[str, bytes | None] = {
        _key(each.volume): None
        for each in held(ledger).values()
        if _settled(each, named.get(each.volume), config) and ledger.running_for_volume(each.volume) is None
    }
    if over:
        ledger.remember("settle", over)


def _settled(each: Held, named: VolumeSpec | None, config: HostConfig) -> bool:
    match each.hold:
        case VolumeHold.RECEIVED | VolumeHold.KEPT:
            return each.volume in config.removed_volumes or (named is not None and named.epoch >= each.epoch)
        case VolumeHold.LEFT:
            return named is None
        case VolumeHold.DROPPED:
            return named is not None


def _key(volume: VolumeId) -> str:
    return f"{PREFIX}{volume}"
