"""Small programs for the kernel's own machine, written here by hand: instructions, and loading them.

Owns bpf(2). Never decides what a program does, and keeps none: whoever a program is attached to keeps it.
Numbers are those of linux/bpf.h.
"""

import ctypes
import os
import platform
import struct

from nahtlos.model.errors import Unavailable

PROG_LOAD = 5
SOCKET_FILTER, TRAFFIC_CONTROL = 1, 3
SYS_BPF = {"x86_64": 321, "aarch64": 280}
VLAN_PUSH, VLAN_POP, REDIRECT = 18, 19, 23
"""Functions of the kernel that a program may call."""


def load_word(target: int, source: int, offset: int) -> bytes:
    """target = the 32 bits at `offset` of what `source` points to"""
    return struct.pack("BBhi", 0x61, source << 4 | target, offset, 0)


def load_frame(size: int, offset: int) -> bytes:
    """register 0 = `size` (2 or 4) bytes of the frame, whose description register 6 points to"""
    return struct.pack("BBhi", {2: 0x28, 4: 0x20}[size], 0, 0, offset)


def put(target: int, value: int) -> bytes:
    return struct.pack("BBhi", 0xB7, target, 0, value)


def copy(target: int, source: int) -> bytes:
    return struct.pack("BBhi", 0xBF, source << 4 | target, 0, 0)


def mask(target: int, value: int) -> bytes:
    return struct.pack("BBhi", 0x57, target, 0, value)


def add(target: int, value: int) -> bytes:
    return struct.pack("BBhi", 0x07, target, 0, value)


def modulo(target: int, value: int) -> bytes:
    return struct.pack("BBhi", 0x97, target, 0, value)


def skip_if_equal(register: int, value: int, over: int) -> bytes:
    """The next `over` instructions"""
    return struct.pack("BBhi", 0x15, register, over, value)


def skip_unless_equal(register: int, value: int, over: int) -> bytes:
    return struct.pack("BBhi", 0x55, register, over, value)


def skip_unless_same(value: int, over: int) -> bytes:
    """The next `over` instructions, unless register 0 has these 32 bits"""
    return struct.pack("BBhI", 0x56, 0, over, value)


def call(function: int) -> bytes:
    return struct.pack("BBhi", 0x85, 0, 0, function)


def leave() -> bytes:
    """With what is in register 0"""
    return struct.pack("BBhi", 0x95, 0, 0, 0)


def load(
    kind: int,
    instructions: bytes,
    what: str,
    *,
    field: str = "network",
    remedy: str = "allow the agent bpf()",
) -> int:
    """A descriptor of a program in the kernel, which the caller closes."""
    code, licence = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "IIQQ", kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    ).ljust(128, b"\0")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_BPF.get(platform.machine(), -1), PROG_LOAD, buffer, len(attributes))
    if fd < 0:
        raise Unavailable(
            f"this kernel loads no program that {what}: {os.strerror(ctypes.get_errno())}",
            field=field,
            remedy=remedy,
        )
    return fd
