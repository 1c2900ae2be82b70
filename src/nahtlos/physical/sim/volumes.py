"""Volumes of the simulated data centre: what is on each host's disk, what its storage daemon serves, and what
must never happen to a write that was acknowledged.

A copy holds the first `writes` acknowledged writes of its volume (or not even that while something is copied
into it). Servers that run write without end: whenever anything about a volume is about to change, or has
changed, each of them reads what it wrote and writes once more (`Disks.touch`); nothing in between could be
told from that.

Checked at every write:
    lost-write    who reads does not find every acknowledged write
    stale-copy    the server's memory knows another number of writes than its disk
    write-hole    of several copies that are read one may differ from the others
    two-homes     another host has the volume as its own, too, and would serve it
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Error, NotFound, Refused, Unavailable
from nahtlos.model.ids import BackupId, HostId, OperationId, SnapshotId, VolumeId
from nahtlos.model.storage import BackupSpec, CopyPhase, CopyProgress, SnapshotSpec, VolumeSpec
from nahtlos.physical.ports import BackupResult, DiskProblem, DiskTrouble
from nahtlos.physical.sim.guests import Vmm

if TYPE_CHECKING:
    from nahtlos.physical.sim.facts import SimHost
    from nahtlos.physical.sim.world import World

COPY_BYTES_PER_SECOND = 400 << 20
LONGEST_WAY = 4
"""Hosts that pass a volume on, one after the other."""


@dataclass(eq=False)
class Volume:
    """A copy, on one host's disk."""

    spec: VolumeSpec
    writes: int = 0
    """Acknowledged ones that it holds, from the first on."""
    whole: bool = True
    """False: something is copied into it, or was to be."""
    received: bool = False
    """Made for a copy; no configuration has named it yet."""
    proxy: VolumeEndpoint | None = None
    """Everything is passed on to there. In the daemon's definition, so it survives the daemon."""
    job: "Copy | None" = None
    """In the daemon's memory: it dies with it."""
    problem: str = ""
    """As it was marked."""
    in_step: str = ""
    steps: set[str] = field(default_factory=set[str])
    """Since which it knows what was written. In the daemon's memory."""
    in_doubt: bool = False
    """A server ended while it wrote to this and to other copies: they may differ in what was on its way."""


@dataclass(eq=False)
class Snapshot:
    spec: SnapshotSpec
    writes: int
    came_by: OperationId | None = None
    """From another host; None: it was taken here."""
    clean: bool = False
    """Of a moment at which all who write to it had frozen their file systems."""


class Copy:
    """A mirror job: first everything that is there, then every write goes to both."""

    def __init__(self, target: VolumeEndpoint, into: Volume, size: int, rate: int, at: float) -> None:
        self.target = target
        self.into = into
        self.phase = CopyPhase.COPYING
        self.error = ""
        self.stalled = False
        self._size = size
        self._done = 0.0
        self._rate = float(rate)
        self._at = at

    def set_rate(self, rate: int, at: float) -> None:
        self.advance(at)
        self._rate = float(rate)

    def advance(self, at: float) -> bool:
        """Let it flow until now; True if it has become READY by that."""
        if self.phase is CopyPhase.COPYING and not self.stalled:
            self._done = min(float(self._size), self._done + self._rate * (at - self._at))
        self._at = at
        if self.phase is CopyPhase.COPYING and self._done >= self._size:
            self.phase = CopyPhase.READY
            return True
        return False

    def fail(self, why: str) -> None:
        self.phase, self.error = CopyPhase.FAILED, why

    def progress(self) -> CopyProgress:
        return CopyProgress(phase=self.phase, done=int(self._done), total=self._size, error=self.error)


def paths_of(attachment: VolumeAttachment) -> tuple[tuple[str, str], ...]:
    """Address and export of every copy it is reached by."""
    if attachment.copies:
        return tuple((each.address, each.export) for each in attachment.copies)
    return ((attachment.address, attachment.export),)


