"""The operator API: HTTP and JSON over `runtime.controllers.cloud.Cloud`.

Owns paths, status codes, who may call, and the shape of errors: `{"error": ErrorRecord}`. Decides nothing
about the cloud; the structs of `model` and `cloud` are the API's data, encoded and decoded by msgspec.
Never logs a body, a header or a query.

    422 Refused   404 NotFound   409 Conflict, Stale   503 Unavailable   413 body too long
    401 no operator   403 an operator, but not root on the orchestrator's machine
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from nahtlos import __version__
from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import CampaignId, HostId, ReleaseId, ServerId
from nahtlos.model.nouns import Size
from nahtlos.ops.availability_api import availability_routes
from nahtlos.ops.bodies import (
    NEWEST,
    STREAM_KEEPALIVE,
    ConsoleInput,
    ConsolePart,
    ErrorBody,
    IntentChange,
    JoinToken,
    JoinTokenRequest,
    MoveRequest,
    OperatorCredential,
    OperatorName,
    ReleaseRegistration,
    ReplaceRequest,
    UpgradeRequest,
)
from nahtlos.ops.console_api import ConsoleRoutes
from nahtlos.ops.network_api import NetworkRoutes
from nahtlos.ops.placement_api import placement_routes
from nahtlos.ops.power_api import power_routes
from nahtlos.ops.project_api import project_routes
from nahtlos.ops.server_snapshot_api import server_snapshot_routes
from nahtlos.ops.volume_api import VolumeRoutes
from nahtlos.ops.volume_care_api import VolumeCareRoutes
from nahtlos.runtime.controllers.cloud import (
    Cloud,
    CloudEvent,
    HostChange,
    JoinRequest,
    ServerChange,
    ServerRequest,
)
from nahtlos.runtime.identity import Operators, Presented

Authenticate = Callable[[Presented], Awaitable[str | None]]
"""The name of the operator who is proven by what was presented; None if it proves nobody."""

MAX_BODY = 64 << 10
"""Bytes of a request's body."""
MAX_EVENTS = 1000

STATUS: tuple[tuple[type[Error], int], ...] = (
    (NotFound, 404),
    (Conflict, 409),
    (Refused, 422),
    (Stale, 409),
    (Unavailable, 503),
    (Error, 500),
)


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """What root adds operators with."""

    operators: Operators
    ca_file: Path
    """The cloud's own certificate, by which operators know the orchestrator."""


_log = logging.getLogger("nahtlos.ops.api")
_T = TypeVar("_T")


def create_app(cloud: Cloud, authenticate: Authenticate, enrolment: Enrolment | None = None) -> FastAPI:
    """The API over `cloud`. Serve it with `ops.serve`, which finds out what a caller can prove. Without
    `enrolment` operators can be neither added nor removed."""
    app = FastAPI(title="nahtlos operator API", version=__version__, docs_url=None, redoc_url=None)
    _answer_errors(app)

    async def operator(request: Request) -> str:
        name = await authenticate(_presented(request))
        if name is None:
            raise HTTPException(401)
        request.state.operator = name
        return name

    open_routes = APIRouter(prefix="/v1")
    routes = APIRouter(prefix="/v1", dependencies=[Depends(operator), Depends(_logged)])
    _join(open_routes, cloud)
    ConsoleRoutes(lambda: cloud.consoles, lambda asked: authenticate(_presented(asked))).add(open_routes)
    for add in (_status, _hosts, _releases, _servers, _upgrades, _events):
        add(routes, cloud)
    NetworkRoutes(routes, lambda: cloud.networks, _body, _json).add()
    VolumeRoutes(routes, lambda: cloud.volumes, _body, _json).add()
    VolumeCareRoutes(routes, lambda: cloud.volumes.care, _body, _json).add()
    availability_routes(routes, lambda: cloud.availability, _body, _json)
    project_routes(routes, lambda: cloud.projects, _body, _json)
    power_routes(routes, lambda: cloud.power, _body, _json)
    server_snapshot_routes(routes, lambda: cloud.server_snapshots, _body, _json)
    placement_routes(routes, lambda: cloud.placement, _body, _json)
    if enrolment is not None:
        _operators(routes, enrolment)
    app.include_router(open_routes)
    app.include_router(routes)
    return app


# --- routes ------------------------------------------------------------------------------------------


