"""A process that may do one thing: read one file, write at most one other, and compute. Run as
`python -m nahtlos.physical.storage.jail SPEC`, it closes the door behind itself and becomes the program.

It gets a root folder of its own (a tmpfs, read-only, with the program's bundle and its files in it and
nothing else), no network, no other processes, no capabilities and no way to new ones, limits for memory,
CPU time, file size and descriptors, and a filter that ends it for system calls no reader of images needs.
It ends with its parent. Never imported by anything that goes on afterwards: it is only run.
"""

import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
from pathlib import Path

import msgspec

INPUT, OUTPUT, SECRET, BUNDLE = "/in", "/out", "/secret", "/bundle"
THREAD_STACK_BYTES = 2 << 20
"""Address space counts, used or not: 64 threads of QEMU's pool with the usual 8 MiB each, and a heap of
64 MiB for some of them, pass a limit of 1 GiB while almost nothing is used."""
SET_UP_FAILED = 125
"""Exit code: the door could not be closed, and nothing was run."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    argv: tuple[str, ...]
    """Paths as they are inside."""
    folder: str
    """Empty; the root is mounted there, seen by this process only."""
    bundle: str
    read: int
    """Descriptor of what is found as `/in`."""
    write: int | None = None
    """… as `/out`."""
    secret: int | None = None
    """… as `/secret`, for reading."""
    environment: dict[str, str] = {}
    uid: int
    gid: int
    memory_bytes: int
    cpu_seconds: int
    file_bytes: int


NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
_ALL_NAMESPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET | 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 24, 28, 38, 22
SECUREBITS = 0b11101111
"""No capability comes with user id 0, none is kept, none is ambient; and all that for good."""
CAPABILITY_VERSION_3 = 0x20080522
SYS_PIVOT_ROOT, SYS_CAPSET = 155, 126

_FORBIDDEN = (
    *(41, 42, 43, 49, 50, 53, 288),  # sockets
    *(101, 310, 311, 312, 438),  # other processes
    *(155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # mounts, namespaces
    *(175, 176, 313, 246, 320, 169, 170, 171, 167, 168, 163, 179),  # the machine
    *(321, 298, 323, 248, 249, 250, 135, 303, 304, 133, 259),  # bpf, perf, keys, handles, devices
)
_ABSENT = (435, 425, 426, 427)
"""clone3 and io_uring: said to be unknown, so that callers fall back to what can be judged."""
_CLONE = 56
_ARCHITECTURE = 0xC000003E
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_ENOSYS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def main(spec: Spec) -> int:
    _die_with_parent()
    os.umask(0o077)
    _check("unshare", _libc.unshare(NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWPID | NEWNET))
    watched, held = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(held)
        _inside(spec, watched)
    os.close(watched)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _inside(spec: Spec, parent: int) -> None:
    """Never returns."""
    try:
        _private_root(spec)
        _limit(spec)
        _drop_privileges(spec)
        _die_with_parent()
        if select.select([parent], [], [], 0)[0]:
            os._exit(SET_UP_FAILED)  # the parent ended before this process was bound to it
        os.closerange(3, 1 << 16)
        _filter_calls()
        os.execve(spec.argv[0], list(spec.argv), {**spec.environment, "MALLOC_ARENA_MAX": "1"})
    except BaseException as error:
        os.write(2, f"jail: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(SET_UP_FAILED)


def _private_root(spec: Spec) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = Path(spec.folder)
    _mount("none", str(root), "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    bundle = root / BUNDLE[1:]
    bundle.mkdir()
    _bind(spec.bundle, bundle, MS_RDONLY | MS_NODEV)
    for descriptor, place, flags in (
        (spec.read, INPUT, MS_RDONLY),
        (spec.write, OUTPUT, 0),
        (spec.secret, SECRET, MS_RDONLY),
    ):
        if descriptor is not None:
            _place_file(descriptor, root / place[1:], flags | MS_NODEV | MS_NOEXEC)
    old = root / "old"
    old.mkdir()
    _check("pivot_root", _libc.syscall(SYS_PIVOT_ROOT, str(root).encode(), str(old).encode()))
    os.chdir("/")
    _check("umount2", _libc.umount2(b"/old", MNT_DETACH))
    Path("/old").rmdir()
    _mount(None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _place_file(descriptor: int, target: Path, flags: int) -> None:
    """By its path, as a descriptor's own mount is not of this namespace; only if it is still that file."""
    target.touch(0o600)
    _bind(str(Path(f"/proc/self/fd/{descriptor}").readlink()), target, flags)
    if not os.path.samestat(os.fstat(descriptor), target.stat()):
        raise OSError(f"{target.name} has become another file")


def _bind(source: str, target: Path, flags: int) -> None:
    _mount(source, str(target), None, MS_BIND)
    _mount(None, str(target), None, MS_REMOUNT | MS_BIND | MS_NOSUID | flags)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    parts = [None if part is None else part.encode() for part in (source, target, kind, data)]
    _check(f"mount {target}", _libc.mount(parts[0], parts[1], parts[2], ctypes.c_ulong(flags), parts[3]))


def _limit(spec: Spec) -> None:
    for what, value in (
        (resource.RLIMIT_AS, spec.memory_bytes),
        (resource.RLIMIT_CPU, spec.cpu_seconds),
        (resource.RLIMIT_FSIZE, spec.file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_STACK, THREAD_STACK_BYTES),
    ):
        resource.setrlimit(what, (value, value))


def _drop_privileges(spec: Spec) -> None:
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # the kernel knows no more of them
    os.setgroups([])
    _check("securebits", _libc.prctl(PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0))
    os.setresgid(spec.gid, spec.gid, spec.gid)
    os.setresuid(spec.uid, spec.uid, spec.uid)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _check("capset", _libc.syscall(SYS_CAPSET, header, bytes(24)))
    _check("no_new_privs", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _die_with_parent() -> None:
    _check("pdeathsig", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def call_filter() -> bytes:
    """A program for seccomp: system calls by number, ended, said to be unknown, or let through."""
    load, jump_equal, jump_any, give_back = 0x20, 0x15, 0x45, 0x06

    def step(code: int, value: int, then: int = 0, other: int = 0) -> bytes:
        return struct.pack("HBBI", code, then, other, value)

    program = [
        step(load, 4),  # architecture
        step(jump_equal, _ARCHITECTURE, 1, 0),
        step(give_back, _KILL),
        step(load, 0),  # number
        step(jump_any, 0x40000000, 0, 1),  # the x32 form of calls
        step(give_back, _KILL),
    ]
    for number in _FORBIDDEN:
        program += [step(jump_equal, number, 0, 1), step(give_back, _KILL)]
    for number in _ABSENT:
        program += [step(jump_equal, number, 0, 1), step(give_back, _ERROR | _ENOSYS)]
    program += [
        step(jump_equal, _CLONE, 0, 3),
        step(load, 16),  # its flags
        step(jump_any, _ALL_NAMESPACES, 0, 1),
        step(give_back, _KILL),
        step(give_back, _ALLOW),
    ]
    return b"".join(program)


def _filter_calls() -> None:
    if platform.machine() != "x86_64":
        raise OSError(f"no filter of system calls for {platform.machine()}")
    program = call_filter()
    body = ctypes.create_string_buffer(program, len(program))
    argument = struct.pack("H6xQ", len(program) // 8, ctypes.addressof(body))
    _check("seccomp", _libc.prctl(PR_SET_SECCOMP, 2, argument, 0, 0))


def _check(what: str, answer: int) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=Spec)))
