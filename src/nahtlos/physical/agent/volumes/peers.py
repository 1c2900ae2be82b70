"""What an agent answers the coordinators of volumes' operations on other hosts."""

import msgspec

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused, Stale, Unavailable
from nahtlos.model.inventory import RunState
from nahtlos.model.storage import Changes, VolumeSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.guests import freeze as guests
from nahtlos.physical.agent.volumes import holds
from nahtlos.physical.agent.volumes.freeze import freeze, owned, thaw
from nahtlos.physical.agent.volumes.rejoin import check_ran_on
from nahtlos.physical.agent.volumes.replicas import LOST_BEFORE, lost_exports, place, without
from nahtlos.physical.ports import StorageDesired, VmmId
from nahtlos.wire.messages import Done, Message
from nahtlos.wire.volumes import (
    GuestFreeze,
    GuestThaw,
    VolumeAttach,
    VolumeDigest,
    VolumeDigested,
    VolumeForget,
    VolumeFreeze,
    VolumeKeep,
    VolumeMark,
    VolumeOffer,
    VolumeOffered,
    VolumeOfferEnd,
    VolumeRanOn,
    VolumeReceive,
    VolumeRejoin,
    VolumeRejoined,
    VolumeSnapshot,
    VolumeSnapshotPrepare,
    VolumeStep,
    VolumeThaw,
)

ForVolume = (
    VolumeReceive
    | VolumeAttach
    | VolumeForget
    | VolumeKeep
    | VolumeFreeze
    | VolumeThaw
    | GuestFreeze
    | GuestThaw
    | VolumeSnapshot
    | VolumeSnapshotPrepare
    | VolumeDigest
    | VolumeMark
    | VolumeRejoin
    | VolumeRanOn
    | VolumeStep
    | VolumeOffer
    | VolumeOfferEnd
)


async def answer_volume(context: Context, body: ForVolume, peer: str) -> Message:
    """Refused for who is no host of this cloud."""
    config = context.ledger.config()
    if config is None or peer not in {f"host/{host.id}" for host in config.hosts}:
        raise Refused(f"{peer} is no host of this cloud", field="peer")
    if isinstance(body, VolumeDigest):
        digest = await context.drivers.storage.digest(body.volume, body.offset, body.length)
        return VolumeDigested(sha256=digest)
    if isinstance(body, VolumeRejoin):
        return VolumeRejoined(changes=await _rejoin(context, body))
    if isinstance(body, VolumeOffer):
        return VolumeOffered(offer=await context.drivers.storage.offer_snapshots(body.volume, body.snapshots))
    await carry_out(context, body)
    return Done()


async def carry_out(context: Context, body: ForVolume) -> None:
    """Also what a coordinator asks of its own host."""
    match body:
        case VolumeReceive():
            await _receive(context, body)
        case VolumeKeep():
            await _keep(context, body)
        case VolumeForget():
            await _forget(context, body)
        case VolumeAttach():
            await _attach(context, body)
        case VolumeSnapshot():
            await _snapshot(context, body)
        case VolumeSnapshotPrepare():
            await context.drivers.storage.snapshot_prepare(body.snapshots)
        case VolumeFreeze():
            await freeze(context, body)
        case VolumeThaw():
            await thaw(context, body)
        case GuestFreeze():
            await guests.freeze(context, body)
        case GuestThaw():
            await guests.thaw(context, body)
        case VolumeMark():
            await context.drivers.storage.mark(body.volume, body.epoch, body.problem)
        case VolumeRejoin():
            await _rejoin(context, body)
        case VolumeRanOn():
            await check_ran_on(context, body.server, body.gone)
        case VolumeStep(reached=False):
            await context.drivers.storage.step_begin(body.volume, body.step)
        case VolumeStep():
            await context.drivers.storage.step_reached(body.volume, body.step)
        case VolumeOfferEnd():
            await context.drivers.storage.end_offer(body.volume)
        case VolumeDigest() | VolumeOffer():
            pass  # it asks, and changes nothing


async def _receive(context: Context, body: VolumeReceive) -> None:
    _check_here(context, body.volume)
    holds.receive(context.ledger, body.id, body.volume)
    await context.drivers.storage.receive(body.volume)


async def _rejoin(context: Context, body: VolumeRejoin) -> Changes | None:
    _check_here(context, body.volume)
    holds.receive(context.ledger, body.id, body.volume)
    return await context.drivers.storage.rejoin(body.volume)


def _check_here(context: Context, volume: VolumeSpec) -> None:
    if volume.host != context.settings.host:
        raise Refused(f"{volume.id} is for {volume.host}", field="volume")


async def _keep(context: Context, body: VolumeKeep) -> None:
    if holds.keep(context.ledger, body.id, body.volume):
        await context.drivers.storage.reconcile(_only(context, volumes=(body.volume,)))


