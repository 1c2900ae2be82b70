"""`VolumeCare` over the store: examining, mending, pacing and writing out what there is; and what came of
operations. As `volume_service`: reads the state, checks the request, writes intent; nothing waits for hosts.
"""

from collections.abc import Awaitable, Callable

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import HostId, ImageId, OperationId, SnapshotId, VolumeId
from nahtlos.model.volume_work import words
from nahtlos.runtime.controllers import volume_care, volume_views
from nahtlos.runtime.controllers.catalogues import ImageCatalog
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volumes import (
    FileView,
    ImageFileRequest,
    OperationView,
    RebuildRequest,
    ScrubRequest,
    SnapshotFileRequest,
    SnapshotView,
    SpeedRequest,
    VolumeView,
)
from nahtlos.runtime.store import operations
from nahtlos.runtime.store import volumes as rows
from nahtlos.runtime.store.operations import OperationRow
from nahtlos.runtime.store.store import AsyncConnection

MOST_OPERATIONS = 1000
Said = Callable[[str, str, str], None]


class VolumeCareService:
    """`view`: a volume as it is shown."""

    def __init__(
        self,
        looks: Looks,
        *,
        said: Said,
        images: ImageCatalog,
        view: Callable[[VolumeId], Awaitable[VolumeView]],
    ) -> None:
        self._looks = looks
        self._said = said
        self._images = images
        self._view = view

    async def scrub(self, volume: VolumeId, request: ScrubRequest) -> VolumeView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            work = volume_care.scrubbing(state, volume, request)
            if request.repair:
                volume_care.check_leaves_first(state, volume, self._shutting(state, volume))
            await rows.add_wish(tx, work, self._looks.wall())
        self._said("volume.scrub", volume, f"copies of {volume} are to be compared")
        return await self._view(volume)

    async def rebuild(self, volume: VolumeId, request: RebuildRequest) -> VolumeView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            inventory = state.inventory(self._looks.connected)
            host = volume_care.copy_to_rebuild(state, inventory, volume, request)
            volume_care.check_leaves_first(state, volume, self._shutting(state, volume))
            await rows.lose_copy(tx, volume, host)
        self._said("volume.rebuild", volume, f"the copy of {volume} on {host} is to be made anew")
        return await self._view(volume)

    def _shutting(self, state: State, volume: VolumeId) -> tuple[HostId, ...]:
        """Any of its current copies' hosts may come to coordinate it."""
        return self._looks.lacking("rebuild-in-use", state.volumes[volume].spec.current)

    async def set_speed(self, volume: VolumeId, request: SpeedRequest) -> VolumeView:
        async with self._looks.changing() as tx:
            wish, work = volume_care.paced(await self._looks.state(tx), volume, request)
            await rows.put_wish(tx, wish, work)
        rate = f"{request.bytes_per_second} bytes per second" if request.bytes_per_second else "no limit"
        self._said("volume.speed", volume, f"{words(work)}: {rate} from now on")
        return await self._view(volume)

    # --- files ---------------------------------------------------------------------------------------

    async def write_snapshot(self, snapshot: SnapshotId, request: SnapshotFileRequest) -> SnapshotView:
        async with self._looks.changing() as tx:
            work = volume_care.writing(await self._looks.state(tx), snapshot, request)
            await rows.add_wish(tx, work, self._looks.wall())
        self._said("snapshot.file", snapshot, f"{words(work)} is wished")
        look = await self._looks.now()
        return volume_views.snapshot_view(look.state, look.inventory, snapshot)

    async def write_image(self, image: ImageId, request: ImageFileRequest) -> FileView:
        volume_care.checked_file(request.file)
        known = await self._images.images()
        if image not in known:
            raise NotFound(f"no image '{image}'", field="image", remedy=f"images: {listed(known)}")
        view = await self._images.write_out(image, request)
        self._said("image.export", image, f"image {image} is written to {request.file}")
        return view

    async def files(self) -> tuple[FileView, ...]:
        return self._images.files()

    # --- operations ----------------------------------------------------------------------------------

    async def operations(
        self, *, subject: str = "", kind: str = "", limit: int = 50
    ) -> tuple[OperationView, ...]:
        if not 1 <= limit <= MOST_OPERATIONS:
            raise Refused(f"{limit} operations", field="limit", remedy=f"ask for 1 to {MOST_OPERATIONS}")
        async with self._looks.reading() as tx:
            return await operations_of(tx, subject=subject, kind=kind, limit=limit)

    async def operation(self, operation: OperationId) -> OperationView:
        async with self._looks.reading() as tx:
            found = await operations.listing(tx, operation=operation, limit=1)
        if not found:
            raise NotFound(
                f"no operation '{operation}'", field="operation", remedy="nahtlos operation list tells them"
            )
        return _view(found[0])


async def operations_of(
    tx: AsyncConnection, *, subject: str = "", kind: str = "", limit: int
) -> tuple[OperationView, ...]:
    found = await operations.listing(tx, subject=subject, kind=kind, limit=limit)
    return tuple(_view(row) for row in found)


def _view(row: OperationRow) -> OperationView:
    return OperationView(record=row.record, begun_at=row.begun_at, ended_at=row.ended_at)
