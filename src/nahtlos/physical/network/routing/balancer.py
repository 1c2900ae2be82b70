"""Load balancers: one HAProxy per virtual address, in a namespace of its own, kept by the supervisor.

Owns the units `haproxy.<load balancer>` and their configuration and control sockets below the run directory.
Members and health checks change by a reload, which hands the listening socket to a new worker while the old
one serves its connections to their end; weights and draining change in the running worker. What is wanted is
always in the file, so one that was killed comes back as it was. Never touches namespaces or networks.
"""

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nahtlos.model import inventory
from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import LoadBalancerId
from nahtlos.model.inventory import LoadBalancerStatus
from nahtlos.model.networking import LoadBalancerSpec, Member
from nahtlos.physical.network.programs import Programs
from nahtlos.physical.ports import Supervisor, Unit

PREFIX = "haproxy."
DEADLINE = 5.0
AT_ONCE = 0.5
POLL_SECONDS = 0.02
MOST_WEIGHT = 256
IDLE = "24h"
"""What a connection may be silent for; a peer that is gone is found by keepalives."""
CONNECT = "5s"


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    member: Member
    up: bool
    weight: int
    """As it is now; 0: gets no new connections."""
    connections: int
    total: int
    """Connections so far, since the running worker began."""


class BalancerStatus(msgspec.Struct, frozen=True, kw_only=True):
    members: tuple[MemberStatus, ...]
    connections: int
    configuration: str
    """Digest of what the running worker was started with."""
    version: str = ""
    """Of the program."""


# --- deciding ----------------------------------------------------------------------------------------


def member_name(member: Member) -> str:
    """The same for its life, whatever its place in the list."""
    return f"{member.address.replace(':', '-')}_{member.port}"


def weights(members: Iterable[Member]) -> dict[str, int]:
    """Shares as HAProxy takes them, 0 to 256; one that drains gets nothing new."""
    members = tuple(members)
    most = max((m.weight for m in members), default=1)
    scale = min(1.0, MOST_WEIGHT / most) if most else 1.0
    return {
        member_name(m): 0 if m.draining else (max(1, round(m.weight * scale)) if m.weight else 0)
        for m in members
    }


def digest(spec: LoadBalancerSpec, socket: Path, release: str = "") -> str:
    """Of everything but weights: what a worker must be started anew for. `release`: of the program."""
    plain = tuple(msgspec.structs.replace(m, weight=1, draining=False) for m in spec.members)
    bare = msgspec.structs.replace(spec, members=plain)
    return hashlib.sha256((_text(bare, socket, "") + release).encode()).hexdigest()[:24]


def configuration(spec: LoadBalancerSpec, socket: Path, release: str = "") -> str:
    return _text(spec, socket, digest(spec, socket, release))


def _text(spec: LoadBalancerSpec, socket: Path, mark: str) -> str:
    health = spec.health
    share = weights(spec.members)
    check = f"check inter {health.interval_ms}ms fall {health.fall} rise {health.rise}"
    lines = [
        "global",
        f"  description {mark}",
        "  user nobody",
        "  group nogroup",
        "  nbthread 1",
        f"  stats socket {socket} mode 600 level admin expose-fd listeners",
        "defaults",
        "  mode tcp",
        f"  timeout connect {CONNECT}",
        f"  timeout client {IDLE}",
        f"  timeout server {IDLE}",
        f"  timeout check {health.timeout_ms}ms",
        "  option clitcpka",
        "  option srvtcpka",
        "  option redispatch 1",
        "  retries 3",
        "listen members",
        f"  bind {_bind(spec.vip)}:{spec.port}",
        "  balance roundrobin",
    ]
    lines += [
        f"  server {member_name(m)} {_bind(m.address)}:{m.port} weight {share[member_name(m)]} {check}"
        for m in sorted(spec.members, key=lambda m: (m.address, m.port))
    ]
    return "\n".join(lines) + "\n"


def _bind(address: str) -> str:
    return f"ipv6@[{address}]" if ":" in address else f"ipv4@{address}"


