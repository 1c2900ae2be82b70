"""From records of volumes to what a storage daemon is told: block nodes from the file up, and exports. Pure;
the same words go onto the daemon's command line and through its monitor.

    file ── (luks) ── raw | qcow2 ── … overlays … ── fair-<volume> ── top-<volume> ── export <volume>.e<epoch>
    nbd client of `endpoint` (a proxy) ──────────────┘

Nodes are named by volume and number of the layer, so a layer on which clones rest is one node for all.
`fair-` is in a throttle group of all volumes of its kind: members of a group take turns, and the group's
limits are the host's budget. `top-` is the volume's own knob and the node to pivot at; every operation
names it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.ids import KeyId, VolumeId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.commandline import TLS_CLIENT
from nahtlos.physical.storage.record import (
    Layer,
    LayerRef,
    Mode,
    RecordMap,
    VolumeRecord,
    active_chain,
    chain,
)

NODE_NAME_LIMIT = 31
TENANTS = "tenants"
COPIES = "copies"
"""Throttle groups of the host: of volumes that are served, and of those a copy is written into."""
RECONNECT_DELAY = 30
_WRITETHROUGH = "w"

Options = dict[str, object]


class Places(msgspec.Struct, frozen=True, kw_only=True):
    volumes: Path
    keys: Path
    """On a tmpfs: a file per key (see `key_file`), there before a daemon is told of it."""

    def key_file(self, key: KeyId) -> Path:
        return self.keys / f"{key}.key"


# --- names -------------------------------------------------------------------------------------------


def node_name(prefix: str, volume: str) -> str:
    """At most 31 characters, as QEMU wants: a long name is shortened and told apart by its hash."""
    name = f"{prefix}-{volume}"
    if len(name) <= NODE_NAME_LIMIT:
        return name
    digest = hashlib.sha256(volume.encode()).hexdigest()[:8]
    return f"{name[: NODE_NAME_LIMIT - 9]}-{digest}"


def top_node(volume: VolumeId) -> str:
    return node_name("top", volume)


def fair_node(volume: VolumeId) -> str:
    return node_name("fair", volume)


def remote_node(volume: VolumeId) -> str:
    return node_name("remote", volume)


def limits_group(volume: VolumeId) -> str:
    return node_name("limits", volume)


def format_node(ref: LayerRef) -> str:
    return node_name(f"layer{ref.number}" if ref.number else "raw", ref.volume)


def file_node(ref: LayerRef) -> str:
    return node_name(f"file{ref.number or ''}", ref.volume)


def luks_node(ref: LayerRef) -> str:
    return node_name(f"luks{ref.number or ''}", ref.volume)


def secret_id(key: KeyId) -> str:
    return node_name("key", key)


# --- decisions ---------------------------------------------------------------------------------------


def writethrough(layers: Iterable[Layer]) -> bool:
    """The one place where this is decided. A qcow2 image keeps in memory where its data is; without a flush
    behind every write a daemon that is killed forgets acknowledged writes, and no later flush says so."""
    return any(layer.format is not VolumeFormat.RAW for layer in layers)


def layers_of(records: RecordMap, refs: Iterable[LayerRef]) -> tuple[Layer, ...]:
    return tuple(records[ref.volume].layer(ref.number) for ref in refs)


def served(record: VolumeRecord) -> bool:
    return record.epoch > 0 and not record.withdrawn and record.mode is not Mode.DELETING


# --- nodes -------------------------------------------------------------------------------------------


def layer_nodes(
    records: RecordMap, ref: LayerRef, places: Places, *, writable: bool, backing: str | None = None
) -> tuple[Options, ...]:
    """The nodes of one layer alone, the last one its format's. `backing`: the node under it, if any."""
    layer = records[ref.volume].layer(ref.number)
    file: Options = {
        "driver": "file",
        "node-name": file_node(ref),
        "filename": str(places.volumes / layer.file),
        "auto-read-only": True,
        "discard": "unmap",
    }
    luks = _luks(ref, layer.encryption_key)
    form: Options = {
        "driver": layer.format.value,
        "node-name": format_node(ref),
        "file": luks_node(ref) if luks else file_node(ref),
        "read-only": not writable,
        "discard": "unmap",
    }
    if layer.format is VolumeFormat.QCOW2:
        form["backing"] = backing
    return (file, *luks, form)


def _luks(ref: LayerRef, key: KeyId | None) -> tuple[Options, ...]:
    if key is None:
        return ()
    return (
        {
            "driver": "luks",
            "node-name": luks_node(ref),
            "file": file_node(ref),
            "key-secret": secret_id(key),
            "discard": "unmap",
        },
    )


def chain_nodes(
    records: RecordMap, refs: Iterable[LayerRef], places: Places, *, writable: bool
) -> tuple[Options, ...]:
    """The nodes of a chain, base first; its last layer is writable or not, the others are not."""
    found: list[Options] = []
    below: LayerRef | None = None
    refs = tuple(refs)
    for ref in refs:
        last = ref == refs[-1]
        found += layer_nodes(
            records,
            ref,
            places,
            writable=writable and last,
            backing=format_node(below) if below else None,
        )
        below = ref
    return tuple(found)


