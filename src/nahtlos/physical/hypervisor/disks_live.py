"""Changing the disks of a VMM that runs. What its disks shall be is decided in `disks`; this looks at the
VMM's block graph, says the commands, and looks again. Nothing is remembered between two calls.

    other copies    fresh connections to all of them (and a quorum over them) beside the old ones; one reopen
    of
                    the root leads to them; the old ones go. Never a moment at which a write counts with fewer
    enlarged        the same with connections that know the new size, then the guest is told attached
    nodes from below, then the device; detached: the device, once the guest has let go, then nodes

What an interrupted call has left is found by its name and taken away by the next one.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import cast

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Unavailable
from nahtlos.physical.hypervisor import disks
from nahtlos.physical.hypervisor.connections import Address, answers
from nahtlos.physical.hypervisor.disks import Disk, Edge, Graph
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.hypervisor.vmm import Vmm

DETACHED_WITHIN = 15.0
LETS_GO_WITHIN = 5.0
OPENED_WITHIN = disks.OPEN_SECONDS + 5.0
CONNECT_WITHIN = 0.3
"""A host that answers does so in well under a millisecond."""
GREET_WITHIN = 2.0
"""A daemon that is started again, or replaced, greets within a fraction of a second."""
MIB = 1 << 20


async def graph_of(vmm: Vmm) -> Graph:
    async with asyncio.TaskGroup() as asked:
        named = asked.create_task(vmm.execute("query-named-block-nodes", {"flat": True}))
        devices = asked.create_task(vmm.execute("query-block"))
        edged = asked.create_task(vmm.execute("x-debug-query-block-graph"))
        objects = asked.create_task(vmm.execute("qom-list", {"path": "/objects"}))
    raw = edged.result()
    names = {n["id"]: str(n["name"]) for n in cast("list[dict[str, object]]", raw["nodes"])}
    edges: dict[str, list[Edge]] = {}
    for edge in cast("list[dict[str, object]]", raw["edges"]):
        edges.setdefault(names[edge["parent"]], []).append(Edge(str(edge["name"]), names[edge["child"]]))
    return Graph(
        sizes={
            str(n["node-name"]): int(cast("dict[str, int]", n["image"])["virtual-size"])
            for n in _list(named.result())
        },
        edges={parent: tuple(found) for parent, found in edges.items()},
        devices=dict(d for block in _list(devices.result()) if (d := _device(block)) is not None),
        groups=frozenset(
            str(o["name"]) for o in _list(objects.result()) if o["type"] == "child<throttle-group>"
        ),
    )


def io_status(blocks: list[dict[str, object]]) -> dict[str, str]:
    """Root of a disk -> `ok`, `nospace` or `failed`."""
    found: dict[str, str] = {}
    for block in blocks:
        inserted = cast("Mapping[str, object]", block.get("inserted", {}))
        found[str(inserted.get("node-name", ""))] = str(block.get("io-status", "ok"))
    return found


async def statuses(vmm: Vmm) -> dict[str, str]:
    return io_status(_list(await vmm.execute("query-block")))


def _device(block: dict[str, object]) -> tuple[str, str] | None:
    inserted = cast("Mapping[str, object]", block.get("inserted", {}))
    parts = str(block.get("qdev", "")).split("/")  # /machine/peripheral/NAME/virtio-backend
    if "peripheral" not in parts or "node-name" not in inserted:
        return None
    return parts[parts.index("peripheral") + 1], str(inserted["node-name"])


def _list(answer: Mapping[str, object]) -> list[dict[str, object]]:
    return cast("list[dict[str, object]]", answer["value"])


class LiveDisks:
    """One pass over the disks of one VMM."""

    def __init__(self, vmm: Vmm, server: ServerConfig) -> None:
        self._vmm = vmm
        self._server = server
        self._wanted = disks.disks_of(server)
        self._done: list[str] = []
        self._regrouped = False
        """Which group a root is in is not told by the VMM: where it may have changed, all are told again."""

    async def reconcile(self) -> tuple[str, ...]:
        graph = await graph_of(self._vmm)
        await self._detach_unwanted(graph)
        await self._limits(graph)
        for disk in self._wanted:
            await self._bring(disk, await graph_of(self._vmm))
        await self._clear_away()
        return tuple(self._done)

    async def connect_anew(self, roots: frozenset[str]) -> tuple[str, ...]:
        """Only that, for a guest that stands still and waits for it: these are known to fail, so nothing is
        tried by them once more. What is left behind, or has grown, the next `reconcile` sees to."""
        for disk in self._wanted:
            if disk.root in roots:
                await self._abandon(disk, await graph_of(self._vmm))
                self._done.append(f"{disk.volume} is reached by {len(disk.keys)} copies")
        return tuple(self._done)

    async def _abandon(self, disk: Disk, graph: Graph) -> None:
        top = await self._connect(disk, graph.free_number())
        way = disks.way_of(graph, disk.root)
        if way is not None and way.threshold is not None:
            await self._empty(disk, way, graph)
        await self._reopen(disk, top)

    async def is_whole(self) -> bool:
        """No change was interrupted that a guest must not run with."""
        graph = await graph_of(self._vmm)
        ways = ((disk, disks.way_of(graph, disk.root)) for disk in self._wanted)
        return all(way is not None and disks.reaches(way, disk.keys) for disk, way in ways)

    async def settled(self) -> bool:
        """A root that is opened anew as it is first waits until all its requests have ended, and flushes. One
        that fails stops the guest.

        A flush fails, too, where a connection ended of which nobody asked anything since: a copy's daemon
        ends it when it serves the volume otherwise, as behind its first snapshot. That costs nothing that was
        acknowledged, and fresh ones are flushed instead."""
        graph = await graph_of(self._vmm)
        for disk in self._wanted:
            way = disks.way_of(graph, disk.root)
            if way is None or not disks.reaches(way, disk.keys):
                return False
            if way.threshold is not None:
                await self._flush(disk, way.top)
        return await self._vmm.state() == "running" and await self.is_whole()

    async def _flush(self, disk: Disk, top: str) -> None:
        try:
            await self._reopen(disk, top)
        except Denied:
            if await self._vmm.state() != "running":
                raise
            await self._lead(disk, await graph_of(self._vmm))
            await self._clear_away()
            way = disks.way_of(await graph_of(self._vmm), disk.root)
            if way is not None:
                await self._reopen(disk, way.top)

    async def _say(self, command: str, within: float = 5.0, /, **arguments: object) -> dict[str, object]:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._vmm.execute(command, named, within=within)

    # --- limits ---

    async def _limits(self, graph: Graph) -> None:
        wanted = disks.limits_of(self._server)
        shared = any(disk.attachment.limits_group for disk in self._wanted)
        self._regrouped = shared or not graph.groups <= wanted.keys()
        for group, limits in wanted.items():
            if group not in graph.groups:
                await self._say("object-add", qom_type="throttle-group", id=group, limits=limits)
                self._regrouped = True
                continue
            path = f"/objects/{group}"
            held = await self._say("qom-get", path=path, property="limits")
            if any(held.get(name, 0) != value for name, value in limits.items()):
                await self._say("qom-set", path=path, property="limits", value=limits)
                self._done.append(f"limits {group}")

    # --- one disk ---

    async def _bring(self, disk: Disk, graph: Graph) -> None:
        way = disks.way_of(graph, disk.root)
        if way is None:
            await self._add_root(disk, graph)
        elif not disks.reaches(way, disk.keys) or self._outgrown(disk, graph, way.top):
            await self._lead(disk, graph)
            self._done.append(f"{disk.volume} is reached by {len(disk.keys)} copies")
        elif self._regrouped:
            await self._reopen(disk, way.top)
        if disk.device not in graph.devices:
            await self._say("device_add", **disks.device(disk))
            self._done.append(f"{disk.volume} attached")

    def _outgrown(self, disk: Disk, graph: Graph, top: str) -> bool:
        wanted = disk.attachment.size_mib * MIB
        return wanted > min(graph.sizes.get(disk.root, wanted), graph.sizes.get(top, wanted))

    async def _add_root(self, disk: Disk, graph: Graph) -> None:
        child = await self._connect(disk, graph.free_number())
        await self._say("blockdev-add", **disks.root(disk, child))

    async def _connect(self, disk: Disk, number: int) -> str:
        """Fresh connections to all copies; the node a root has them by. Never asked of a daemon that does not
        answer: the VMM's monitor would wait for it."""
        if disk.attachment.rbd is None:
            await self._check_doors(disk)
        nodes, last = disks.connections(disk, number)
        for node in nodes:
            try:
                await self._say("blockdev-add", OPENED_WITHIN, **node)
            except Denied as denied:
                if "not available" in denied.message:
                    self._vmm.refused_keys.add(disks.key_in(str(node["node-name"])) or "")
                raise
        return last

    async def _check_doors(self, disk: Disk) -> None:
        closed = [e for e, open_ in zip(disk.endpoints, await doors(disk), strict=True) if not open_]
        if closed:
            where = ", ".join(f"{e.host or e.address}:{e.port}" for e in closed)
            raise Unavailable(f"nobody serves {disk.volume} at {where}", field="volume")

    async def _lead(self, disk: Disk, graph: Graph) -> None:
        """The root to fresh connections."""
        top = await self._connect(disk, graph.free_number())
        fresh = (await graph_of(self._vmm)).sizes
        grown = fresh[top] > graph.sizes[disk.root]
        if grown and disks.threshold_in(top) is not None:
            await self._enlarge_standing(disk, graph, top, fresh[top])
            return
        await self._leave(disk, graph, top)
        if grown:
            await self._say("block_resize", node_name=disk.root, size=fresh[top])
            self._done.append(f"{disk.volume} has {fresh[top] // MIB} MiB")

    async def _leave(self, disk: Disk, graph: Graph, top: str) -> None:
        """From a quorum that cannot flush only while the guest stands still: nothing is acknowledged then
        that a copy lacks, and what failed is written again by whoever follows. A copy that is left may be
        gone before its server has written to it again: then the guest is made to stand still for that."""
        try:
            await self._reopen(disk, top)
        except Denied:
            way = disks.way_of(graph, disk.root)
            if way is None or way.threshold is None:
                raise
            async with self._standing(disk):
                await self._empty(disk, way, graph)
                await self._reopen(disk, top)

    @asynccontextmanager
    async def _standing(self, disk: Disk) -> AsyncGenerator[None]:
        """A guest that runs goes on afterwards, unless its root is left half way."""
        runs = await self._vmm.state() == "running"
        if runs:
            await self._say("stop")
        try:
            yield
        finally:
            if runs and await self._leads_to(disk):
                await self._say("cont")

    async def _reopen(self, disk: Disk, top: str) -> None:
        await self._say("blockdev-reopen", options=[disks.root(disk, top)])

    async def _empty(self, disk: Disk, way: disks.Way, graph: Graph) -> None:
        """A placeholder in every member's place. Said at one go: a member whose placeholder did not come
        cannot go either."""
        said: list[Coroutine[None, None, object]] = []
        leaving = [edge for member, edge in sorted(way.edges.items()) if not disks.is_placeholder(member)]
        for number, edge in enumerate(leaving, graph.free_number() + 1):
            name = disks.placeholder_name(disk.volume, number)
            said += [
                self._say("blockdev-add", **disks.placeholder(name, graph.sizes[way.top])),
                self._say("x-blockdev-change", parent=way.top, node=name),
                self._say("x-blockdev-change", parent=way.top, child=edge),
            ]
        for answer in await asyncio.gather(*said, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def _enlarge_standing(self, disk: Disk, graph: Graph, top: str, size: int) -> None:
        """A quorum cannot be told to grow. The guest stands still for the moment in which its root leads to a
        single connection, which can."""
        number = graph.free_number() + 1
        first = disks.connection(
            disk.endpoints[0], disks.connection_name(disk.keys[0], number, alone=True), alone=True
        )
        await self._say("blockdev-add", OPENED_WITHIN, **first)
        async with self._standing(disk):
            await self._leave(disk, graph, str(first["node-name"]))
            await self._say("block_resize", node_name=disk.root, size=size)
            await self._reopen(disk, top)
        self._done.append(f"{disk.volume} has {size // MIB} MiB")

    async def _leads_to(self, disk: Disk) -> bool:
        way = disks.way_of(await graph_of(self._vmm), disk.root)
        return way is not None and disks.reaches(way, disk.keys)

    # --- going ---

    async def _detach_unwanted(self, graph: Graph) -> None:
        wanted = {disk.device for disk in self._wanted}
        for device, root in graph.devices.items():
            if device.startswith("data") and device not in wanted:
                await self._unplug(device)
                self._done.append(f"{device} detached")
                await self._remove_root(root)
        roots = {disk.root for disk in self._wanted} | set(graph.devices.values())
        for node in graph.sizes:
            if node.startswith("top-") and node not in roots:
                await self._remove_root(node)

    async def _unplug(self, device: str) -> None:
        try:
            await self._say("device_del", id=device)
        except Denied as denied:
            if "already in the process" not in denied.message:
                raise
        until = time.monotonic() + DETACHED_WITHIN
        while device in (await graph_of(self._vmm)).devices:
            if time.monotonic() > until:
                raise Unavailable(
                    f"the guest does not let go of {device} within {DETACHED_WITHIN:g} s",
                    field="data_volumes",
                    remedy="unmount the disk in the guest; it is asked again",
                )
            await asyncio.sleep(0.05)

    async def _remove_root(self, root: str) -> None:
        """A device that is gone lets go of its root a moment later."""
        until = time.monotonic() + LETS_GO_WITHIN
        while True:
            try:
                await self._say("blockdev-del", node_name=root)
            except Denied as denied:
                if "in use" not in denied.message or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.02)
            else:
                return

    async def _clear_away(self) -> None:
        graph = await graph_of(self._vmm)
        for node in graph.orphans():
            await self._say("blockdev-del", OPENED_WITHIN, node_name=node)
        for group in graph.groups - disks.limits_of(self._server).keys():
            await self._say("object-del", id=group)


async def doors(disk: Disk, *, shut: frozenset[Address] = frozenset()) -> tuple[bool, ...]:
    """Which copies' daemons answer. Those at `shut` are not asked."""
    async with asyncio.TaskGroup() as group:
        looks = [group.create_task(_answers((each.address, each.port), shut)) for each in disk.endpoints]
    return tuple(look.result() for look in looks)


async def _answers(address: Address, shut: frozenset[Address]) -> bool:
    if address in shut:
        return False
    return await answers(address, connect_within=CONNECT_WITHIN, greet_within=GREET_WITHIN)
