"""The virtual network through the operator API: the methods of `runtime.controllers.networks.Networks`."""

from typing import Any, Protocol

import msgspec

from nahtlos.model.ids import (
    FloatingIpId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    SecurityGroupId,
    SubnetId,
)
from nahtlos.model.networking import FloatingIpSpec, LoadBalancerSpec, RouterSpec, SecurityRule
from nahtlos.model.topology import Underlay
from nahtlos.runtime.controllers.networks import (
    Assignment,
    FloatingIpRequest,
    LoadBalancerChange,
    LoadBalancerRequest,
    LoadBalancerView,
    NetworkChange,
    NetworkRequest,
    NetworkView,
    PortChange,
    PortView,
    RouterChange,
    RouterRequest,
    SecurityGroupRequest,
    SecurityGroupView,
    Settling,
    SubnetChange,
    SubnetRequest,
    SubnetView,
    Trace,
    TraceRequest,
)


class Ask(Protocol):
    """One request: method, path in segments, body, what the answer is (None: nothing), query."""

    async def __call__(
        self,
        method: str,
        path: tuple[str, ...],
        body: msgspec.Struct | None,
        kind: type[Any] | None,
        query: str = "",
        /,
    ) -> Any: ...


class NetworkClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def networks(self) -> tuple[NetworkView, ...]:
        return await self._ask("GET", ("networks",), None, tuple[NetworkView, ...])

    async def network(self, network: NetworkId) -> NetworkView:
        return await self._ask("GET", ("networks", network), None, NetworkView)

    async def create_network(self, request: NetworkRequest) -> NetworkView:
        return await self._ask("POST", ("networks",), request, NetworkView)

    async def change_network(self, network: NetworkId, change: NetworkChange) -> NetworkView:
        return await self._ask("PATCH", ("networks", network), change, NetworkView)

    async def delete_network(self, network: NetworkId) -> None:
        await self._ask("DELETE", ("networks", network), None, None)

    # --- subnets

    async def subnets(self) -> tuple[SubnetView, ...]:
        return await self._ask("GET", ("subnets",), None, tuple[SubnetView, ...])

    async def subnet(self, subnet: SubnetId) -> SubnetView:
        return await self._ask("GET", ("subnets", subnet), None, SubnetView)

    async def create_subnet(self, request: SubnetRequest) -> SubnetView:
        return await self._ask("POST", ("subnets",), request, SubnetView)

    async def change_subnet(self, subnet: SubnetId, change: SubnetChange) -> SubnetView:
        return await self._ask("PATCH", ("subnets", subnet), change, SubnetView)

    async def delete_subnet(self, subnet: SubnetId) -> None:
        await self._ask("DELETE", ("subnets", subnet), None, None)

    # --- ports

    async def ports(self) -> tuple[PortView, ...]:
        return await self._ask("GET", ("ports",), None, tuple[PortView, ...])

    async def port(self, port: PortId) -> PortView:
        return await self._ask("GET", ("ports", port), None, PortView)

    async def change_port(self, port: PortId, change: PortChange) -> PortView:
        return await self._ask("PATCH", ("ports", port), change, PortView)

    async def trace(self, request: TraceRequest) -> Trace:
        return await self._ask("POST", ("traces",), request, Trace)

    # --- security groups

    async def security_groups(self) -> tuple[SecurityGroupView, ...]:
        return await self._ask("GET", ("security-groups",), None, tuple[SecurityGroupView, ...])

    async def security_group(self, group: SecurityGroupId) -> SecurityGroupView:
        return await self._ask("GET", ("security-groups", group), None, SecurityGroupView)

    async def create_security_group(self, request: SecurityGroupRequest) -> SecurityGroupView:
        return await self._ask("POST", ("security-groups",), request, SecurityGroupView)

    async def delete_security_group(self, group: SecurityGroupId) -> None:
        await self._ask("DELETE", ("security-groups", group), None, None)

    async def add_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView:
        return await self._ask("POST", ("security-groups", group, "rules"), rule, SecurityGroupView)

    async def remove_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView:
        return await self._ask("DELETE", ("security-groups", group, "rules"), rule, SecurityGroupView)

    # --- routers

    async def routers(self) -> tuple[RouterSpec, ...]:
        return await self._ask("GET", ("routers",), None, tuple[RouterSpec, ...])

    async def router(self, router: RouterId) -> RouterSpec:
        return await self._ask("GET", ("routers", router), None, RouterSpec)

    async def create_router(self, request: RouterRequest) -> RouterSpec:
        return await self._ask("POST", ("routers",), request, RouterSpec)

    async def change_router(self, router: RouterId, change: RouterChange) -> RouterSpec:
        return await self._ask("PATCH", ("routers", router), change, RouterSpec)

    async def delete_router(self, router: RouterId) -> None:
        await self._ask("DELETE", ("routers", router), None, None)

    # --- floating IPs

    async def floating_ips(self) -> tuple[FloatingIpSpec, ...]:
        return await self._ask("GET", ("floating-ips",), None, tuple[FloatingIpSpec, ...])

    async def floating_ip(self, floating_ip: FloatingIpId) -> FloatingIpSpec:
        return await self._ask("GET", ("floating-ips", floating_ip), None, FloatingIpSpec)

    async def create_floating_ip(self, request: FloatingIpRequest) -> FloatingIpSpec:
        return await self._ask("POST", ("floating-ips",), request, FloatingIpSpec)

    async def assign_floating_ip(self, floating_ip: FloatingIpId, assignment: Assignment) -> FloatingIpSpec:
        path = ("floating-ips", floating_ip, "assignment")
        return await self._ask("PUT", path, assignment, FloatingIpSpec)

    async def delete_floating_ip(self, floating_ip: FloatingIpId) -> None:
        await self._ask("DELETE", ("floating-ips", floating_ip), None, None)

    # --- load balancers

    async def load_balancers(self) -> tuple[LoadBalancerView, ...]:
        return await self._ask("GET", ("load-balancers",), None, tuple[LoadBalancerView, ...])

    async def load_balancer(self, balancer: LoadBalancerId) -> LoadBalancerView:
        return await self._ask("GET", ("load-balancers", balancer), None, LoadBalancerView)

    async def create_load_balancer(self, request: LoadBalancerRequest) -> LoadBalancerSpec:
        return await self._ask("POST", ("load-balancers",), request, LoadBalancerSpec)

    async def change_load_balancer(
        self, balancer: LoadBalancerId, change: LoadBalancerChange
    ) -> LoadBalancerSpec:
        return await self._ask("PATCH", ("load-balancers", balancer), change, LoadBalancerSpec)

    async def delete_load_balancer(self, balancer: LoadBalancerId) -> None:
        await self._ask("DELETE", ("load-balancers", balancer), None, None)

    # --- the underlay, and how far hosts are

    async def underlay(self) -> Underlay:
        return await self._ask("GET", ("underlay",), None, Underlay)

    async def set_underlay(self, underlay: Underlay) -> Underlay:
        return await self._ask("PUT", ("underlay",), underlay, Underlay)

    async def settling(self) -> Settling:
        return await self._ask("GET", ("settling",), None, Settling)
