"""Memory that follows a server which runs already (post-copy), as QEMU's monitors show it.

    postcopy-active <-> postcopy-paused -(wait_anew, take_up)-> postcopy-recover -> postcopy-active
    postcopy-active -> completed

A QEMU whose own main loop touches a page that has not come does not answer: what it said last of its stream,
by an event, counts then, and only commands out of band reach it. Never decides that a server is lost.
"""

import asyncio
import time

import msgspec

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.hypervisor.vmm import Vmm
from nahtlos.physical.ports import Missing

ARRIVED = ("completed", "postcopy-active", "postcopy-paused", "postcopy-recover")
"""In which a destination has the devices of its server; whether it may run is told by its run state."""
FOLLOWS = "postcopy-"
CUT = "postcopy-paused"
CUT_WITHIN = 5.0
NOT_CUT_YET = "when postcopy is paused"
"""QEMU's words while the stream it was told to let go of is on its way out."""
BLOCK = 512


def arrived(vmm: Vmm) -> int:
    """Bytes of its memory that are here: pages that have not come take no room in its file."""
    paths = (vmm.paths.ram, vmm.paths.plugged_ram)
    return sum(path.stat().st_blocks * BLOCK for path in paths if path.exists())


def waits(vmm: Vmm) -> bool:
    """Memory of its server may be missing."""
    return bool(vmm.record and vmm.record.post_copy)


def check_answers(vmm: Vmm) -> None:
    """Unavailable if it may not: each question it does not answer stays in its monitor, which takes few."""
    record = vmm.record
    if record is not None and record.post_copy and record.resumed and vmm.stream_word == CUT:
        raise Unavailable(f"{vmm.id.unit} waits for its memory")


def unanswered(vmm: Vmm) -> Missing:
    """Of one that does not answer: it waits for a page. Where nothing was heard of its stream either it
    counts as cut, and is asked no more before something is."""
    record = vmm.record
    if record is None or not record.post_copy or not record.resumed:
        return Missing.NOTHING
    vmm.stream_word = vmm.stream_word or CUT
    return Missing.CUT if vmm.stream_word == CUT else Missing.COMING


async def missing(vmm: Vmm, state: str) -> Missing:
    """`state`: its run state. Once all has come, that is noted, and not asked again."""
    record = vmm.record
    if record is None or not record.post_copy or state == "inmigrate":
        return Missing.NOTHING
    word = str((await vmm.execute("query-migrate")).get("status", ""))
    if word in (CUT, "failed"):
        return Missing.CUT
    if word.startswith(FOLLOWS):  # also those between the states above: they differ from release to release
        return Missing.COMING
    vmm.write_record(msgspec.structs.replace(record, post_copy=False))
    return Missing.NOTHING


async def wait_anew(vmm: Vmm, uri: str) -> None:
    """Of a destination: listen at `uri` for the rest. Refused if nothing is missing."""
    if not waits(vmm):
        raise Refused(f"{vmm.id.unit} lacks nothing", field="vmm")
    until = time.monotonic() + CUT_WITHIN
    while True:
        await _cut(vmm)  # again: one that was just being taken up cannot be let go of yet
        try:
            await vmm.execute("migrate-recover", {"uri": uri}, urgent=True)
        except Denied as denied:
            lets_go = NOT_CUT_YET in denied.message and vmm.stream_word.startswith(FOLLOWS)
            if not lets_go or time.monotonic() > until:
                raise
            await asyncio.sleep(0.02)
        else:
            return


async def take_up(vmm: Vmm, uri: str) -> None:
    """Of a source: send the rest to `uri`. Unavailable if nobody waits there."""
    until = time.monotonic() + CUT_WITHIN
    while True:
        await _cut(vmm)
        word = await _word(vmm)
        if word == CUT:
            break
        if not word.startswith(FOLLOWS):
            raise Refused(f"{vmm.id.unit} has nothing left to send ({word})", field="vmm")
        if time.monotonic() > until:
            raise Unavailable(f"the stream of {vmm.id.unit} is not let go of within {CUT_WITHIN:g} s")
        await asyncio.sleep(0.02)
    try:
        await vmm.execute("migrate", {"uri": uri, "resume": True})
    except Denied as denied:
        raise Unavailable(f"not taken up: {denied.message}") from denied


async def _word(vmm: Vmm) -> str:
    return str((await vmm.execute("query-migrate")).get("status", ""))


async def _cut(vmm: Vmm) -> None:
    """Let go of a stream that this side believes to flow. One that is cut already says so."""
    try:
        await vmm.execute("migrate-pause", urgent=True)
    except Denied:
        return
    except Error as error:
        raise Unavailable(f"{vmm.id.unit} does not let go of its stream: {error.message}") from error
