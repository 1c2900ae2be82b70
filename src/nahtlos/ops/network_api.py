"""The operator API of the virtual network: paths over `runtime.controllers.networks.Networks`.

Owns paths and status codes of its subject. How bodies are read and answers written it is given; errors,
callers and logging are `ops.api`'s.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import (
    FloatingIpId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    SecurityGroupId,
    SubnetId,
)
from nahtlos.model.networking import SecurityRule
from nahtlos.model.topology import Underlay
from nahtlos.runtime.controllers.networks import (
    Assignment,
    FloatingIpRequest,
    LoadBalancerChange,
    LoadBalancerRequest,
    NetworkChange,
    NetworkRequest,
    Networks,
    PortChange,
    RouterChange,
    RouterRequest,
    SecurityGroupRequest,
    SubnetChange,
    SubnetRequest,
    TraceRequest,
)

T = TypeVar("T")


class Body(Protocol):
    async def __call__(self, request: Request, kind: type[T]) -> T: ...


class Answer(Protocol):
    def __call__(self, value: Any, status: int = 200) -> Response: ...


class NetworkRoutes:
    """Adds them to `routes`. `of` gives the networks at the time of a call."""

    def __init__(self, routes: APIRouter, of: Callable[[], Networks], body: Body, answer: Answer) -> None:
        self._routes, self._of, self._body, self._answer = routes, of, body, answer

    def add(self) -> None:
        nets = self._of
        self._noun(
            "networks",
            listed=lambda: nets().networks(),
            one=lambda name: nets().network(NetworkId(name)),
            create=(NetworkRequest, lambda asked: nets().create_network(asked)),
            change=(NetworkChange, lambda name, asked: nets().change_network(NetworkId(name), asked)),
            delete=lambda name: nets().delete_network(NetworkId(name)),
        )
        self._noun(
            "subnets",
            listed=lambda: nets().subnets(),
            one=lambda name: nets().subnet(SubnetId(name)),
            create=(SubnetRequest, lambda asked: nets().create_subnet(asked)),
            change=(SubnetChange, lambda name, asked: nets().change_subnet(SubnetId(name), asked)),
            delete=lambda name: nets().delete_subnet(SubnetId(name)),
        )
        self._noun(
            "ports",
            listed=lambda: nets().ports(),
            one=lambda name: nets().port(PortId(name)),
            change=(PortChange, lambda name, asked: nets().change_port(PortId(name), asked)),
        )
        self._noun(
            "security-groups",
            listed=lambda: nets().security_groups(),
            one=lambda name: nets().security_group(SecurityGroupId(name)),
            create=(SecurityGroupRequest, lambda asked: nets().create_security_group(asked)),
            delete=lambda name: nets().delete_security_group(SecurityGroupId(name)),
        )
        self._noun(
            "routers",
            listed=lambda: nets().routers(),
            one=lambda name: nets().router(RouterId(name)),
            create=(RouterRequest, lambda asked: nets().create_router(asked)),
            change=(RouterChange, lambda name, asked: nets().change_router(RouterId(name), asked)),
            delete=lambda name: nets().delete_router(RouterId(name)),
        )
        self._noun(
            "floating-ips",
            listed=lambda: nets().floating_ips(),
            one=lambda name: nets().floating_ip(FloatingIpId(name)),
            create=(FloatingIpRequest, lambda asked: nets().create_floating_ip(asked)),
            delete=lambda name: nets().delete_floating_ip(FloatingIpId(name)),
        )
        self._noun(
            "load-balancers",
            listed=lambda: nets().load_balancers(),
            one=lambda name: nets().load_balancer(LoadBalancerId(name)),
            create=(LoadBalancerRequest, lambda asked: nets().create_load_balancer(asked)),
            change=(
                LoadBalancerChange,
                lambda name, asked: nets().change_load_balancer(LoadBalancerId(name), asked),
            ),
            delete=lambda name: nets().delete_load_balancer(LoadBalancerId(name)),
        )
        self._others()

    def _noun(
        self,
        noun: str,
        *,
        listed: Callable[[], Awaitable[Any]],
        one: Callable[[str], Awaitable[Any]],
        create: tuple[type[Any], Callable[[Any], Awaitable[Any]]] | None = None,
        change: tuple[type[Any], Callable[[str, Any], Awaitable[Any]]] | None = None,
        delete: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """What all nouns have alike. Creating and changing take a body of the type that is given."""

        @self._routes.get(f"/{noun}")
        async def list_all() -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await listed())

        @self._routes.get(f"/{noun}/{{name}}")
        async def show(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await one(name))

        if create is not None:
            kind, made = create

            @self._routes.post(f"/{noun}")
            async def add(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
                return self._answer(await made(await self._body(request, kind)), status=201)

        if change is not None:
            changes, changed = change

            @self._routes.patch(f"/{noun}/{{name}}")
            async def alter(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
                return self._answer(await changed(name, await self._body(request, changes)))

        if delete is not None:

            @self._routes.delete(f"/{noun}/{{name}}")
            async def remove(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
                await delete(name)
                return Response(status_code=204)

    def _others(self) -> None:
        nets, routes = self._of, self._routes

        @routes.post("/security-groups/{name}/rules")
        async def add_rule(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            rule = await self._body(request, SecurityRule)
            return self._answer(await nets().add_rule(SecurityGroupId(name), rule), status=201)

        @routes.delete("/security-groups/{name}/rules")
        async def remove_rule(  # pyright: ignore[reportUnusedFunction]
            name: str, request: Request
        ) -> Response:
            """The body is the rule: a number might mean another one by now."""
            rule = await self._body(request, SecurityRule)
            return self._answer(await nets().remove_rule(SecurityGroupId(name), rule))

        @routes.put("/floating-ips/{name}/assignment")
        async def assign(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, Assignment)
            return self._answer(await nets().assign_floating_ip(FloatingIpId(name), asked))

        @routes.post("/traces")
        async def trace(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await nets().trace(await self._body(request, TraceRequest)))

        @routes.get("/underlay")
        async def underlay() -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await nets().underlay())

        @routes.put("/underlay")
        async def set_underlay(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await nets().set_underlay(await self._body(request, Underlay)))

        @routes.get("/settling")
        async def settling() -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await nets().settling())
