"""VLANs without VLAN devices: programs that put a tag on what leaves and take it off what comes.

Composing is pure. Owns the format of tc's `bpf` filters and of the qdisc they hang at.

    bridge - pv<vni> [egress: tag on, out of the interface]    interface [ingress: tag off, in by pv<vni>]

A program is known by its name, which is made of its instructions: the same name is the same program. Numbers
are those of linux/bpf.h, pkt_cls.h and if_ether.h.
"""

import errno
import hashlib
import os
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from nahtlos.physical.network import bpf, netlink
from nahtlos.physical.network.bandwidth.traffic_control import (
    ANY_PROTOCOL,
    GONE,
    HEADER,
    KIND,
    OPTIONS,
    RTM_GETTFILTER,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
)
from nahtlos.physical.network.netlink import CREATE, REPLACE, Netlink, Request, nested, text, u32

RTM_DELTFILTER = 45
CLSACT_HANDLE, CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
PRIORITY = 0x6E61
"""Of our filters ("na"); those of others are left alone."""
BPF_FD, BPF_NAME, BPF_FLAGS, DIRECT_ACTION = 6, 7, 8, 1
NEXT_FILTER = -1
TAG = 0x8100
CONTEXT_VLAN_PRESENT, CONTEXT_VLAN_TCI, CONTEXT_VLAN_PROTOCOL, VLAN_MASK = 20, 24, 28, 0xFFF
INTO_INGRESS = 1


class Program(msgspec.Struct, frozen=True):
    """At `where` (INGRESS or EGRESS) of device `index`; `vlan` is also the filter's handle."""

    index: int
    where: int
    vlan: int
    instructions: bytes = b""
    name: str = ""

    @property
    def place(self) -> tuple[int, int, int]:
        return self.index, self.where, self.vlan


def tag_on(port: int, interface: int, vlan: int) -> Program:
    """What leaves by `port` leaves by `interface` with the tag."""
    instructions = b"".join(
        (
            bpf.put(2, socket.htons(TAG)),
            bpf.put(3, vlan),
            bpf.call(bpf.VLAN_PUSH),
            bpf.put(1, interface),
            bpf.put(2, 0),
            bpf.call(bpf.REDIRECT),
            bpf.leave(),
        )
    )
    return Program(port, EGRESS, vlan, instructions, _name(instructions))


def tag_off(interface: int, port: int, vlan: int) -> Program:
    """What comes by `interface` with the tag comes in by `port` without it; the rest is another's."""
    act = (
        bpf.copy(1, 6),
        bpf.call(bpf.VLAN_POP),
        bpf.put(1, port),
        bpf.put(2, INTO_INGRESS),
        bpf.call(bpf.REDIRECT),
        bpf.leave(),
    )
    over = len(act)
    instructions = b"".join(
        (
            bpf.copy(6, 1),
            bpf.load_word(2, 6, CONTEXT_VLAN_PRESENT),
            bpf.skip_if_equal(2, 0, over + 5),
            bpf.load_word(2, 6, CONTEXT_VLAN_PROTOCOL),
            bpf.skip_unless_equal(2, socket.htons(TAG), over + 3),
            bpf.load_word(2, 6, CONTEXT_VLAN_TCI),
            bpf.mask(2, VLAN_MASK),
            bpf.skip_unless_equal(2, vlan, over),
            *act,
            bpf.put(0, NEXT_FILTER),
            bpf.leave(),
        )
    )
    return Program(interface, INGRESS, vlan, instructions, _name(instructions))


def _name(instructions: bytes) -> str:
    return f"nahtlos/{hashlib.sha256(instructions).hexdigest()[:16]}"


# --- requests ----------------------------------------------------------------------------------------


def put_qdisc(index: int) -> Request:
    body = struct.pack(HEADER, 0, index, CLSACT_HANDLE, CLSACT_PARENT, 0) + text(KIND, "clsact")
    return Request(RTM_NEWQDISC, CREATE, body, "attach programs", frozenset({errno.EEXIST}))


def _header(program: Program) -> bytes:
    info = PRIORITY << 16 | socket.htons(ANY_PROTOCOL)
    return struct.pack(HEADER, 0, program.index, program.vlan, program.where, info)


@contextmanager
def put(program: Program) -> Generator[Request]:
    """In place of what has its place; to be sent within."""
    fd = bpf.load(bpf.TRAFFIC_CONTROL, program.instructions, "tags frames", field="provider")
    try:
        options = nested(
            OPTIONS, u32(BPF_FD, fd), text(BPF_NAME, program.name), u32(BPF_FLAGS, DIRECT_ACTION)
        )
        body = _header(program) + text(KIND, "bpf") + options
        yield Request(RTM_NEWTFILTER, CREATE | REPLACE, body, f"program for VLAN {program.vlan}")
    finally:
        os.close(fd)


def remove(program: Program) -> Request:
    body = _header(program) + text(KIND, "bpf")
    return Request(RTM_DELTFILTER, 0, body, f"remove program for VLAN {program.vlan}", GONE)


def read(socket_: Netlink, index: int, where: int) -> tuple[Program, ...]:
    """Ours at a place of a device. None if nothing of the kind can be there."""
    try:
        bodies = socket_.dump(RTM_GETTFILTER, struct.pack(HEADER, 0, index, 0, where, 0))
    except netlink.KernelRefused:
        return ()
    return tuple(found for found in map(_program, bodies) if found is not None)


def _program(body: bytes) -> Program | None:
    _, index, handle, parent, info = struct.unpack_from(HEADER, body)
    values = netlink.attributes(body[20:])
    if info >> 16 != PRIORITY or values.get(KIND, b"").rstrip(b"\0") != b"bpf" or not handle:
        return None
    name = netlink.attributes(values.get(OPTIONS, b"")).get(BPF_NAME, b"")
    return Program(index, parent, handle, name=name.rstrip(b"\0").decode(errors="replace"))