def snapshot_nodes(records: RecordMap, ref: LayerRef, places: Places) -> tuple[Options, ...]:
    """What a snapshot's layer reads as: its node is `format_node(ref)`."""
    return chain_nodes(records, chain(records, ref), places, writable=False)


def remote_nodes(volume: VolumeId, endpoint: VolumeEndpoint) -> tuple[Options, ...]:
    return (
        {
            "driver": "nbd",
            "node-name": remote_node(volume),
            "server": {
                "type": "inet",
                "host": endpoint.address,
                "port": str(endpoint.port),
                "keep-alive": True,
            },
            "export": endpoint.export,
            "tls-creds": TLS_CLIENT,
            "reconnect-delay": RECONNECT_DELAY,
            "discard": "unmap",
        },
    )


def data_nodes(records: RecordMap, volume: VolumeId, places: Places) -> tuple[Options, ...]:
    """What is under the filters: the chain of its layers, or the connection to where they are now."""
    record = records[volume]
    if record.mode is Mode.PROXY and record.endpoint is not None:
        return remote_nodes(volume, record.endpoint)
    return chain_nodes(records, active_chain(records, volume), places, writable=True)


def filter_nodes(record: VolumeRecord, data: str) -> tuple[Options, ...]:
    """Over the node `data`."""
    volume = record.volume
    return (
        _throttle(fair_node(volume), COPIES if record.mode is Mode.RECEIVING else TENANTS, data),
        _throttle(top_node(volume), limits_group(volume), fair_node(volume)),
    )


def nodes(records: RecordMap, volume: VolumeId, places: Places) -> tuple[Options, ...]:
    """Everything a volume needs, each to be added after the one before; the last one is its `top-`."""
    data = data_nodes(records, volume, places)
    return (*data, *filter_nodes(records[volume], str(data[-1]["node-name"])))


def secrets(records: RecordMap, volume: VolumeId, places: Places) -> tuple[Options, ...]:
    """Objects its nodes name, to be there before them."""
    if records[volume].mode is Mode.PROXY:
        return ()
    layers = layers_of(records, active_chain(records, volume))
    keys = sorted({layer.encryption_key for layer in layers if layer.encryption_key is not None})
    return tuple(secret(key, places) for key in keys)


def secret(key: KeyId, places: Places) -> Options:
    return {"qom-type": "secret", "id": secret_id(key), "file": str(places.key_file(key))}


def limits_object(volume: VolumeId) -> Options:
    return {"qom-type": "throttle-group", "id": limits_group(volume)}


def _throttle(name: str, group: str, file: str) -> Options:
    return {
        "driver": "throttle",
        "node-name": name,
        "throttle-group": group,
        "file": file,
        "discard": "unmap",
    }


# --- exports -----------------------------------------------------------------------------------------


class Export(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """An export of a volume as a daemon has it or shall have it; its id says all of it."""

    volume: VolumeId
    epoch: int
    writethrough: bool

    @property
    def name(self) -> str:
        return f"{self.volume}.e{self.epoch}"

    @property
    def id(self) -> str:
        return self.name + (_WRITETHROUGH if self.writethrough else "")

    @property
    def options(self) -> Options:
        return {
            "type": "nbd",
            "id": self.id,
            "name": self.name,
            "node-name": top_node(self.volume),
            "writable": True,
            "writethrough": self.writethrough,
        }


def export_of(records: RecordMap, volume: VolumeId) -> Export | None:
    """None: it is not to be served."""
    record = records[volume]
    if not served(record):
        return None
    through = record.mode is not Mode.PROXY and writethrough(
        layers_of(records, active_chain(records, volume))
    )
    return Export(volume=volume, epoch=record.epoch, writethrough=through)


def parsed_export(identity: str) -> Export | None:
    """None for an export that is not a volume's."""
    volume, separator, epoch = identity.rpartition(".e")
    through = epoch.endswith(_WRITETHROUGH)
    number = epoch.removesuffix(_WRITETHROUGH)
    if not separator or not number.isdecimal():
        return None
    return Export(volume=VolumeId(volume), epoch=int(number), writethrough=through)


# --- a whole host ------------------------------------------------------------------------------------


def everything(
    records: RecordMap, places: Places, among: Iterable[VolumeId]
) -> tuple[tuple[Options, ...], tuple[Options, ...]]:
    """Objects and nodes of those that are served, each once, in the order in which they can be made."""
    volumes = [volume for volume in among if served(records[volume])]
    objects = _once("id", (o for v in volumes for o in (*secrets(records, v, places), limits_object(v))))
    blocks = _once("node-name", (n for v in volumes for n in nodes(records, v, places)))
    return tuple(objects), tuple(blocks)


def _once(key: str, options: Iterable[Options]) -> Iterator[Options]:
    seen = set[object]()
    for each in options:
        if each[key] not in seen:
            seen.add(each[key])
            yield each