@dataclass(eq=False)
class Written:
    """When each acknowledged write of a volume came."""

    times: list[float] = field(default_factory=list[float])
    base: int = 0
    """Writes it had before the first of these."""


class Disks:
    def __init__(self, world: "World") -> None:
        self._world = world
        self.acknowledged: dict[VolumeId, int] = {}
        self.stalled: set[tuple[str, VolumeId]] = set()
        """Servers whose last write was not acknowledged."""
        self._written: dict[VolumeId, Written] = {}
        self._told: set[tuple[VolumeId, str]] = set()
        self.backups: dict[tuple[str, BackupId], tuple[BackupSpec, BackupResult]] = {}
        """What is whole, by its target: wherever it is read, it is the same place here."""

    # --- where a client's requests arrive ---

    def reach(self, address: str, export: str, *, way: int = LONGEST_WAY) -> list[Volume]:
        """The copies that a write to `export` goes into, the one that is read first. Unavailable if nobody
        answers there, Refused if there is no such export."""
        host, volume = self._served(address, export)
        if volume.proxy is not None:
            if way == 0:
                raise Unavailable(f"{export} is passed on in a circle", field="volume")
            return self.reach(volume.proxy.address, volume.proxy.export, way=way - 1)
        self._advance(host, volume)
        job = volume.job
        if job is None or job.phase is not CopyPhase.READY:
            return [volume]
        return [volume, *self.reach(job.target.address, job.target.export, way=way - 1)]

    def _served(self, address: str, export: str) -> tuple["SimHost", Volume]:
        name, _, epoch = export.rpartition(".e")
        host = next((h for h in self._world.hosts.values() if h.address == address), None)
        volume = host.volumes.get(VolumeId(name)) if host and host.powered and host.storage_up else None
        if host is None or volume is None:
            raise Unavailable(f"nobody serves {export} at {address}", field="volume")
        if str(volume.spec.epoch) != epoch:
            raise Refused(f"{address} has no export {export}", field="volume")
        return host, volume

    def check_served(self, attachments: Iterable[VolumeAttachment]) -> None:
        for attachment in attachments:
            for address, export in paths_of(attachment):
                self.reach(address, export)

    def clients(self, host: "SimHost", volume: Volume) -> list[Vmm]:
        """VMMs that have the volume open here, running or not."""
        path = (host.address, volume.spec.export)
        return [
            vmm
            for other in self._world.hosts.values()
            for vmm in other.vmms.values()
            if not vmm.ended and any(path in paths_of(each) for each in vmm.server.all_volumes)
        ]

    # --- writing ---

    def touch(self, *volumes: VolumeId) -> None:
        """Every server that runs and has one of `volumes` reads and writes all that it has."""
        for host in self._world.hosts.values():
            for volume in volumes:
                held = host.volumes.get(volume)
                if held is not None:
                    self._advance(host, held)
        for host in self._world.hosts.values():
            for vmm in tuple(host.vmms.values()):
                if vmm.running and any(each.volume in volumes for each in vmm.server.all_volumes):
                    self.use(vmm)

    def use(self, vmm: Vmm) -> None:
        for attachment in vmm.server.all_volumes:
            if vmm.running:
                self._use(vmm, attachment)

    def _use(self, vmm: Vmm, attachment: VolumeAttachment) -> None:
        volume, server = attachment.volume, vmm.id.server
        reached, read, joining = list[Volume](), list[Volume](), list[Volume]()
        unread = {(each.address, each.export) for each in attachment.copies if each.joining}
        for address, export in paths_of(attachment):
            into = joining if (address, export) in unread else reached
            try:
                found = self.reach(address, export)
            except Error as error:
                self.stalled.add((server, volume))
                if attachment.copies and not self._restarts(address):
                    self._lose(vmm, attachment, address, str(error))
                return
            into += [each for each in found if each not in into]
            if into is reached:
                read.append(found[0])
        self.stalled.discard((server, volume))
        assert vmm.guest is not None
        self._read(vmm, volume, reached)
        self._check_doubt(volume, read)
        if vmm.guest.frozen:
            return
        number = self.acknowledged[volume] = self.acknowledged.get(volume, 0) + 1
        self._written.setdefault(volume, Written(base=number - 1)).times.append(self._world.now())
        for copy in (*reached, *(each for each in joining if each.writes == number - 1)):
            copy.writes = number  # one that has missed a write does not catch up by the next
        vmm.guest.writes[volume] = number
        self._check_homes(volume, reached)

    def change(self, vmm: Vmm, server: ServerConfig) -> None:
        """Its guest reaches its volumes so from now on; nothing changes if one of them is not there."""
        self.check_served(each for each in server.all_volumes if each not in vmm.server.all_volumes)
        kept = {each.volume for each in server.all_volumes}
        concerned = (*kept, *(each.volume for each in vmm.server.all_volumes))
        self.touch(*concerned)
        vmm.server = server
        vmm.disk_problems = ()
        for volume in vmm.guest.writes.keys() - kept if vmm.guest else ():
            assert vmm.guest is not None
            del vmm.guest.writes[volume]
        self.touch(*concerned)

    def _restarts(self, address: str) -> bool:
        """Its daemon is back in a moment: requests wait for it."""
        host = next((h for h in self._world.hosts.values() if h.address == address), None)
        return host is not None and host.powered and not host.storage_up

    def _lose(self, vmm: Vmm, attachment: VolumeAttachment, address: str, text: str) -> None:
        """A write that not all copies took is not acknowledged: the guest stands still."""
        lost = next((each.host for each in attachment.copies if each.address == address), None)
        problem = DiskProblem(
            volume=attachment.volume, trouble=DiskTrouble.REPLICA_LOST, replica=lost, text=text
        )
        vmm.disk_problems = (problem,)
        self._world.pause(vmm)
        self._world.hosts[vmm.host].disks_told.set()

    def _read(self, vmm: Vmm, volume: VolumeId, reached: list[Volume]) -> None:
        acknowledged = self.acknowledged.get(volume, 0)
        assert vmm.guest is not None
        known = vmm.guest.writes.get(volume, acknowledged)
        if known != acknowledged:
            text = f"{vmm.id.unit} at {vmm.host} knows {known} of {acknowledged} writes to {volume}"
            self._violated("stale-copy", vmm.id.server, text)
        for copy in reached:
            if not copy.whole or copy.writes != acknowledged:
                torn = "" if copy.whole else ", torn"
                text = f"{copy.spec.host}: {copy.writes} of {acknowledged} writes{torn}"
                self._violated("lost-write", volume, text)

    def ended_writing(self, vmm: Vmm) -> None:
        """What it was just writing may be at some of its copies and not at others."""
        for attachment in vmm.server.all_volumes:
            for address, export in paths_of(attachment) if attachment.copies else ():
                name, _, epoch = export.rpartition(".e")
                for host in self._world.hosts.values():
                    held = host.volumes.get(VolumeId(name))
                    if host.address == address and held is not None and str(held.spec.epoch) == epoch:
                        held.in_doubt = True

    def _check_doubt(self, volume: VolumeId, read: list[Volume]) -> None:
        """The one that is read alone is what counts, also while it is copied elsewhere; another has to be
        copied into before it is read."""
        if len(read) == 1:
            read[0].in_doubt = False
        for copy in read:
            if copy.in_doubt:
                self._violated("write-hole", volume, f"{copy.spec.host} is read beside others")

    def _check_homes(self, volume: VolumeId, reached: list[Volume]) -> None:
        if any(copy.spec.replicas for copy in reached):
            return  # which of them count is written down elsewhere
        for host in self._world.hosts.values():
            held = host.volumes.get(volume)
            if held is None or held in reached or held.received or held.proxy is not None:
                continue
            if not held.spec.replicas and not any(self._feeds(held, copy) for copy in reached):
                self._violated("two-homes", volume, f"{host.id} would serve it as its own, too")

    def _feeds(self, source: Volume, target: Volume) -> bool:
        return source.job is not None and source.job.into is target

    def _violated(self, kind: str, subject: str, text: str) -> None:
        if (VolumeId(subject), kind + text) not in self._told:
            self._told.add((VolumeId(subject), kind + text))
            self._world.violated(kind, subject, text)

    # --- copies ---

    def begin_copy(self, host: "SimHost", volume: Volume, target: VolumeEndpoint, rate: int) -> None:
        into = self.reach(target.address, target.export)[0]
        into.whole, into.writes, into.in_doubt = False, 0, False
        size = volume.spec.size_mib << 20
        volume.job = Copy(target, into, size, rate or COPY_BYTES_PER_SECOND, self._world.now())
        volume.job.stalled = self._link_stalled(host, target.address)

    def _link_stalled(self, host: "SimHost", address: str) -> bool:
        return any(
            other.address == address and frozenset((host.id, other.id)) in self._world.stalled_links
            for other in self._world.hosts.values()
        )

    def _advance(self, host: "SimHost", volume: Volume) -> None:
        job = volume.job
        if job is None or job.phase not in (CopyPhase.COPYING, CopyPhase.READY):
            return
        if self._broken(job):
            job.fail(f"nobody takes what is sent to {job.target.address}")
            return
        job.advance(self._world.now())
        job.stalled = self._link_stalled(host, job.target.address)
        if job.phase is CopyPhase.READY and not job.into.whole:
            job.into.whole, job.into.writes = True, volume.writes

    def _broken(self, job: Copy) -> bool:
        """A daemon that restarts is waited for; everything else ends the job."""
        for other in self._world.hosts.values():
            if other.address == job.target.address:
                there = other.volumes.get(job.into.spec.id)
                return not other.powered or there is not job.into
        return True

    def daemon_ended(self, host: "SimHost") -> None:
        """What it only had in memory is gone."""
        host.offered.clear()
        for volume in host.volumes.values():
            if volume.job is not None:
                self.touch(volume.spec.id)
            volume.job = None
            volume.steps.clear()

    # --- snapshots ---

    def clean(self, host: "SimHost", volume: Volume) -> bool:
        """Whether every guest that has it open has frozen its file systems."""
        guests = [vmm.guest for vmm in self.clients(host, volume)]
        return bool(guests) and all(guest is not None and guest.frozen for guest in guests)

    def torn(self, snapshots: Iterable[Snapshot]) -> str | None:
        """Why these are not of one moment; None if they are."""
        begin, end = float("-inf"), float("inf")
        for each in snapshots:
            since, until = self._while_at(each.spec.volume, each.writes)
            begin, end = max(begin, since), min(end, until)
        return None if begin <= end else f"the youngest is of {begin:.6f}, the oldest was over at {end:.6f}"

    def _while_at(self, volume: VolumeId, writes: int) -> tuple[float, float]:
        """From when until when the volume had exactly so many writes."""
        written = self._written.get(volume, Written())
        index = writes - written.base
        times = written.times
        since = times[index - 1] if 0 < index <= len(times) else float("-inf")
        until = times[index] if 0 <= index < len(times) else float("inf")
        return since, until

    def reverted(self, volume: VolumeId, writes: int) -> None:
        self.acknowledged[volume] = writes
        self._written[volume] = Written(base=writes)

    def found(self, host: "SimHost", snapshot: SnapshotId) -> Snapshot:
        if snapshot not in host.snapshots:
            raise NotFound(f"snapshot '{snapshot}' is not on {host.id}", field="snapshot")
        return host.snapshots[snapshot]


def hosts_with(world: "World", volume: VolumeId) -> dict[HostId, Volume]:
    """Every host that has anything of it."""
    return {host.id: host.volumes[volume] for host in world.hosts.values() if volume in host.volumes}
