"""What an agent is started with: a JSON file of this shape, readable by root only."""

from pathlib import Path

import msgspec

from nahtlos.model.ids import HostId
from nahtlos.model.nouns import HostRole, Size

MIGRATION_PORTS = (49152, 49215)
"""First and last TCP port at which streams of servers are received, on the underlay address."""
CEPH_NBD_PORT = 10810


class CephSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How this host reaches a Ceph cluster. The user's key is where the cluster's configuration says."""

    configuration: Path
    user: str
    """Without "client."."""
    pool: str
    nbd_port: int = CEPH_NBD_PORT
    """Where images are served that must be reached without Ceph: relocation."""


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    host: HostId
    role: HostRole
    address: str
    """Underlay address: tunnels, volumes, moves, other agents."""
    peer_port: int
    orchestrator_address: str
    orchestrator_port: int
    state_dir: Path
    """Ledger, volumes, console logs. Survives a restart of the host."""
    run_dir: Path
    """Sockets. Short, as socket paths are limited to 107 bytes."""
    ram_dir: Path
    """On a tmpfs: RAM files of servers."""
    releases_dir: Path
    images_dir: Path
    """`<image>.raw`"""
    cache_dir: Path
    """Remembered results of accelerator probes."""
    pki_dir: Path
    """`ca.pem`, `cert.pem`, `key.pem`; also as QEMU wants them: `ca-cert.pem`, `server-cert.pem`, …"""
    supervisor_socket: Path
    underlay_interface: str = "eth0"
    capacity: Size
    nbd_port: int = 10809
    domain: str = ""
    """What fails together with this host (a rack, a power feed), told when it joins. Empty: nothing, or as
    operators have set it."""
    ceph: CephSettings | None = None
    """None: this host has no Ceph volumes."""


def load_settings(path: Path) -> AgentSettings:
    return msgspec.json.decode(path.read_bytes(), type=AgentSettings, dec_hook=_path_of)


def encode_settings(settings: AgentSettings) -> bytes:
    return msgspec.json.encode(settings, enc_hook=str)


def _path_of(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise NotImplementedError(f"{kind} in settings")
    return Path(value)
