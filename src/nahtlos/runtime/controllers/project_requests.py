"""Whether projects stay within what they may have in all. Pure; every refusal names the field, the remedy and
what is left."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import ProjectId, ServerId, VolumeId
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.model.storage import DiskLimits, VolumeSpec
from nahtlos.runtime.controllers.projects import ProjectChange, ProjectView
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.state import State

NAMES = {
    "vcpus": "vCPUs",
    "memory_mib": "MiB of memory",
    "iops": "I/O operations per second",
    "bytes_per_second": "bytes per second of its disks",
}
NO_SERVERS: Mapping[ServerId, ServerSpec] = MappingProxyType({})
NO_VOLUMES: Mapping[VolumeId, VolumeSpec] = MappingProxyType({})


def known_projects(state: State) -> tuple[ProjectId, ...]:
    """That have something, or are limited."""
    named = {row.spec.project for row in state.servers.values()}
    named |= {row.spec.project for row in state.volumes.values() if not row.removed}
    named |= {network.project for network in state.networks}
    return tuple(sorted(named | state.project_limits.keys()))


def project_view(state: State, project: ProjectId) -> ProjectView:
    if project not in known_projects(state):
        raise NotFound(
            f"no project '{project}'",
            field="project",
            remedy=f"projects: {listed(known_projects(state))}",
        )
    servers = _servers(state, project, NO_SERVERS)
    return ProjectView(
        id=project,
        servers=len(servers),
        limits=state.project_limits.get(project, ProjectLimits()),
        used=_used(servers, _volumes(state, servers, NO_VOLUMES)),
    )


def changed_limits(state: State, project: ProjectId, change: ProjectChange) -> ProjectLimits:
    """Refused, as too much, if the project has more than it would be limited to."""
    asked = {name: getattr(change, name) for name in NAMES}
    said = {name: value for name, value in asked.items() if value is not UNSET}
    if not said:
        raise Refused("nothing to change", field="project", remedy="see nahtlos project set --help")
    for name, value in said.items():
        if value < 0:
            raise Refused(f"{value} {NAMES[name]}", field=name, remedy="give 0 for no limit, or more")
    limits = msgspec.structs.replace(state.project_limits.get(project, ProjectLimits()), **said)
    servers = _servers(state, project, NO_SERVERS)
    volumes = _volumes(state, servers, NO_VOLUMES)
    _check_limited(limits, servers, volumes)
    used = _used(servers, volumes)
    for name in said:
        limit, has = getattr(limits, name), getattr(used, name)
        if limit and has > limit:
            raise Conflict(
                f"the servers of {project} have {has} {NAMES[name]}",
                field=name,
                remedy=f"give at least {has}, or have its servers be given less first",
            )
    return limits


def check_project(
    state: State,
    project: ProjectId,
    *,
    servers: Mapping[ServerId, ServerSpec] = NO_SERVERS,
    volumes: Mapping[VolumeId, VolumeSpec] = NO_VOLUMES,
) -> None:
    """Whether the project would stay within its limits with `servers` and `volumes` in the place of those of
    their names, or beside the others."""
    limits = state.project_limits.get(project)
    if limits is None:
        return
    before = _servers(state, project, NO_SERVERS)
    after = _servers(state, project, servers)
    disks = _volumes(state, after, volumes)
    _check_limited(limits, after, disks)
    had, has = _used(before, _volumes(state, before, NO_VOLUMES)), _used(after, disks)
    for name, what in NAMES.items():
        limit, new, old = getattr(limits, name), getattr(has, name), getattr(had, name)
        if limit and new > limit and new > old:
            raise Conflict(
                f"project {project} may have {limit} {what} and would have {new}",
                field=name,
                remedy=f"{max(0, limit - old)} are left; ask for less, or raise the limit: "
                f"nahtlos project set {project}",
            )


def _servers(state: State, project: ProjectId, instead: Mapping[ServerId, ServerSpec]) -> list[ServerSpec]:
    known = {name: row.spec for name, row in state.servers.items() if row.removed_at is None}
    return [spec for spec in {**known, **instead}.values() if spec.project == project]


def _volumes(
    state: State, servers: Iterable[ServerSpec], instead: Mapping[VolumeId, VolumeSpec]
) -> dict[VolumeId, VolumeSpec]:
    known = {**{name: row.spec for name, row in state.volumes.items()}, **instead}
    return {name: known[name] for spec in servers for name in spec.all_volumes if name in known}


def _used(servers: Iterable[ServerSpec], volumes: Mapping[VolumeId, VolumeSpec]) -> ProjectLimits:
    servers = list(servers)
    limited = [limits for spec in servers for _, limits in _limits_of(spec, volumes)]
    return ProjectLimits(
        vcpus=sum(spec.size.vcpus for spec in servers),
        memory_mib=sum(spec.size.memory_mib for spec in servers),
        iops=sum(_most(limits, "iops") for limits in limited),
        bytes_per_second=sum(_most(limits, "bytes") for limits in limited),
    )


def _limits_of(
    server: ServerSpec, volumes: Mapping[VolumeId, VolumeSpec]
) -> Iterable[tuple[VolumeId, DiskLimits]]:
    """Once for each group, which shares the limits of the first in it."""
    groups: set[str] = set()
    for name in server.all_volumes:
        spec = volumes.get(name)
        if spec is not None and spec.limits_group not in groups:
            groups |= {spec.limits_group} if spec.limits_group else set()
            yield name, spec.limits


def _most(limits: DiskLimits, kind: str) -> int:
    """What a disk may do at most, bursts left out; 0: it is not limited."""
    total = getattr(limits, kind)
    parts = getattr(limits, f"{kind}_read"), getattr(limits, f"{kind}_write")
    return total or (sum(parts) if all(parts) else 0)


def _check_limited(
    limits: ProjectLimits, servers: Iterable[ServerSpec], volumes: Mapping[VolumeId, VolumeSpec]
) -> None:
    """A disk without a limit could take all that the project has."""
    kinds = (("iops", "iops", limits.iops), ("bytes_per_second", "bytes", limits.bytes_per_second))
    for server in servers:
        for volume, disk in _limits_of(server, volumes):
            for field, kind, limit in kinds:
                if limit and not _most(disk, kind):
                    raise Conflict(
                        f"{volume} of {server.id} is not limited, and project {server.project} is, to "
                        f"{limit} {NAMES[field]}",
                        field=field,
                        remedy=f"limit it: nahtlos volume set {volume} --limit {kind}=N, "
                        "or when its server is created",
                    )