def decode(spec_members: Iterable[Member], info: str, stat: str) -> BalancerStatus:
    """From the answers to `show info` and `show stat`."""
    values = dict(line.lower().split(": ", 1) for line in info.splitlines() if ": " in line)
    rows = [line.split(",") for line in stat.strip().splitlines() if line]
    names = rows[0] if rows else []
    servers = {row[1]: dict(zip(names, row, strict=False)) for row in rows[1:]}
    members = tuple(
        MemberStatus(
            member=m,
            up=row["status"].startswith("UP"),
            weight=int(row["weight"] or 0),
            connections=int(row["scur"] or 0),
            total=int(row["stot"] or 0),
        )
        for m in spec_members
        if (row := servers.get(member_name(m))) is not None
    )
    current = servers.get("FRONTEND", {}).get("scur") or "0"
    return BalancerStatus(
        members=members,
        connections=int(current),
        configuration=values.get("description", "").strip(),
        version=values.get("version", "").strip(),
    )


def reported(id_: LoadBalancerId, status: BalancerStatus) -> LoadBalancerStatus:
    members = tuple(
        inventory.MemberStatus(
            address=m.member.address, port=m.member.port, up=m.up, connections=m.connections
        )
        for m in status.members
    )
    return LoadBalancerStatus(id=id_, connections=status.connections, members=members)


# --- acting ------------------------------------------------------------------------------------------


