"""How a server reaches a volume, from the record of its copies. Pure."""

from collections.abc import Mapping

from nahtlos.model.config import RbdEndpoint, VolumeAttachment, VolumeEndpoint
from nahtlos.model.ids import HostId
from nahtlos.model.nouns import HostSpec
from nahtlos.model.storage import StorageBackend, VolumeSpec
from nahtlos.model.volume_settings import CephPlace

NBD_PORT = 10809
CEPH_NBD_PORT = 10810
"""Where a host serves images of Ceph's to who has no Ceph: while they come or go."""


def endpoint(
    volume: VolumeSpec, host: HostId, hosts: Mapping[HostId, HostSpec], *, epoch: int = 0
) -> VolumeEndpoint | None:
    """Where the copy at `host` is served, by its own epoch or by another. None if there is no such host."""
    at = hosts.get(host)
    if at is None:
        return None
    port = CEPH_NBD_PORT if volume.backend is StorageBackend.CEPH else NBD_PORT
    export = f"{volume.id}.e{epoch or volume.at(host).epoch}"
    return VolumeEndpoint(host=host, address=at.address, port=port, export=export)


def attachment(
    volume: VolumeSpec, hosts: Mapping[HostId, HostSpec], ceph: CephPlace | None = None
) -> VolumeAttachment | None:
    """By all current copies, the first one's first; where none is current, by the first, which then is what
    there is. None if no host has any."""
    if volume.backend is StorageBackend.CEPH and ceph is not None:
        rbd = RbdEndpoint(pool=ceph.pool, image=volume.id, user=ceph.user, configuration=ceph.configuration)
        return VolumeAttachment(
            volume=volume.id,
            address="",
            port=0,
            export=volume.export,
            size_mib=volume.size_mib,
            limits=volume.limits,
            limits_group=volume.limits_group,
            rbd=rbd,
        )
    found = (endpoint(volume, host, hosts) for host in volume.current or (volume.host,))
    copies = tuple(copy for copy in found if copy is not None)
    if not copies:
        return None
    return VolumeAttachment(
        volume=volume.id,
        address=copies[0].address,
        port=copies[0].port,
        export=copies[0].export,
        copies=copies if len(copies) > 1 else (),
        size_mib=volume.size_mib,
        limits=volume.limits,
        limits_group=volume.limits_group,
    )
