"""A volume as it is at one moment, readable while it is written, and what has changed since an earlier one.

    top ── past (copy-before-write) ── fair ── …          export `<volume>.past.<name>`: the moment
                 `── what was overwritten since

What a guest overwrites is first copied aside, into a file of this host; a reader, however slow, never holds a
guest up, and if what is aside cannot be written the moment is lost, not the guest's write. A bitmap on
`top-` begins with every moment that is to be a base of later ones. It is in the daemon's memory: a daemon
that ended has none, and whoever wants changes since a moment it does not know is told so.

Order matters: the new bitmap begins before the moment and the old one is read after it, so both say rather
too much than too little. Every step is looked at before it is done: `open_point` and `close_point` can be
repeated, by an agent that was started a moment ago, too.
"""

import hashlib
import os
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.ids import KeyId, VolumeId
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.daemon import Daemon
from nahtlos.physical.storage.graph import Options

GRANULARITY = 65536
BITMAPS_KEPT = 4
"""Moments of one volume whose changes are followed at the same time."""
GIVE_UP_SECONDS = 10
"""The longest a guest's write waits for what is copied aside; then the moment is lost."""
_BITMAP = "since-"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A moment that can be read."""

    export: str
    changes: str | None
    """The NBD context that says what has changed since the earlier moment; None: that is not known."""
    why: str = ""
    """… because of this."""


class Aside(msgspec.Struct, frozen=True, kw_only=True):
    """Where what is overwritten is copied to. It is as secret as the volume: its nodes end in a container if
    the volume's do."""

    path: Path
    nodes: tuple[Options, ...]

    @property
    def node(self) -> str:
        return str(self.nodes[-1]["node-name"])


def bitmap_name(moment: str, at: float) -> str:
    """Names sort by time."""
    return f"{_BITMAP}{int(at):012d}-{hashlib.sha256(moment.encode()).hexdigest()[:16]}"


def export_name(volume: VolumeId, moment: str) -> str:
    return f"{volume}.past.{moment}"


def aside_nodes(volume: VolumeId, path: Path, key: KeyId | None) -> tuple[Options, ...]:
    file: Options = {
        "driver": "file",
        "node-name": graph.node_name("asidefile", volume),
        "filename": str(path),
        "discard": "unmap",
    }
    last: Options = {
        "driver": "luks" if key else "raw",
        "node-name": graph.node_name("aside", volume),
        "file": file["node-name"],
        "discard": "unmap",
    }
    return (file, {**last, "key-secret": graph.secret_id(key)} if key else last)


