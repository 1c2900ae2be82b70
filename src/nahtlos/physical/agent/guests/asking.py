"""The commands of QEMU's guest agent protocol that hosts use, each with a deadline, each answer checked.

A guest that does not answer is no error of its host: whoever asks decides what follows. What a guest says is
cut to a length and to characters that a terminal can be given.
"""

import time
from collections.abc import Iterator, Mapping
from typing import cast

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.guest import GuestStatus
from nahtlos.physical.ports import Hypervisor, VmmId

ANSWER_SECONDS = 3.0
FREEZE_SECONDS = 10.0
"""All that was written is brought to the disks first."""
THAW_SECONDS = 5.0
ADDRESSES = 16
LONGEST = 80
FIELD = "guest_agent"
FREEZE, THAW, FREEZE_STATUS = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"


async def clock_behind(hypervisor: Hypervisor, vmm: VmmId, now: float) -> float:
    """Seconds by which the guest's clock is behind; `now` is the host's, as it is when this is called."""
    began = time.monotonic()
    told = await hypervisor.guest_ask(vmm, "guest-get-time", within=ANSWER_SECONDS)
    if not isinstance(told, int):
        raise _nonsense("guest-get-time")
    return now + (time.monotonic() - began) / 2 - told / 1e9


async def set_clock(hypervisor: Hypervisor, vmm: VmmId, now: float) -> None:
    """Refused also where the guest's clock was set and only what it keeps over a reboot was not."""
    await hypervisor.guest_ask(vmm, "guest-set-time", {"time": int(now * 1e9)}, within=ANSWER_SECONDS)


async def is_frozen(hypervisor: Hypervisor, vmm: VmmId) -> bool:
    return await hypervisor.guest_ask(vmm, FREEZE_STATUS, within=ANSWER_SECONDS) == "frozen"


async def freeze(hypervisor: Hypervisor, vmm: VmmId) -> int:
    """How many file systems stand still. Whoever does not learn it has to thaw all the same."""
    count = await hypervisor.guest_ask(vmm, FREEZE, within=FREEZE_SECONDS)
    return count if isinstance(count, int) else 0


async def thaw(hypervisor: Hypervisor, vmm: VmmId) -> None:
    """Until the guest says that nothing is frozen: file systems may be frozen several times over."""
    await hypervisor.guest_ask(vmm, THAW, within=THAW_SECONDS)
    if await is_frozen(hypervisor, vmm):
        raise Unavailable(f"{vmm.server} says that its file systems are still frozen", field=FIELD)


async def status(hypervisor: Hypervisor, vmm: VmmId, now: float) -> GuestStatus:
    """Unavailable if it does not answer; what it has no answer to is left empty."""
    info = await hypervisor.guest_ask(vmm, "guest-info", within=ANSWER_SECONDS)
    frozen = await _frozen_if_known(hypervisor, vmm)
    version = _text(_object(info).get("version"))
    if frozen:
        return GuestStatus(answers=True, version=version, frozen=True, heard_at=now)
    system = _object(await _optional(hypervisor, vmm, "guest-get-osinfo"))
    interfaces = await _optional(hypervisor, vmm, "guest-network-get-interfaces")
    return GuestStatus(
        answers=True,
        version=version,
        system=_text(system.get("pretty-name") or system.get("name")),
        kernel=_text(system.get("kernel-release")),
        addresses=tuple(_addresses(interfaces))[:ADDRESSES],
        heard_at=now,
    )


async def _frozen_if_known(hypervisor: Hypervisor, vmm: VmmId) -> bool:
    try:
        return await is_frozen(hypervisor, vmm)
    except Refused:  # an agent may have that switched off
        return False


async def _optional(hypervisor: Hypervisor, vmm: VmmId, command: str) -> object:
    try:
        return await hypervisor.guest_ask(vmm, command, within=ANSWER_SECONDS)
    except Error:
        return None


def _addresses(interfaces: object) -> Iterator[str]:
    for interface in map(_object, _list(interfaces)):
        for told in map(_object, _list(interface.get("ip-addresses"))):
            address = _text(told.get("ip-address"))
            if address and not address.startswith(("127.", "::1", "fe80:")):
                yield f"{_text(interface.get('name'))} {address}"


def _object(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _text(value: object) -> str:
    told = value if isinstance(value, str) else ""
    return "".join(c if c.isprintable() else "?" for c in told[:LONGEST])


def _nonsense(command: str) -> Unavailable:
    return Unavailable(f"the guest's agent answers {command} with something else", field=FIELD)
