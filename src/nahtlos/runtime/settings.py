"""What an orchestrator is started with: a JSON file of this shape, readable by root only."""

from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, NetworkId
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import Size


class CloudSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a new cloud begins with. Of an existing one, networks and uplinks are taken up anew at every
    start; the rest is then the operators' to change."""

    networks: tuple[NetworkSpec, ...] = ()
    uplinks: dict[NetworkId, str] = {}
    """Interface of the way out of each network, at its gateway host."""
    external: dict[HostId, str] = {}
    """Interface to the outside of edge hosts, for the gateways of routers. A host that is not named uses
    that of an uplink it holds."""
    promised: Size = Size()
    parallel_moves: int = 1
    parallel_moves_per_host: int = 4
    """From one host, and to one."""


class OrchestratorSettings(msgspec.Struct, frozen=True, kw_only=True):
    state_dir: Path
    """The database, and who the operators are."""
    releases_dir: Path
    images_dir: Path
    pki_dir: Path
    """Its own certificate and key, and the authority's certificate."""
    ca_dir: Path
    """The authority's key: what lets hosts join."""
    cloud: CloudSettings = CloudSettings()

    @property
    def database(self) -> Path:
        return self.state_dir / "runtime.sqlite"

    @property
    def lock(self) -> Path:
        return self.state_dir / "orchestrator.lock"

    @property
    def operators(self) -> Path:
        return self.state_dir / "operators.json"


def load_settings(path: Path) -> OrchestratorSettings:
    try:
        return msgspec.json.decode(path.read_bytes(), type=OrchestratorSettings, dec_hook=_path_of)
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}", field=str(path)) from error
    except msgspec.DecodeError as error:
        raise Refused(f"not a settings file: {error}", field=str(path), remedy="correct the field") from error


def encode_settings(settings: OrchestratorSettings) -> bytes:
    return msgspec.json.encode(settings, enc_hook=str)


def _path_of(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise NotImplementedError(f"{kind} in settings")
    return Path(value)
