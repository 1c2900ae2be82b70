"""What servers that run are given: which of them have something else than the configuration says, and how a
server is described to the VMM that is to take it over. Pure.
"""

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.inventory import ComputeStatus, RunState
from nahtlos.physical.ports import VmmStatus


def wanted_compute(wanted: ServerConfig, held: ServerConfig) -> ServerConfig:
    """`held` with what `wanted` gives it. Its hardware stays."""
    spec = msgspec.structs.replace(held.spec, size=wanted.spec.size, cpu=wanted.spec.cpu)
    return msgspec.structs.replace(held, spec=spec)


def with_policy(held: ServerConfig, wanted: ServerConfig) -> ServerConfig:
    """`held` with what `wanted` says about its host's failing."""
    policy, priority = wanted.spec.on_host_failure, wanted.spec.restart_priority
    spec = msgspec.structs.replace(held.spec, on_host_failure=policy, restart_priority=priority)
    return msgspec.structs.replace(held, spec=spec)


def has(vmm: VmmStatus, server: ServerConfig) -> bool:
    """Whether it has exactly what it is to be given. Of one that does not run, or has not said what it has,
    nothing can be known."""
    compute, spec = vmm.compute, server.spec
    if vmm.state is not RunState.RUNNING or compute == ComputeStatus():
        return True
    return (compute.vcpus, compute.memory_mib, compute.cpu) == (
        spec.size.vcpus,
        spec.size.memory_mib,
        spec.cpu,
    )


def with_vcpus(server: ServerConfig, vcpus: int) -> ServerConfig:
    """As its next VMM must be started: with as many as it has now, even while a change is under way."""
    if not vcpus or not server.spec.max_vcpus:
        return server
    size = msgspec.structs.replace(server.spec.size, vcpus=vcpus)
    return msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, size=size))