def _join(routes: APIRouter, cloud: Cloud) -> None:
    @routes.post("/join", dependencies=[Depends(_logged)])
    async def join(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Needs no operator: the one-time token in the body is the credential."""
        return _json(await cloud.join(await _body(request, JoinRequest)))


def _status(routes: APIRouter, cloud: Cloud) -> None:
    @routes.get("/status")
    async def status() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.status())

    @routes.get("/images")
    async def images() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.images())

    @routes.put("/promised")
    async def set_promised(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        await cloud.set_promised(await _body(request, Size))
        return Response(status_code=204)


def _hosts(routes: APIRouter, cloud: Cloud) -> None:
    @routes.get("/hosts")
    async def hosts() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.hosts())

    @routes.get("/hosts/{host}")
    async def host(host: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.host(HostId(host)))

    @routes.put("/hosts/{host}/intent")
    async def set_intent(host: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        change = await _body(request, IntentChange)
        return _json(await cloud.set_host_intent(HostId(host), change.intent))

    @routes.patch("/hosts/{host}")
    async def change(host: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.change_host(HostId(host), await _body(request, HostChange)))

    @routes.post("/join-tokens")
    async def join_token(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, JoinTokenRequest)
        token = await cloud.create_join_token(asked.host, asked.role, asked.ttl_seconds)
        return _json(JoinToken(token=token), status=201)


def _releases(routes: APIRouter, cloud: Cloud) -> None:
    @routes.get("/releases")
    async def releases() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.releases())

    @routes.get("/releases/{release}")
    async def release(release: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.release(ReleaseId(release)))

    @routes.post("/releases")
    async def register(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, ReleaseRegistration)
        return _json(await cloud.register_release(asked.release), status=201)


def _servers(routes: APIRouter, cloud: Cloud) -> None:
    @routes.get("/servers")
    async def servers() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.servers())

    @routes.post("/servers")
    async def create(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.create_server(await _body(request, ServerRequest)), status=201)

    @routes.get("/servers/{server}")
    async def server(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.server(ServerId(server)))

    @routes.patch("/servers/{server}")
    async def change(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, ServerChange)
        return _json(await cloud.change_server(ServerId(server), asked))

    @routes.delete("/servers/{server}")
    async def delete(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.delete_server(ServerId(server)), status=202)

    @routes.post("/servers/{server}/move")
    async def move(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, MoveRequest)
        return _json(await cloud.move_server(ServerId(server), asked.to), status=202)

    @routes.post("/servers/{server}/replacement")
    async def replace(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, ReplaceRequest)
        return _json(await cloud.replace_vmm(ServerId(server), asked.by), status=202)

    @routes.get("/servers/{server}/console")
    async def console_read(  # pyright: ignore[reportUnusedFunction]
        server: str, offset: Annotated[int, Query(ge=0)] = 0
    ) -> Response:
        data, following = await cloud.console_read(ServerId(server), offset)
        return _json(ConsolePart(data=data, next_offset=following))

    @routes.get("/servers/{server}/console/log")
    async def console_log(server: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.consoles.log(ServerId(server)))

    @routes.post("/servers/{server}/console")
    async def console_write(  # pyright: ignore[reportUnusedFunction]
        server: str, request: Request
    ) -> Response:
        await cloud.console_write(ServerId(server), (await _body(request, ConsoleInput)).data)
        return Response(status_code=204)


def _upgrades(routes: APIRouter, cloud: Cloud) -> None:
    @routes.post("/upgrades/plan")
    async def plan(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, UpgradeRequest)
        how = (asked.component, asked.strategy, asked.no_way_back)
        return _json(await cloud.plan_upgrade(asked.to, asked.hosts, *how))

    @routes.post("/upgrades")
    async def start(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await _body(request, UpgradeRequest)
        how = (asked.component, asked.strategy, asked.no_way_back)
        view = await cloud.start_upgrade(asked.to, asked.hosts, *how)
        return _json(view, status=201)

    @routes.post("/upgrades/pause")
    async def pause() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.pause_upgrade())

    @routes.post("/upgrades/resume")
    async def resume() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.resume_upgrade())

    @routes.post("/upgrades/cancel")
    async def cancel() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.cancel_upgrade())

    @routes.post("/upgrades/commit")
    async def commit_upgrade() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.commit_upgrade())

    @routes.post("/upgrades/rollback")
    async def rollback_upgrade() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.rollback_upgrade())

    @routes.get("/campaigns")
    async def campaigns() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.campaigns())

    @routes.get("/campaigns/{campaign}")
    async def campaign(campaign: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(await cloud.campaign(None if campaign == NEWEST else CampaignId(campaign)))


def _operators(routes: APIRouter, enrolment: Enrolment) -> None:
    """For root alone: an operator's credential, once stolen, shall not make others."""
    operators = enrolment.operators

    @routes.get("/operators", dependencies=[Depends(_root)])
    async def listed() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(operators.listed())

    @routes.post("/operators", dependencies=[Depends(_root)])
    async def add(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        name = (await _body(request, OperatorName)).name
        ca_pem = enrolment.ca_file.read_text()
        token = operators.add_token(name)
        return _json(OperatorCredential(name=name, token=token, ca_pem=ca_pem), status=201)

    @routes.delete("/operators/{operator}", dependencies=[Depends(_root)])
    async def remove(operator: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        operators.remove(operator)
        return Response(status_code=204)


def _events(routes: APIRouter, cloud: Cloud) -> None:
    @routes.get("/events")
    async def page(  # pyright: ignore[reportUnusedFunction]
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
    ) -> Response:
        return _json(await cloud.events(after, limit))

    @routes.get("/events/stream")
    async def stream(  # pyright: ignore[reportUnusedFunction]
        request: Request, after: Annotated[int, Query(ge=0)] = 0
    ) -> Response:
        """Server-sent events; a client that reconnects goes on after its `Last-Event-ID`."""
        last = request.headers.get("last-event-id", "")
        start = int(last) if last.isdecimal() else after
        return StreamingResponse(
            event_stream(cloud.follow(start)),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )


# --- events ------------------------------------------------------------------------------------------


async def event_stream(events: AsyncIterator[CloudEvent]) -> AsyncIterator[bytes]:
    """`events` as server-sent events, with a comment whenever nothing happens for a while."""
    yield b": nahtlos\n\n"
    following = asyncio.ensure_future(_next(events))
    try:
        while True:
            done, _ = await asyncio.wait((following,), timeout=STREAM_KEEPALIVE)
            if not done:
                yield b": still here\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield b"id: %d\ndata: %s\n\n" % (event.number, msgspec.json.encode(event))
            following = asyncio.ensure_future(_next(events))
    finally:
        following.cancel()
        await asyncio.wait((following,))
        if not following.cancelled():
            following.exception()


async def _next(events: AsyncIterator[CloudEvent]) -> CloudEvent | None:
    return await anext(events, None)


# --- callers -----------------------------------------------------------------------------------------


def _presented(request: HTTPConnection) -> Presented:
    """What the listener found out about the connection, and the token in the request, if any."""
    proven: Presented = getattr(request.state, "presented", Presented())
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return msgspec.structs.replace(proven, bearer=token.strip())
    return proven


async def _root(request: Request) -> None:
    """What the kernel said of the connection counts, not the name of an operator."""
    if _presented(request).peer_uid != 0:
        raise HTTPException(403)


async def _logged(request: Request) -> AsyncIterator[None]:
    """One line for everything that changes something: who, what, whether it was accepted."""
    try:
        yield
    except Exception as error:
        if request.method != "GET":
            _log.info("%s %s %s: %s", *_who_what(request), type(error).__name__)
        raise
    if request.method != "GET":
        _log.info("%s %s %s: ok", *_who_what(request))


def _who_what(request: Request) -> tuple[str, str, str]:
    return getattr(request.state, "operator", "nobody"), request.method, request.url.path


# --- bodies and errors -------------------------------------------------------------------------------


async def _body(request: Request, kind: type[_T]) -> _T:
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > MAX_BODY:
            raise HTTPException(413)
    try:
        return msgspec.json.decode(bytes(received), type=kind)
    except msgspec.DecodeError as error:
        raise Refused(
            str(error), field=_field_of(error), remedy="see the operator API's reference"
        ) from error


_PATH = re.compile(r"`\$\.?([^`]*)`$")
_MISSING = re.compile(r"required field `([^`]+)`")


def _field_of(error: msgspec.DecodeError) -> str:
    """The field a decoder's message is about, `body` if it is about the whole."""
    message = str(error)
    path = match.group(1) if (match := _PATH.search(message)) else ""
    missing = match.group(1) if (match := _MISSING.search(message)) else ""
    return ".".join(part for part in (path, missing) if part) or "body"


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _error(record: ErrorRecord, status: int, headers: dict[str, str] | None = None) -> Response:
    body = msgspec.json.encode(ErrorBody(error=record))
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _answer_errors(app: FastAPI) -> None:
    async def known(_request: Request, error: Exception) -> Response:
        status = next(code for kind, code in STATUS if isinstance(error, kind))
        return _error(ErrorRecord.of(error), status, {"Retry-After": "1"} if status == 503 else None)

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part not in ("query", "path"))
        return _error(ErrorRecord(kind=Refused.kind, message=str(first["msg"]), field=field), 422)

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else None
        return _error(_http_record(error), error.status_code, headers)

    async def bug(_request: Request, _error_: Exception) -> Response:
        # What happened is in the log; its text might hold what a caller must not see.
        return _error(ErrorRecord(kind="bug", message="internal error; the log says more"), 500)

    app.add_exception_handler(Error, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _http_record(error: HTTPException) -> ErrorRecord:
    if error.status_code == 401:
        return ErrorRecord(
            kind=Refused.kind,
            message="no operator's credential",
            field="authorization",
            remedy="use the unix socket as root, an operator's token or an operator's certificate",
        )
    if error.status_code == 403:
        return ErrorRecord(
            kind=Refused.kind,
            message="operators are added and removed by root alone",
            field="authorization",
            remedy="do it as root on the orchestrator's machine, over its unix socket",
        )
    if error.status_code == 413:
        return ErrorRecord(kind=Refused.kind, message=f"body of more than {MAX_BODY} bytes", field="body")
    kind = NotFound.kind if error.status_code == 404 else Refused.kind
    return ErrorRecord(kind=kind, message=f"no such path or method ({error.detail})", field="path")
