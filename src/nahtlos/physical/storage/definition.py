"""How a host's storage daemon is run. Pure.

Everything that is served is on the command line, so that a daemon the supervisor started again serves it at
once, without anybody's help: the clients' connections wait in the listening socket, which the supervisor
holds, until the exports are there. A volume that could not be opened would keep the daemon from starting:
such ones are left out by name.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import DiskBudget, DiskLimits
from nahtlos.physical.hypervisor.commandline import (
    TLS_CLIENT,
    TLS_SERVER,
    hosts_only_object,
    tls_object,
)
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.graph import Options, Places
from nahtlos.physical.storage.record import RecordMap

SOCKET_FD = "nbd"
UNIT = "qsd"
HOSTS_ONLY = "hosts-only"


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon is to have from its start on."""

    objects: tuple[Options, ...] = ()
    nodes: tuple[Options, ...] = ()
    exports: tuple[Options, ...] = ()


def definition(
    records: RecordMap, places: Places, budget: DiskBudget, left_out: Collection[VolumeId] = ()
) -> Definition:
    shown = {volume: record for volume, record in records.items() if not _rests_on(records, volume, left_out)}
    objects, nodes = graph.everything(records, places, sorted(shown))
    exports = (graph.export_of(records, volume) for volume in sorted(shown))
    return Definition(
        objects=(*groups(budget), *objects),
        nodes=nodes,
        exports=tuple(export.options for export in exports if export is not None),
    )


def _rests_on(records: RecordMap, volume: VolumeId, left_out: Collection[VolumeId]) -> bool:
    return volume in left_out or any(ref.volume in left_out for ref in graph.active_chain(records, volume))


def groups(budget: DiskBudget) -> tuple[Options, ...]:
    """The throttle groups of the host; see `graph`."""
    return (
        {"qom-type": "throttle-group", "id": graph.TENANTS, "limits": limits(budget.tenants)},
        {"qom-type": "throttle-group", "id": graph.COPIES, "limits": limits(budget.copies)},
    )


def limits(wanted: DiskLimits) -> Options:
    """All fields, because one that is not named keeps its value."""
    rates = {
        "iops-total": wanted.iops,
        "iops-read": wanted.iops_read,
        "iops-write": wanted.iops_write,
        "bps-total": wanted.bytes,
        "bps-read": wanted.bytes_read,
        "bps-write": wanted.bytes_write,
    }
    bursts = {
        "iops-total-max": wanted.iops_burst,
        "iops-total-max-length": wanted.burst_seconds if wanted.iops_burst else 1,
        "bps-total-max": wanted.bytes_burst,
        "bps-total-max-length": wanted.burst_seconds if wanted.bytes_burst else 1,
    }
    return {**rates, **bursts}


def arguments(qmp: Path, pki_dir: Path, wanted: Definition) -> tuple[str, ...]:
    """To follow `Bundle.storage_daemon()`. Clients prove by certificate that they are hosts."""
    listening = f"addr.type=fd,addr.str={{fd:{SOCKET_FD}}},max-connections=0"
    return (
        *_monitor(qmp),
        *_credentials(pki_dir),
        *("--nbd-server", f"{listening},tls-creds={TLS_SERVER},tls-authz={HOSTS_ONLY}"),
        *_said("--object", wanted.objects),
        *_said("--blockdev", wanted.nodes),
        *_said("--export", wanted.exports),
    )


def trial_arguments(qmp: Path, pki_dir: Path) -> tuple[str, ...]:
    """A daemon that serves nothing: whether a release runs here at all."""
    return (*_monitor(qmp), *_credentials(pki_dir))


def _monitor(qmp: Path) -> tuple[str, ...]:
    return ("--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "--monitor", "chardev=qmp")


def _credentials(pki_dir: Path) -> tuple[str, ...]:
    return (
        *_long(tls_object(TLS_SERVER, "server", pki_dir)),
        *_long(tls_object(TLS_CLIENT, "client", pki_dir)),
        *_long(hosts_only_object(HOSTS_ONLY)),
    )


def _said(option: str, values: Iterable[Options]) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, msgspec.json.encode(value).decode()))


def _long(arguments: tuple[str, str]) -> tuple[str, str]:
    """The storage daemon knows long options only."""
    option, value = arguments
    return f"-{option}", value
