"""What is said over the supervisor's socket: one JSON object per packet (SOCK_SEQPACKET), descriptors
beside it (SCM_RIGHTS). Every call may be repeated: a client that lost its connection just asks again.
"""

import array
import os
import socket
from pathlib import Path

import msgspec

from nahtlos.model.errors import ErrorRecord
from nahtlos.physical.ports import Unit, UnitStatus

PACKET_LIMIT = 1 << 20
"""Bytes. More than any unit's command line; a longer packet is a bug of its sender."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    unit: Unit


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    name: str
    grace: float


class ListUnits(msgspec.Struct, frozen=True, tag="units"):
    pass


class ListenTcp(msgspec.Struct, frozen=True, tag="listen-tcp"):
    name: str
    address: str
    port: int


class ListenUnix(msgspec.Struct, frozen=True, tag="listen-unix"):
    name: str
    path: Path
    mode: int


class StoreFd(msgspec.Struct, frozen=True, tag="store-fd"):
    name: str


class FetchFd(msgspec.Struct, frozen=True, tag="fetch-fd"):
    name: str


class DropFd(msgspec.Struct, frozen=True, tag="drop-fd"):
    name: str


class ListStored(msgspec.Struct, frozen=True, tag="stored"):
    pass


class Arm(msgspec.Struct, frozen=True, tag="arm"):
    deadline: float | None
    leased: dict[str, bool]


Call = Arm | Start | Stop | ListUnits | ListenTcp | ListenUnix | StoreFd | FetchFd | DropFd | ListStored


class Request(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    call: Call


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: int
    error: ErrorRecord | None = None
    units: dict[str, UnitStatus] = {}
    port: int = 0
    names: tuple[str, ...] = ()


def _encode_other(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _decode_other(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"cannot decode {kind.__name__}")


encoder = msgspec.json.Encoder(enc_hook=_encode_other)
request_decoder = msgspec.json.Decoder(Request, dec_hook=_decode_other)
reply_decoder = msgspec.json.Decoder(Reply, dec_hook=_decode_other)


def send_packet(sock: socket.socket, message: Request | Reply, fds: tuple[int, ...] = ()) -> None:
    """Never blocks; BlockingIOError if the other side does not read."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([encoder.encode(message)], ancillary)


def receive_packet(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Empty bytes at the end of the connection. The descriptors belong to the caller."""
    data, fds, flags, _ = socket.recv_fds(sock, PACKET_LIMIT, 4, socket.MSG_CMSG_CLOEXEC)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ConnectionError("a packet was longer than agreed")
    return data, fds


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