async def _forget(context: Context, body: VolumeForget) -> None:
    """What was received goes, unless this host's configuration has come to name it."""
    config = context.ledger.config()
    if config is not None and any(volume.id == body.volume for volume in config.volumes):
        return
    if holds.forget(context.ledger, body.id, body.volume):
        await context.drivers.storage.reconcile(_only(context, removed=(body.volume,)))


def _only(context: Context, **desired: object) -> StorageDesired:
    """What is said of these alone: the rest stays as it is, exports included."""
    config = context.ledger.config()
    if config is None:
        return msgspec.structs.replace(StorageDesired(), **desired)
    as_before = StorageDesired(exports=config.snapshot_exports, budget=config.disk_budget)
    return msgspec.structs.replace(as_before, **desired)


async def _snapshot(context: Context, body: VolumeSnapshot) -> None:
    if body.undo:
        ids = tuple(each.id for each in body.snapshots)
        await context.drivers.storage.reconcile(_only(context, removed_snapshots=ids))
    else:
        await context.drivers.storage.snapshot(body.snapshots)


async def _attach(context: Context, body: VolumeAttach) -> None:
    """Written down first: should its VMM end meanwhile, it is started with the new path. Until this was
    answered both paths lead to the same data. Unavailable while a VMM of it is being started, which is led by
    what was written down before: what that writes would be missing where this is to lead."""
    held = owned(context, body.server, body.epoch)
    if body.server in context.starting:
        raise Unavailable(f"{body.server} is just being started", field="server")
    lost = lost_exports(context.ledger)
    for each in body.attachment.copies:
        if each.joining and place(each) in lost:  # what is left out silently would count as written to
            raise Refused(
                f"the copy on {each.host} was lost to {body.server} as {each.export}: it has to come back by "
                "another epoch",
                field=LOST_BEFORE,
            )
    attachment = without(body.attachment, lost)
    server = reached_by(held.server, attachment, body.instead_of)
    context.ledger.adopt(server)
    vmm = VmmId(body.server, held.epoch)
    vmms = await context.drivers.hypervisor.observe()
    status = next((each for each in vmms if each.id == vmm), None)
    if status is not None and status.state is not RunState.CRASHED:
        server = owned(context, body.server).server  # a copy may be lost since
        await context.drivers.hypervisor.disks_reconcile(vmm, server)
    _still_owned(context, server)
    context.say("volume.attached", body.attachment.volume, f"{body.server} reaches it elsewhere", id=body.id)


def _still_owned(context: Context, server: ServerConfig) -> None:
    """Conflict if a move has begun meanwhile: who has it next is to be told, too."""
    held = owned(context, server.spec.id)
    if held.epoch != server.epoch:
        raise Conflict(f"{server.spec.id} has moved meanwhile", field="server")


def reached_by(
    server: ServerConfig, attachment: VolumeAttachment, instead_of: VolumeEndpoint | None = None
) -> ServerConfig:
    """`server` with this volume reached as `attachment` says; its size and limits stay, and so do its other
    copies if this is `instead_of` one. Conflict if it has no such volume, Stale if it reaches it by a later
    epoch."""
    found = [
        _with_copy(each, attachment, instead_of)
        if instead_of is not None and each.copies
        else _redirected(each, attachment)
        for each in server.all_volumes
    ]
    if all(each.volume != attachment.volume for each in found):
        raise Conflict(f"{server.spec.id} has no volume {attachment.volume}", field="volume")
    return msgspec.structs.replace(server, volume=found[0], data_volumes=tuple(found[1:]))


def _redirected(known: VolumeAttachment, new: VolumeAttachment) -> VolumeAttachment:
    if known.volume != new.volume:
        return known
    if epoch_of(known) > epoch_of(new) and not _leaves_some(known, new):
        raise Stale(f"{known.volume} is reached as {known.export} already", field="volume")
    return msgspec.structs.replace(
        known,
        address=new.address,
        port=new.port,
        export=new.export,
        copies=new.copies if len(new.copies) > 1 else (),
        rbd=new.rbd,
    )


def _leaves_some(known: VolumeAttachment, new: VolumeAttachment) -> bool:
    """By some of the copies by which it is reached now."""
    exports = {each.export for each in known.copies}
    return {new.export, *(each.export for each in new.copies)} < exports


def _with_copy(known: VolumeAttachment, new: VolumeAttachment, old: VolumeEndpoint) -> VolumeAttachment:
    """`old` among its copies has gone to the one that `new` names."""
    if known.volume != new.volume or len(new.copies) != 1:
        return known
    gone = (old.address, old.port, old.export)
    copies = tuple(
        msgspec.structs.replace(new.copies[0], joining=each.joining)
        if (each.address, each.port, each.export) == gone
        else each
        for each in known.copies
    )
    first = copies[0]
    return msgspec.structs.replace(
        known, address=first.address, port=first.port, export=first.export, copies=copies
    )


def epoch_of(attachment: VolumeAttachment) -> int:
    """Of the export's name; 0 where there is none."""
    _, _, epoch = attachment.export.rpartition(".e")
    return int(epoch) if epoch.isdecimal() else 0
