"""What goes out comes back the same, by commands alone in a lab without a guest: an image to a file and back,
in both formats; a volume, encrypted and not, through snapshots, clones, a relocation, a drain that its
snapshots follow, and backups of all and of what changed, in a folder and at an NBD server that is somebody's.

What a volume holds is always told by another program: the checksum of a snapshot that was written to a file.
"""

import asyncio
import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_commands import LabCommands, lab_commands
from outsider import credentials

from nahtlos.lab.paths import BuildPaths, LabPaths
from nahtlos.lab.topology import namespace_of, within
from nahtlos.model.ids import HostId
from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.ports import Unit
from nahtlos.physical.storage.backup_targets import ROOM
from nahtlos.physical.storage.nbd import Address, NbdClient
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.wire.tls import CA_FILE, OUTSIDERS_CA_FILE, client_context, host_party

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(240),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
MIB = 1 << 20
SIZE = 32 * MIB
PLAIN = b"readable by nobody else" * 8
STORE_ADDRESS, STORE_PORT = "10.99.0.1", 20000


@pytest.fixture
def nahtlos(tmp_path: Path) -> Iterator[LabCommands]:
    with lab_commands("trip", tmp_path) as line:
        line.json("lab", "up", "--hosts", "2", "--memory-mib", "256")
        yield line


class Content:
    """What a volume has to hold, and how it is made to."""

    def __init__(self, nahtlos: LabCommands, volume: str, data: bytes) -> None:
        self._nahtlos = nahtlos
        self.volume = volume
        self.data = bytearray(data)

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def write(self, offset: int, block: bytes) -> None:
        """As a server at the other host would."""
        self.data[offset : offset + len(block)] = block
        spec = self._nahtlos.json("volume", "show", self.volume)["spec"]
        other = "host-1" if spec["host"] == "host-2" else "host-2"
        pki = LabPaths(self._nahtlos.lab).node(other).pki
        address = f"10.99.0.{10 + int(spec['host'][-1])}"

        def act() -> None:
            at = Address(address, 10809, f"{self.volume}.e{spec['epoch']}")
            with NbdClient(at, tls=client_context(pki), expect=host_party(HostId(spec["host"]))) as client:
                client.write(offset, block)
                client.flush()

        within(namespace_of(self._nahtlos.lab, other), act)


class Trips:
    def __init__(self, nahtlos: LabCommands, folder: Path) -> None:
        self.nahtlos = nahtlos
        self.folder = folder
        self._count = 0

    def file(self) -> Path:
        self._count += 1
        return self.folder / f"file-{self._count}"

    def holds(self, volume: str) -> str:
        """The checksum of all of it now."""
        self._count += 1
        name = f"look-{self._count}"
        self.nahtlos.json("snapshot", "create", name, "--volume", volume)
        found = self.nahtlos.checksum(name, self.file())
        self.nahtlos.json("snapshot", "delete", name)
        return found


