"""A Ceph cluster for a test or a measurement: one monitor and a few OSDs that keep everything in memory, up
in a few seconds, with cephx. Made by hand from Debian's daemons: no systemd, no manager.

Everything lies in one folder, on a tmpfs, and listens on one address of one network namespace. Its daemons
end with the thread that started the cluster, however that ends: start it from the main one.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Self

from nahtlos.physical.settings import CephSettings

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
ADDRESS = "127.0.0.1"
MONITOR_PORT = 3300
POOL = "volumes"
USER = "nahtlos"
GRACE = 4
"""Seconds of silence after which an OSD is taken for dead: what a write waits for at most when one is."""
UP_WITHIN = 30.0
COMMAND_WITHIN = 20.0


def missing_programs() -> tuple[str, ...]:
    return tuple(name for name in PROGRAMS if shutil.which(name) is None)


def way(configuration: Path) -> CephSettings:
    """By which a host reaches such a cluster, which may come later than it."""
    return CephSettings(configuration=configuration, user=USER, pool=POOL)


class CephCluster:
    """Use it as a context, or call `start` and `close`."""

    def __init__(
        self, namespace: str, *, address: str = ADDRESS, osds: int = 2, memory: Path = Path("/dev/shm")
    ) -> None:
        self._namespace = namespace
        self._address = address
        self._osds = osds
        self._memory = memory
        self._folder: Path | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "the cluster was not started"
        return self._folder

    @property
    def configuration(self) -> Path:
        return self.folder / "ceph.conf"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nlt-ceph-", dir=self._memory))
        cluster = str(uuid.uuid4())
        self.configuration.write_text(_configuration(self.folder, cluster, self._address, self._osds))
        self._make_keys()
        self._start_monitor(cluster)
        for number in range(self._osds):
            self._make_osd(number)
        for number in range(self._osds):
            self.start_osd(number)
        self._make_pool()

    def close(self) -> None:
        """Everything by its pid; what was stored is gone."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    # --- faults ---

    def kill_osd(self, number: int) -> None:
        """By SIGKILL, and not to come back by itself. What it kept in memory is gone."""
        daemon = self._daemons.pop(f"osd.{number}")
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def return_osd(self, number: int) -> None:
        """Empty, as a new disk would be."""
        shutil.rmtree(self.folder / f"osd.{number}")
        self._make_osd(number, known=(self.folder / f"osd.{number}.uuid").read_text())
        self.start_osd(number)

    # --- asking it ---

    def run(self, *argv: str, within: float = COMMAND_WITHIN) -> str:
        """A command of Ceph's as the administrator; its output."""
        done = subprocess.run(
            self._inside(argv[0], "--conf", str(self.configuration), *argv[1:]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    # --- making it ---

    def _make_keys(self) -> None:
        keys = {
            "mon.": ("--cap", "mon", "allow *"),
            "client.admin": ("--cap", "mon", "allow *", "--cap", "osd", "allow *"),
            f"client.{USER}": ("--cap", "mon", "profile rbd", "--cap", "osd", f"profile rbd pool={POOL}"),
            **{
                f"osd.{n}": ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
                for n in range(self._osds)
            },
        }
        path = self.folder / "keyring"
        for name, rights in keys.items():
            new = () if path.exists() else ("--create-keyring",)
            _run("ceph-authtool", *new, str(path), "--gen-key", "-n", name, *rights)

    def _start_monitor(self, cluster: str) -> None:
        where, map_file = f"[v2:{self._address}:{MONITOR_PORT}/0]", str(self.folder / "monmap")
        _run(
            *("monmaptool", "--create", "--addv", "a", where, "--fsid", cluster),
            *("--enable-all-features", map_file),
        )
        (self.folder / "mon").mkdir()
        keys = str(self.folder / "keyring")
        self._once("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_file, "--keyring", keys)
        self._start("mon.a", "ceph-mon", "a")

    def _make_osd(self, number: int, known: str = "") -> None:
        identity = known or str(uuid.uuid4())
        (self.folder / f"osd.{number}").mkdir()
        (self.folder / f"osd.{number}.uuid").write_text(identity)
        self._once("ceph-osd", "--mkfs", "-i", str(number), "--osd-uuid", identity)
        self.run("ceph", "osd", "new", identity, str(number))

    def start_osd(self, number: int) -> None:
        self._start(f"osd.{number}", "ceph-osd", str(number))

    def _make_pool(self) -> None:
        self.run("ceph", "osd", "set-require-min-compat-client", "mimic")
        self.run("ceph", "osd", "pool", "create", POOL, "8")
        self.run("ceph", "osd", "pool", "application", "enable", POOL, "rbd")
        until = time.monotonic() + UP_WITHIN
        while f'"num_up_osds":{self._osds}' not in self.run("ceph", "osd", "stat", "--format", "json"):
            if time.monotonic() > until:
                raise TimeoutError(f"the OSDs are not up after {UP_WITHIN:g} s; see {self.folder}")
            time.sleep(0.05)

    def _once(self, *argv: str) -> None:
        _run(*self._inside(argv[0], "--conf", str(self.configuration), *argv[1:]))

    def _start(self, name: str, program: str, number: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                self._inside(
                    *("setpriv", "--pdeathsig", "KILL"),
                    *(program, "--conf", str(self.configuration), "-f", "-i", number),
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _inside(self, *argv: str) -> list[str]:
        """`nsenter` and `setpriv` become the program: the process started is the one that is ended."""
        return ["nsenter", f"--net=/run/netns/{self._namespace}", *argv]


def _configuration(folder: Path, cluster: str, address: str, osds: int) -> str:
    settings = {
        "fsid": cluster,
        "mon host": f"[v2:{address}:{MONITOR_PORT}/0]",
        "public addr": address,
        "keyring": folder / "keyring",
        "run dir": folder,
        "mon data": folder / "mon",
        "osd data": folder / "osd.$id",
        "log file": folder / "$name.log",
        "log to stderr": "false",
        **{f"auth {part} required": "cephx" for part in ("cluster", "service", "client")},
        "osd objectstore": "memstore",
        "memstore device bytes": 4 << 30,
        "osd crush chooseleaf type": 0,
        "osd pool default size": osds,
        "osd pool default min size": 1,
        "osd pool default pg autoscale mode": "off",
        "osd heartbeat interval": 1,
        "osd heartbeat grace": GRACE,
        "mon osd adjust heartbeat grace": "false",
        "mon osd min down reporters": 1,
        "mon osd down out interval": 0,
        "mon allow pool delete": "true",
        "paxos propose interval": 0.05,
        "paxos min wait": 0.01,
        "rbd validate pool": "false",
    }
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def _run(*argv: str) -> None:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_WITHIN,
        check=False,
        env={**os.environ, "CEPH_ARGS": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
