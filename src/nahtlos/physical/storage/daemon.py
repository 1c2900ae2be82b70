"""How the storage daemon is run and what is said to it to serve a volume. Pure.

Everything served is also on the command line, so that a daemon the supervisor started again serves it at
once, without anybody's help: the clients' connections wait in the listening socket, which the supervisor
holds, until the exports are there.

Per volume: file -> raw -> throttle filter `top-…` (QoS knob and pivot point) -> export `<volume>.e<epoch>`.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nahtlos.model.ids import VolumeId
from nahtlos.physical.hypervisor.commandline import hosts_only_object, object_argument, tls_object

SOCKET_FD = "nbd"
UNIT = "qsd"
TLS = "tls-server"
HOSTS_ONLY = "hosts-only"
NODE_NAME_LIMIT = 31

Options = dict[str, object]


class Served(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A volume as it is (to be) served."""

    volume: VolumeId
    epoch: int
    file: str

    @property
    def export(self) -> str:
        return f"{self.volume}.e{self.epoch}"


def parse_export(name: str) -> tuple[VolumeId, int] | None:
    volume, separator, epoch = name.rpartition(".e")
    return (VolumeId(volume), int(epoch)) if separator and epoch.isdecimal() else None


def node_name(prefix: str, volume: VolumeId) -> str:
    """At most 31 characters, as QEMU wants: a long name is shortened and told apart by its hash."""
    name = f"{prefix}-{volume}"
    if len(name) <= NODE_NAME_LIMIT:
        return name
    digest = hashlib.sha256(volume.encode()).hexdigest()[:8]
    return f"{name[: NODE_NAME_LIMIT - 9]}-{digest}"


def nodes(served: Served) -> tuple[Options, ...]:
    """Block nodes from the file up, each to be added after the one before."""
    volume = served.volume
    file, raw, top = (node_name(prefix, volume) for prefix in ("file", "raw", "top"))
    return (
        {"driver": "file", "node-name": file, "filename": served.file, "discard": "unmap"},
        {"driver": "raw", "node-name": raw, "file": file, "discard": "unmap"},
        {
            "driver": "throttle",
            "node-name": top,
            "throttle-group": throttle_group(volume),
            "file": raw,
            "discard": "unmap",
        },
    )


def throttle_group(volume: VolumeId) -> str:
    return node_name("limits", volume)


def export(served: Served) -> Options:
    return {
        "type": "nbd",
        "id": served.export,
        "name": served.export,
        "node-name": node_name("top", served.volume),
        "writable": True,
    }


def arguments(qmp: Path, pki_dir: Path, served: Iterable[Served]) -> tuple[str, ...]:
    """To follow `Bundle.storage_daemon()`. Clients prove by certificate that they are hosts."""
    return (
        *("--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
        *_server(pki_dir),
        *(part for volume in sorted(served) for part in _volume(volume)),
    )


def _server(pki_dir: Path) -> tuple[str, ...]:
    listening = f"addr.type=fd,addr.str={{fd:{SOCKET_FD}}},max-connections=0"
    return (
        *_long(tls_object(TLS, "server", pki_dir)),
        *_long(hosts_only_object(HOSTS_ONLY)),
        *("--nbd-server", f"{listening},tls-creds={TLS},tls-authz={HOSTS_ONLY}"),
    )


def _volume(served: Served) -> tuple[str, ...]:
    blockdevs = (part for node in nodes(served) for part in ("--blockdev", _json(node)))
    group = _long(object_argument("throttle-group", throttle_group(served.volume)))
    return (*group, *blockdevs, "--export", _json(export(served)))


def _long(arguments: tuple[str, str]) -> tuple[str, str]:
    """The storage daemon knows long options only."""
    option, value = arguments
    return f"-{option}", value


def _json(value: Options) -> str:
    return msgspec.json.encode(value).decode()
