"""Snapshots that leave a host that is drained: after its volumes, and to where those went.

What a snapshot is made of rests on layers of its volume, and clones rest on snapshots. Only when every volume
has left (a clone comes whole where it goes) is all of that at rest, and can be copied as it is. One that is
asked for alone (see the requests) may go before: then its volume's layers are left as they are meanwhile.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from nahtlos.model.blueprint import Policy, WaitKind
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.snapshot_places import left_over_snapshots, reported_snapshots, snapshots_on
from nahtlos.model.storage import SnapshotSpec, StorageBackend
from nahtlos.model.volume_work import SnapshotMove
from nahtlos.planner.draft import Draft
from nahtlos.planner.volume_places import MIB, has_room, keeps_volumes, places
from nahtlos.planner.volume_wishes import Decided, Unready, decided


def snapshots_to_leave(
    draft: Draft, drained: Iterable[HostId]
) -> Iterator[tuple[SnapshotMove, Decided | Unready]]:
    """Those of a volume that go to the same place go together: what they share is copied once."""
    for host in drained:
        by_volume: dict[VolumeId, list[SnapshotSpec]] = defaultdict(list)
        for spec in snapshots_on(draft.policy, draft.observed.inventory, host):
            by_volume[spec.volume].append(spec)
        for volume, specs in by_volume.items():
            yield _leaving(draft, host, volume, specs)


def _leaving(
    draft: Draft, host: HostId, volume: VolumeId, specs: list[SnapshotSpec]
) -> tuple[SnapshotMove, Decided | Unready]:
    policy, seen = draft.policy, draft.observed.inventory
    found = [(spec, place_for(policy, seen, host, spec)) for spec in specs]
    to = next((place for _, place in found if place is not None), None)
    work = SnapshotMove(
        volume=volume,
        snapshots=tuple(spec.id for spec, place in found if place == to),
        source=host,
        destination=to or HostId(""),
        bytes_per_second=draft.policy.rebuild_bytes_per_second,
    )
    names = ", ".join(work.snapshots)
    if draft.keeps_volumes(host):
        return work, Unready(work, WaitKind.MOVE, f"snapshots {names} leave {host} after its volumes")
    if to is None:
        size = mib_on(seen, host, specs[0])
        text = f"no host could take the snapshots {names} from {host} ({size} MiB and more)"
        return work, Unready(
            work, WaitKind.CAPACITY, text, "activate or add a host, or free space on one, or delete them"
        )
    return work, decided(draft, work, f"{host} is drained")


def place_for(policy: Policy, seen: Inventory, host: HostId, spec: SnapshotSpec) -> HostId | None:
    """For what `host` keeps of it: where its volume is, so that that can be reverted to it; else where a copy
    would go."""
    size = mib_on(seen, host, spec)
    volume = policy.volumes.get(spec.volume)
    homes = volume.current if volume is not None and volume.backend is StorageBackend.EMBEDDED else ()
    for home in homes:
        able = keeps_volumes(policy, home) and home in seen.connected and has_room(seen, home, size)
        if able and home not in spec.hosts:
            return home
    found = places(policy, seen, size_mib=size, beside=spec.hosts, without=(host,))
    return found[0] if found else None


def mib_on(seen: Inventory, host: HostId, spec: SnapshotSpec) -> int:
    """What it takes there, as far as that is known."""
    told = (s for s in reported_snapshots(seen, host) if s.id == spec.id)
    return next((-(-status.allocated_bytes // MIB) for status in told), spec.size_mib)


def tell_of_snapshots(draft: Draft, host: HostId) -> None:
    """What keeps a host that is drained from being empty."""
    inventory = draft.observed.inventory
    kept = [spec.id for spec in snapshots_on(draft.policy, inventory, host)]
    if kept:
        draft.wait(host, WaitKind.MOVE, f"{host} still keeps {_many(len(kept))}: {', '.join(kept)}")
    for status in left_over_snapshots(draft.policy, inventory, host):
        rests = f" once {', '.join(status.clones)} has let go of it" if status.clones else ""
        draft.wait(host, WaitKind.HOST, f"{host} drops its files of {status.id}, which went elsewhere{rests}")


def _many(count: int) -> str:
    return "1 snapshot" if count == 1 else f"{count} snapshots"