def content() -> bytes:
    """Half of it nothing, a part readable."""
    chance = random.Random(4)
    data = bytearray(SIZE)
    for number in range(0, 32, 3):
        data[number * MIB : number * MIB + MIB // 2] = chance.randbytes(MIB // 2)
    data[5 * MIB : 5 * MIB + len(PLAIN)] = PLAIN
    return bytes(data)


def test_what_goes_out_comes_back_the_same(nahtlos: LabCommands, tmp_path: Path) -> None:
    trips, data = Trips(nahtlos, tmp_path), content()
    _images(trips, data)
    nahtlos.json("volume", "create", "open", "--image", "again", "--format", "qcow2", "--host", "host-1")
    nahtlos.json("volume", "create", "secret", "--image", "again", "--encrypted", "--host", "host-1")
    store = asyncio.run(_nbd_store(nahtlos, tmp_path))
    for name in ("open", "secret"):
        held = Content(nahtlos, name, data)
        assert trips.holds(name) == held.checksum
        _backups(trips, held, store)
    _snapshots(trips, held)
    assert PLAIN not in _on_disk(nahtlos, "secret") and PLAIN in _on_disk(nahtlos, "open")


def _images(trips: Trips, data: bytes) -> None:
    """Raw, to qcow2, and from there to raw."""
    source, nahtlos = trips.file(), trips.nahtlos
    source.write_bytes(data)
    nahtlos.json("image", "import", "first", str(source), "--format", "raw")
    packed, raw = trips.file(), trips.file()
    nahtlos.json("image", "export", "first", str(packed), "--format", "qcow2")
    assert packed.read_bytes()[:4] == b"QFI\xfb"
    nahtlos.json("image", "import", "again", str(packed), "--format", "qcow2")
    told = nahtlos.json("image", "export", "again", str(raw), "--format", "raw")
    assert told["sha256"] == hashlib.sha256(data).hexdigest() == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert nahtlos.refused("image", "export", "again", str(raw))["field"] == "file"
    nahtlos.json("image", "delete", "first")


def _backups(trips: Trips, held: Content, store: str) -> None:
    """Of three moments, each in another place than the one before; what rests on others can be had again."""
    nahtlos, name = trips.nahtlos, held.volume
    places = (str(trips.folder / "vault"), f"{store}/{name}", str(trips.folder / "vault"))
    moments: list[str] = []
    for number, place in enumerate(places):
        held.write((7 + number) * MIB, random.Random(number).randbytes(64 * 1024))
        words = ("backup", "create", f"{name}-{number}", "--volume", name, "--to", place)
        made = nahtlos.json(*words, *(("--incremental",) if number else ()))
        assert made["spec"]["base"] == (f"{name}-{number - 1}" if number else None), made
        assert not number or made["spec"]["stored_bytes"] < MIB, made
        moments.append(held.checksum)
    held.write(20 * MIB, PLAIN)
    for number, checksum in list(enumerate(moments))[1:]:
        again = f"{name}-r{number}"
        nahtlos.json("backup", "restore", f"{name}-{number}", again)
        assert trips.holds(again) == checksum
        nahtlos.json("volume", "delete", again, "--yes")
    assert trips.holds(name) == held.checksum


def _snapshots(trips: Trips, held: Content) -> None:
    """Of a volume that leaves, whose host is then emptied; one of them goes on its own."""
    nahtlos, name = trips.nahtlos, held.volume
    nahtlos.json("snapshot", "create", f"{name}-then", "--volume", name)
    then = held.checksum
    held.write(9 * MIB, PLAIN * 20)
    nahtlos.json("snapshot", "clone", f"{name}-then", f"{name}-twin")
    assert trips.holds(f"{name}-twin") == then
    nahtlos.json("volume", "delete", f"{name}-twin", "--yes")
    nahtlos.json("volume", "relocate", name, "--to", "host-2")
    assert trips.holds(name) == held.checksum
    assert nahtlos.json("snapshot", "show", f"{name}-then")["spec"]["hosts"] == ["host-1"]
    held.write(10 * MIB, PLAIN)
    nahtlos.json("snapshot", "create", f"{name}-later", "--volume", name)
    later = held.checksum
    assert nahtlos.json("snapshot", "move", f"{name}-later", "--to", "host-1")["spec"]["hosts"] == ["host-1"]
    assert nahtlos.checksum(f"{name}-later", trips.file(), "host-1") == later
    refused = nahtlos.refused("volume", "revert", name, f"{name}-later", "--yes")
    assert refused["remedy"] == f"nahtlos snapshot move {name}-later --to host-2 first"
    nahtlos.json("volume", "relocate", "open", "--to", "host-2")
    assert nahtlos.json("host", "drain", "host-1")["phase"] == "drained"
    for snapshot, checksum in ((f"{name}-then", then), (f"{name}-later", later)):
        assert nahtlos.json("snapshot", "show", snapshot)["spec"]["hosts"] == ["host-2"]
        assert nahtlos.checksum(snapshot, trips.file()) == checksum
    nahtlos.json("volume", "revert", name, f"{name}-then", "--yes")
    assert trips.holds(name) == then


async def _nbd_store(nahtlos: LabCommands, folder: Path) -> str:
    """An NBD server in the lab's management node, which takes hosts of the lab and is known to them."""
    nodes = LabPaths(nahtlos.lab)
    vault = folder / "vault-credentials"
    known = credentials(vault, STORE_ADDRESS, nodes.node("ctl").pki / CA_FILE)
    for host in ("host-1", "host-2"):
        shutil.copyfile(known, nodes.node(host).pki / OUTSIDERS_CA_FILE)
    newest = max(BuildPaths.default().movable_releases(), key=lambda each: each.version.split("."))
    bundle = await asyncio.to_thread(read_bundle, nahtlos.build.releases / newest.id)
    words: list[str] = []
    for export in ("open", "secret"):
        file = folder / f"store-{export}"
        file.touch()
        os.truncate(file, SIZE + ROOM)
        words += ["--blockdev", f"driver=file,node-name={export},filename={file},discard=unmap"]
        words += ["--export", f"type=nbd,id={export},node-name={export},name={export},writable=on"]
    paths = nodes.node("ctl")
    unit = Unit(
        name="store",
        argv=(
            *bundle.storage_daemon(),
            *("--object", f"tls-creds-x509,id=tls,dir={vault},endpoint=server,verify-peer=yes"),
            *(
                "--nbd-server",
                f"addr.type=inet,addr.host={STORE_ADDRESS},addr.port={STORE_PORT},tls-creds=tls",
            ),
            *words,
        ),
        environment=bundle.environment,
        log=paths.state / "store.log",
    )
    supervisor = SupervisorClient(paths.supervisor)
    try:
        await supervisor.start(unit)
    finally:
        supervisor.close()
    return f"nbds://{STORE_ADDRESS}:{STORE_PORT}"


def _on_disk(nahtlos: LabCommands, volume: str) -> bytes:
    folders = [LabPaths(nahtlos.lab).node(host).state / "volumes" for host in ("host-1", "host-2")]
    files = [file for folder in folders for file in folder.glob(f"{volume}*") if file.is_file()]
    return b"".join(file.read_bytes() for file in files)
