"""What a server gets of a disk: by our stack (throttle filters, TLS both ways, the host's storage daemon),
against the raw file under the same stand-in, and against a bare storage daemon serving it over NBD without
TLS. By turns, so that what else the machine does falls on all alike.
"""

import statistics
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.storage_site import Disk, Host, Node, Site, remote
from nahtlos.model.config import VolumeEndpoint
from nahtlos.physical.ports import Unit

SIZE_MIB = 256
SEQUENTIAL, RANDOM = 256 << 10, 4096
PATTERNS = {
    "sequential write, 256 KiB, QD4": ("seqwrite", SEQUENTIAL, 4),
    "sequential read, 256 KiB, QD4": ("seqread", SEQUENTIAL, 4),
    "random write, 4 KiB, QD1": ("randwrite", RANDOM, 1),
    "random read, 4 KiB, QD1": ("randread", RANDOM, 1),
    "random write, 4 KiB, QD16": ("randwrite", RANDOM, 16),
    "random read, 4 KiB, QD16": ("randread", RANDOM, 16),
}
BARE_PORT = 10999


async def measure(figures: Figures, *, long: bool) -> None:
    seconds, turns = (5.0, 4) if long else (1.0, 2)
    async with Site(1) as site:
        host = site.hosts[0]
        volume = host.volume("ours", size_mib=SIZE_MIB)
        await host.have(volume)
        disks = {
            "raw": Disk(host, "raw", file_nodes(blank_file(site, "raw"))),
            "bare": Disk(host, "bare", (remote(await _bare(host), tls=False),)),
            "ours": Disk(host, "ours", (remote(host.endpoint(volume)),)),
        }
        async with disks["raw"], disks["bare"], disks["ours"]:
            for disk in disks.values():  # what was never written is read from nowhere
                await disk.load("seqwrite", seconds=2.0, block=1 << 20, depth=4)
            for what, (kind, block, depth) in PATTERNS.items():
                got: dict[str, list[float]] = {name: [] for name in disks}
                for turn in range(turns):
                    names = list(disks) if turn % 2 else list(reversed(disks))
                    for name in names:
                        load = await disks[name].load(kind, seconds=seconds, block=block, depth=depth)
                        if not load.sound:
                            raise RuntimeError(f"{what}: {load.errors} errors")
                        got[name].append(load.rate * block / 1e6 if block == SEQUENTIAL else load.rate)
                _report(figures, what, "MB/s" if block == SEQUENTIAL else "IOPS", got)


def _report(figures: Figures, what: str, unit: str, got: dict[str, list[float]]) -> None:
    rate = {name: statistics.mean(rates) for name, rates in got.items()}
    samples = len(got["ours"])
    figures.add(f"{what}, to the raw file", rate["ours"], unit, baseline=rate["raw"], samples=samples)
    figures.add(f"{what}, to a bare daemon", rate["ours"], unit, baseline=rate["bare"], samples=samples)


def blank_file(site: Site, name: str) -> Path:
    path = site.folder / f"{name}.raw"
    with path.open("wb") as file:
        file.truncate(SIZE_MIB << 20)
    return path


def file_nodes(path: Path) -> tuple[Node, ...]:
    return (
        {"driver": "file", "node-name": "file", "filename": str(path), "discard": "unmap"},
        {"driver": "raw", "node-name": "volume", "file": "file", "discard": "unmap"},
    )


async def _bare(host: Host) -> VolumeEndpoint:
    """A storage daemon of the same release with one file and nothing else."""
    bundle = host.site.bundle()
    path = blank_file(host.site, "bare")
    await host.supervisor.start(
        Unit(
            name="bare",
            argv=(
                *bundle.storage_daemon(),
                *("--blockdev", f"driver=file,node-name=file,filename={path},discard=unmap"),
                *("--nbd-server", f"addr.type=inet,addr.host={host.settings.address},addr.port={BARE_PORT}"),
                *("--export", "type=nbd,id=e,node-name=file,name=bare,writable=on"),
            ),
            environment=bundle.environment,
            log=host.site.folder / "bare.log",
        )
    )
    return VolumeEndpoint(
        host=host.settings.host, address=host.settings.address, port=BARE_PORT, export="bare"
    )