class Points:
    """The moments of one host's volumes, one per volume at a time."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def open_point(
        self, volume: VolumeId, moment: str, aside: Aside, *, since: str | None, follow: float | None
    ) -> Point:
        """`since`: the earlier moment changes are wanted from. `follow`: its time, if changes are to be
        followed from this moment on. An open one of this name is given again as it is; otherwise no other is
        open, and the file aside is there."""
        name = export_name(volume, moment)
        exported = await self.open_ones()
        if name in exported:
            return await self._given_again(volume, name, since)
        if follow is not None:
            await self._follow(volume, bitmap_name(moment, follow))
        known = await self._bitmap_of(volume, since) if since else None
        for node in (*aside.nodes, self._filter(volume, aside)):
            await self._daemon.execute("blockdev-add", node)
        await self._pivot(volume, self._past(volume))
        view = {"driver": "snapshot-access", "node-name": self._view(volume), "file": self._past(volume)}
        await self._daemon.execute("blockdev-add", view)
        if known is not None:
            await self._freeze(volume, known)
        await self._daemon.execute("block-export-add", self._export(volume, name, known))
        return self._point(name, known, since)

    async def close_point(self, volume: VolumeId, aside: Aside) -> None:
        """Whatever moment of it is open."""
        for identity in await self.open_ones():
            if identity.startswith(export_name(volume, "")):
                await self._daemon.withdraw(identity)
        nodes = (await self._daemon.graph()).nodes
        if self._view(volume) in nodes:
            await self._daemon.execute("blockdev-del", {"node-name": self._view(volume)})
        if self._past(volume) in nodes:
            await self._pivot(volume, graph.fair_node(volume))
            await self._daemon.execute("blockdev-del", {"node-name": self._past(volume)})
        for node in reversed(aside.nodes):
            if node["node-name"] in nodes:
                await self._daemon.execute("blockdev-del", {"node-name": node["node-name"]})
        aside.path.unlink(missing_ok=True)

    async def unfollow(self, volume: VolumeId, moment: str) -> None:
        """Changes since then are of no more use."""
        for bitmap in await self._bitmaps(volume):
            if bitmap.endswith(bitmap_name(moment, 0)[-16:]):
                await self._remove(volume, bitmap)

    async def unfollow_all(self, volume: VolumeId) -> None:
        """The volume has become another without its writes having been seen: it was reverted."""
        for bitmap in await self._bitmaps(volume):
            await self._remove(volume, bitmap)

    # --- nodes -------------------------------------------------------------------------------------

    def _past(self, volume: VolumeId) -> str:
        return graph.node_name("past", volume)

    def _view(self, volume: VolumeId) -> str:
        return graph.node_name("view", volume)

    def _filter(self, volume: VolumeId, aside: Aside) -> Options:
        return {
            "driver": "copy-before-write",
            "node-name": self._past(volume),
            "file": graph.fair_node(volume),
            "target": aside.node,
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": GIVE_UP_SECONDS,
            "discard": "unmap",
        }

    async def _pivot(self, volume: VolumeId, child: str) -> None:
        top = {
            "driver": "throttle",
            "node-name": graph.top_node(volume),
            "throttle-group": graph.limits_group(volume),
            "file": child,
            "discard": "unmap",
        }
        await self._daemon.execute("blockdev-reopen", {"options": [top]})

    def _export(self, volume: VolumeId, name: str, changes: str | None) -> Options:
        view = self._view(volume)
        bitmaps = [{"node": view, "name": changes}] if changes else []
        return {
            "type": "nbd",
            "id": name,
            "name": name,
            "node-name": view,
            "writable": False,
            "bitmaps": bitmaps,
            "allocation-depth": False,
        }

    # --- bitmaps -----------------------------------------------------------------------------------

    async def _follow(self, volume: VolumeId, name: str) -> None:
        known = await self._bitmaps(volume)
        for old in sorted(known - {name})[: max(0, len(known - {name}) + 1 - BITMAPS_KEPT)]:
            await self._remove(volume, old)
        if name not in known:
            top = {"node": graph.top_node(volume), "name": name, "granularity": GRANULARITY}
            await self._daemon.execute("block-dirty-bitmap-add", top)

    async def _bitmap_of(self, volume: VolumeId, moment: str) -> str | None:
        end = bitmap_name(moment, 0)[-16:]
        return next((name for name in await self._bitmaps(volume) if name.endswith(end)), None)

    async def _freeze(self, volume: VolumeId, bitmap: str) -> None:
        """A copy that changes no more, on the node that is read."""
        view = self._view(volume)
        await self._daemon.execute(
            "block-dirty-bitmap-add",
            {"node": view, "name": bitmap, "granularity": GRANULARITY, "disabled": True},
        )
        source = {"node": graph.top_node(volume), "name": bitmap}
        await self._daemon.execute(
            "block-dirty-bitmap-merge", {"node": view, "target": bitmap, "bitmaps": [source]}
        )

    async def _remove(self, volume: VolumeId, bitmap: str) -> None:
        await self._daemon.execute(
            "block-dirty-bitmap-remove", {"node": graph.top_node(volume), "name": bitmap}
        )

    async def _bitmaps(self, volume: VolumeId) -> set[str]:
        """Whole ones that follow changes now."""
        return await self._bitmaps_on(graph.top_node(volume))

    async def _bitmaps_on(self, node: str) -> set[str]:
        about = (await self._daemon.images()).get(node, {})
        found = cast("list[dict[str, object]]", about.get("dirty-bitmaps", []))
        return {
            str(bitmap["name"])
            for bitmap in found
            if str(bitmap.get("name", "")).startswith(_BITMAP) and not bitmap.get("inconsistent")
        }

    # --- looking -----------------------------------------------------------------------------------

    async def _given_again(self, volume: VolumeId, name: str, since: str | None) -> Point:
        on_view = await self._bitmaps_on(self._view(volume))
        return self._point(name, next(iter(on_view), None), since)

    def _point(self, export: str, changes: str | None, since: str | None) -> Point:
        if changes is not None:
            return Point(export=export, changes=f"qemu:dirty-bitmap:{changes}")
        why = (
            f"what changed since {since} is not known: the storage daemon was started anew since, or its copy"
        )
        return Point(export=export, changes=None, why=f"{why} is elsewhere now" if since else "")

    async def open_ones(self) -> set[str]:
        """Every export of the daemon, those of moments among them."""
        answer = await self._daemon.execute("query-block-exports")
        return {str(each["id"]) for each in cast("list[dict[str, object]]", answer["value"])}


def make_aside(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
