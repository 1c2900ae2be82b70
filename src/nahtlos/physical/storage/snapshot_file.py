"""A snapshot, or an image, as one file of its own: raw or qcow2, for people to take away. Reads what does not
change; writes beside the final name and appears there when it is complete.
"""

import asyncio
import hashlib
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import SnapshotId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.ports import FileWritten, OnCopied
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.backups import Ended
from nahtlos.physical.storage.decisions import snapshot_layer
from nahtlos.physical.storage.graph import Options, Places
from nahtlos.physical.storage.images import image_tool
from nahtlos.physical.storage.record import RecordMap, chain, sync_folder

NICENESS = 10
SILENCE_SECONDS = 120.0
"""A conversion that has not come forward for so long is given up."""
ENDED_WITHIN = 10.0
PART = 4 << 20
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


async def write_snapshot(
    bundle: Bundle,
    records: RecordMap,
    snapshot: SnapshotId,
    places: Places,
    file: Path,
    form: VolumeFormat,
    on_copied: OnCopied,
) -> None:
    """Conflict if there is such a file, Refused if its folder is not there."""
    ref = snapshot_layer(records, snapshot)
    check_free(file)
    size = records[ref.volume].layer(ref.number).size
    source = nested(graph.snapshot_nodes(records, ref, places))
    layers = graph.layers_of(records, chain(records, ref))
    keys = sorted({layer.encryption_key for layer in layers if layer.encryption_key is not None})
    secrets = tuple(
        part for key in keys for part in ("--object", msgspec.json.encode(graph.secret(key, places)).decode())
    )
    await _write(bundle, (*secrets, "-O", form.value, _said(source)), file, on_copied)
    on_copied(size, size)


async def write_image(
    bundle: Bundle, image: Path, file: Path, form: VolumeFormat, on_copied: OnCopied
) -> None:
    """`image` is raw and this cloud's own."""
    check_free(file)
    await _write(bundle, ("-f", "raw", "-O", form.value, str(image)), file, on_copied)


async def write_node(
    bundle: Bundle, node: Options, file: Path, form: VolumeFormat, on_copied: OnCopied
) -> None:
    """What a block node that rests on no other one reads as."""
    check_free(file)
    await _write(bundle, ("-O", form.value, _said(nested((node,)))), file, on_copied)


def check_free(file: Path) -> None:
    """Conflict if there is such a file, Refused if its folder is not there."""
    if not file.is_absolute() or not file.parent.is_dir():
        raise Refused(
            f"there is no folder {file.parent}",
            field="file",
            remedy="name a whole path in a folder of this host",
        )
    if file.exists():
        raise Conflict(f"{file} is there already", field="file", remedy="choose another name")


async def _write(bundle: Bundle, what: tuple[str, ...], file: Path, on_copied: OnCopied) -> None:
    """What an interrupted attempt has left is taken away."""
    unfinished = file.with_name(f".unfinished-{file.name}")
    unfinished.unlink(missing_ok=True)
    words = (*image_tool(bundle), "convert", "-p", *what, str(unfinished))
    try:
        await _convert(words, bundle.environment, lambda part: on_copied(part, 100))
        await asyncio.to_thread(_settle, unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def file_facts(file: Path, stop: threading.Event) -> FileWritten:
    """Reads all of it; `Ended` once `stop` is set."""
    digest, length = hashlib.sha256(), 0
    with file.open("rb") as written:
        while part := written.read(PART):
            if stop.is_set():
                raise Ended
            digest.update(part)
            length += len(part)
    return FileWritten(bytes=length, sha256=digest.hexdigest())


def nested(nodes: tuple[Options, ...]) -> Options:
    """The last of these nodes with those it names inside it, as a program wants it that knows no names."""
    known = {str(node["node-name"]): node for node in nodes}

    def whole(node: Options) -> Options:
        found: Options = {}
        for name, value in node.items():
            if name in ("file", "backing") and value in known:
                found[name] = whole(known[cast("str", value)])
            elif name not in ("node-name", "read-only", "auto-read-only", "discard"):
                found[name] = value
        return found

    return whole(nodes[-1])


async def _convert(
    words: tuple[str, ...], environment: dict[str, str], on_percent: Callable[[int], None]
) -> None:
    process = await asyncio.create_subprocess_exec(
        *("nice", "-n", str(NICENESS), *words),
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                part = await process.stdout.read(4096)
            if not part:
                break
            if found := _PERCENT.findall(part):
                on_percent(int(float(found[-1])))
        async with asyncio.timeout(SILENCE_SECONDS):
            said = await process.stderr.read(4096)
            code = await process.wait()
    except TimeoutError:
        raise Unavailable(f"nothing was written for {SILENCE_SECONDS:g} s", field="file") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(TimeoutError):
                async with asyncio.timeout(ENDED_WITHIN):
                    await process.wait()
    if code:
        raise Unavailable(
            f"the file cannot be written: {said.decode(errors='replace').strip()[-300:]}", field="file"
        )


def _settle(unfinished: Path, file: Path) -> None:
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    try:
        os.link(unfinished, file)
    except FileExistsError:
        raise Conflict(f"{file} is there already", field="file", remedy="choose another name") from None
    sync_folder(file.parent)


def _said(node: Options) -> str:
    return "json:" + msgspec.json.encode(node).decode()