class Balancers:
    """Those of one host."""

    def __init__(self, run_dir: Path, log_dir: Path, supervisor: Supervisor, programs: Programs) -> None:
        self._folder = run_dir / "lb"
        self._log_dir = log_dir
        self._supervisor = supervisor
        self._programs = programs

    def _file(self, id_: LoadBalancerId) -> Path:
        return self._folder / f"{id_}.cfg"

    def _socket(self, id_: LoadBalancerId) -> Path:
        return self._folder / f"{id_}.sock"

    async def end_others(self, wanted: Iterable[LoadBalancerId]) -> None:
        names = {PREFIX + id_ for id_ in wanted}
        if not self._folder.exists():
            return
        for name in sorted(n for n in await self._supervisor.units() if n.startswith(PREFIX)):
            if name not in names:
                await self._supervisor.stop(name, grace=1.0)
                id_ = LoadBalancerId(name.removeprefix(PREFIX))
                for path in (self._file(id_), self._spec(id_), self._socket(id_)):
                    path.unlink(missing_ok=True)

    async def serve(self, spec: LoadBalancerSpec, namespace: Path) -> tuple[str, ...]:
        """Returns what was found different without having been asked for."""
        program = str(self._programs.script("haproxy"))
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, socket, text = (
            self._file(spec.id),
            self._socket(spec.id),
            configuration(spec, self._socket(spec.id), self._programs.chosen),
        )
        changed = _read(path) != text
        if changed:
            await _checked(program, path.with_suffix(".new"), text)
            path.with_suffix(".new").replace(path)
            self._spec(spec.id).write_bytes(msgspec.json.encode(spec))
        place = str(namespace.stat().st_ino)
        argv = ("nsenter", f"--net={namespace}", program, "-W", "-db", "-f", str(path))
        unit = (await self._supervisor.units()).get(PREFIX + spec.id)
        elsewhere = _read(path.with_suffix(".place")) != place
        if self._programs.chosen and unit is not None and unit.pid is not None:
            # What an earlier agent has begun would execute again what it was begun with.
            elsewhere = elsewhere or not _follows(unit.pid, program)
        if unit is None or unit.pid is None or elsewhere:
            if unit is not None:
                await self._supervisor.stop(unit.name, grace=0.5)
            await self._start(spec.id, argv)
            path.with_suffix(".place").write_text(place)
            await self._until_running(spec, "")
            return () if changed else (f"load balancer {spec.id} was not served: started",)
        running = await self._running(spec)
        if running is None:
            return ()  # its supervisor starts it again at this moment
        wanted = digest(spec, socket, self._programs.chosen)
        if running.configuration != wanted:
            # The master executes the script again: whatever program that leads to now gets the listening
            # sockets from the old worker, which serves its connections to their end.
            os.kill(unit.pid, signal.SIGUSR2)
            await self._until_running(spec, wanted)
            return () if changed else (f"load balancer {spec.id} was not as configured: loaded again",)
        return await self._weigh(spec, running, drift=not changed)

    async def _start(self, id_: LoadBalancerId, argv: tuple[str, ...]) -> None:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{PREFIX}{id_}.log"
        await self._supervisor.start(Unit(name=PREFIX + id_, argv=argv, log=log, restart=True))

    async def _weigh(
        self, spec: LoadBalancerSpec, running: BalancerStatus, *, drift: bool
    ) -> tuple[str, ...]:
        wanted = weights(spec.members)
        wrong = [
            (member_name(m.member), wanted[member_name(m.member)])
            for m in running.members
            if m.weight != wanted[member_name(m.member)]
        ]
        for name, weight in wrong:
            await _ask(self._socket(spec.id), f"set server members/{name} weight {weight}")
        return tuple(
            f"weight of {name} in load balancer {spec.id} was different: put right"
            for name, _ in wrong
            if drift
        )

    async def _until_running(self, spec: LoadBalancerSpec, wanted: str) -> None:
        """Until a worker answers, with configuration `wanted` if given."""
        try:
            async with asyncio.timeout(DEADLINE):
                while True:
                    running = await self._running(spec)
                    if running is not None and wanted in ("", running.configuration):
                        return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise Unavailable(
                f"load balancer {spec.id} did not come up within {DEADLINE:.0f} s",
                field="load_balancers",
                remedy=f"see {self._log_dir / (PREFIX + spec.id)}.log",
            ) from None

    async def _running(self, spec: LoadBalancerSpec) -> BalancerStatus | None:
        try:
            socket = self._socket(spec.id)
            return decode(spec.members, await _ask(socket, "show info"), await _ask(socket, "show stat"))
        except Error:
            return None

    def _spec(self, id_: LoadBalancerId) -> Path:
        return self._folder / f"{id_}.json"

    async def statuses(self) -> tuple[LoadBalancerStatus, ...]:
        """Of all, without waiting for one that does not answer: it is looked at again."""
        names = sorted(LoadBalancerId(path.stem) for path in self._folder.glob("*.json"))
        found = await asyncio.gather(*map(self._at_once, names))
        return tuple(reported(id_, status) for id_, status in zip(names, found, strict=True) if status)

    async def _at_once(self, id_: LoadBalancerId) -> BalancerStatus | None:
        try:
            async with asyncio.timeout(AT_ONCE):
                return await self.status(id_)
        except (Error, TimeoutError):
            return None

    async def status(self, id_: LoadBalancerId) -> BalancerStatus:
        try:
            spec = msgspec.json.decode(self._spec(id_).read_bytes(), type=LoadBalancerSpec)
        except OSError as error:
            raise Unavailable(f"load balancer {id_} is not on this host", field="load_balancer") from error
        socket = self._socket(id_)
        return decode(spec.members, await _ask(socket, "show info"), await _ask(socket, "show stat"))


def _follows(pid: int, program: str) -> bool:
    """Whether the process becomes what `program` leads to when it is loaded again."""
    return program in _read(Path(f"/proc/{pid}/cmdline")).split("\0")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


async def _checked(program: str, path: Path, text: str) -> None:
    """Written to `path`, and Refused with HAProxy's words if it would not take it."""
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(
        program,
        "-c",
        "-q",
        "-f",
        str(path),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            _, error = await process.communicate()
    except TimeoutError as late:
        raise Unavailable(f"haproxy did not end within {DEADLINE:.0f} s", field="load_balancers") from late
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise Refused(f"haproxy: {error.decode(errors='replace').strip()[:400]}", field="load_balancers")


async def _ask(path: Path, command: str) -> str:
    """One command to the running worker, and its whole answer."""
    try:
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(f"{command}\n".encode())
                return (await reader.read()).decode(errors="replace")
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise Unavailable(
            f"load balancer at {path} does not answer: {error}", field="load_balancers"
        ) from error
