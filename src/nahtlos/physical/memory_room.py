"""How much memory this host can offer to servers: what it was told, and no more than its RAM folder holds.

Servers' memory lies in files of a file system in memory (usually /dev/shm), so that another VMM can take it
over in place. Debian makes that half as large as the machine's memory. Never changes anything.
"""

import os
from pathlib import Path

import msgspec

from nahtlos.model.nouns import Size
from nahtlos.physical.settings import AgentSettings

MIB = 1 << 20


def offered(told: Size, room_mib: int) -> Size:
    """Of `told`, what a RAM folder of `room_mib` has room for."""
    return Size(vcpus=told.vcpus, memory_mib=min(told.memory_mib, room_mib))


def room_mib(folder: Path) -> int:
    """Of the whole file system, whatever is in it: what servers use of it is counted elsewhere."""
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize // MIB


def within_room(settings: AgentSettings) -> tuple[AgentSettings, str]:
    """The settings with what can be kept of their capacity; and what to say of it, empty if all can."""
    room = room_mib(settings.ram_dir)
    capacity = offered(settings.capacity, room)
    if capacity == settings.capacity:
        return settings, ""
    told = settings.capacity.memory_mib
    why = (
        f"servers are offered {capacity.memory_mib} of {told} MiB: {settings.ram_dir} can hold "
        f"no more (mount -o remount,size={told}m, then start the agent again)"
    )
    return msgspec.structs.replace(settings, capacity=capacity), why
