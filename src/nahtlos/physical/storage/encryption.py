"""Encryption at rest: the keys of this host's volumes where its storage daemon finds them, and LUKS
containers.

Keys come from the keyring and are kept in `folder`, on a tmpfs and for root only, so that a daemon that is
started again serves at once and nothing is left of them when the host is switched off. Never writes a key
anywhere else, and never says one.

Every layer of an encrypted volume is a LUKS container with a qcow2 image in it. What was never written in a
container reads as chance, and differs from copy to copy; the image inside knows what is a hole. So a blank
volume reads as zeros, copies can be compared, and nothing is stored for what was never written.
"""

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import KeyId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.ports import Keyring
from nahtlos.physical.storage.images import image_tool
from nahtlos.physical.storage.record import sync_folder
from nahtlos.wire.credentials import write_file

SUFFIX = ".key"
LAYER_FORMAT = VolumeFormat.QCOW2
"""Whatever was asked for: see above."""
ITERATION_MS = 10
"""A key of 256 bits of chance needs no slow derivation; it would only hold up a daemon that starts."""
MAKE_SECONDS = 60.0
FILL_SECONDS = 3600.0


class HostKeys:
    """`keyring` None: this host can be given no keys."""

    def __init__(self, folder: Path, keyring: Keyring | None) -> None:
        self._folder = folder
        self._keyring = keyring

    def path(self, key: KeyId) -> Path:
        return self._folder / f"{key}{SUFFIX}"

    def missing(self, keys: Iterable[KeyId]) -> tuple[KeyId, ...]:
        return tuple(sorted({key for key in keys if not self.path(key).is_file()}))

    async def ensure(self, keys: Iterable[KeyId]) -> dict[KeyId, str]:
        """Have them here; what could not be had, and why."""
        problems: dict[KeyId, str] = {}
        for key in self.missing(keys):
            try:
                await self._fetch(key)
            except Error as error:
                problems[key] = f"the key '{key}' is not on this host: {error}"
        return problems

    def keep_only(self, keys: Iterable[KeyId]) -> None:
        """Forget the keys of volumes that are not here any more."""
        kept = {self.path(key).name for key in keys}
        for path in self._folder.glob(f"*{SUFFIX}"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    async def _fetch(self, key: KeyId) -> None:
        if self._keyring is None:
            raise Unavailable("this host has no keyring", field="key")
        secret = await self._keyring.key(key)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.chmod(0o700)
        write_file(self.path(key), secret.hex().encode(), mode=0o600)  # QEMU wants a passphrase in UTF-8


async def make_layer(bundle: Bundle, layer: Path, size: int, key: Path, *, image: Path | None = None) -> None:
    """A new layer of `size` bytes at `layer`, blank or beginning with a raw image. Whole or not at all."""
    new, blank = (layer.with_name(f".{layer.name}.{part}") for part in ("new", "blank"))
    secret = ("--object", f"secret,id=k,file={key}")
    form = ("-f", "raw", "-O", "luks", "-o", f"key-secret=k,iter-time={ITERATION_MS}")
    try:
        layer.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new.unlink(missing_ok=True)
        await _run(bundle, ("create", "-q", "-f", LAYER_FORMAT, str(blank), str(size)))
        blank.chmod(0o600)
        await _run(bundle, ("convert", *secret, *form, str(blank), str(new)))
        new.chmod(0o600)
        if image is not None:
            await _run(
                bundle,
                (
                    *("convert", "-n", *secret, "-f", "raw", "-O", LAYER_FORMAT),
                    *(_said(_raw(image)), _said(contents(new))),
                ),
                within=FILL_SECONDS,
            )
        await asyncio.to_thread(_settle, new, layer)
    finally:
        blank.unlink(missing_ok=True)
        new.unlink(missing_ok=True)


async def make_container(bundle: Bundle, path: Path, size: int, key: Path) -> None:
    """An empty container of `size` bytes, for a while. What was never written in it reads as chance."""
    secret = ("--object", f"secret,id=k,file={key}", "-o", f"key-secret=k,iter-time={ITERATION_MS}")
    path.unlink(missing_ok=True)
    await _run(bundle, ("create", "-q", "-f", "luks", *secret, str(path), str(size)))
    path.chmod(0o600)


def contents(layer: Path) -> dict[str, object]:
    """What is in a layer, as a block node whose secret is `k`."""
    file = {"driver": "file", "filename": str(layer)}
    return {
        "driver": LAYER_FORMAT.value,
        "backing": None,
        "file": {"driver": "luks", "key-secret": "k", "file": file},
    }


def _raw(image: Path) -> dict[str, object]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(image)}}


def _said(node: dict[str, object]) -> str:
    return "json:" + msgspec.json.encode(node).decode()


def _settle(new: Path, layer: Path) -> None:
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(layer)
    sync_folder(layer.parent)


async def _run(bundle: Bundle, arguments: tuple[str, ...], *, within: float = MAKE_SECONDS) -> None:
    """Only on files of our own; what comes from outside is read by `images` alone."""
    process = await asyncio.create_subprocess_exec(
        *image_tool(bundle),
        *arguments,
        env=bundle.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(within):
            _, said = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"an encrypted layer was not made within {within:g} s", field="volume") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise Unavailable(
            f"an encrypted layer cannot be made: {said.decode(errors='replace').strip()[-300:]}",
            field="volume",
        )
