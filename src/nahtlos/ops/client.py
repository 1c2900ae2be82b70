"""The operator API as a typed client: the same methods as `runtime.controllers.cloud.Cloud`.

Whoever can use a Cloud can use one that is elsewhere. Errors are those of `model.errors`, as the cloud
raised them; Unavailable if it could not be reached. Never retries: after Unavailable a change may have been
made all the same, and only the caller knows whether to repeat it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

import httpx
import msgspec
from websockets.asyncio.client import ClientConnection

from nahtlos.model.blueprint import Campaign, Forecast, HostIntent, Strategy
from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import CampaignId, HostId, ImageId, ReleaseId, ServerId
from nahtlos.model.nouns import Component, HostRole, Release, Size
from nahtlos.model.operators import Listed
from nahtlos.ops.availability_client import AvailabilityClient
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
from nahtlos.ops.dialling import Dial, dial_tls, dial_unix
from nahtlos.ops.network_client import NetworkClient
from nahtlos.ops.placement_client import PlacementClient
from nahtlos.ops.power_client import PowerClient
from nahtlos.ops.project_client import ProjectClient
from nahtlos.ops.server_snapshot_client import ServerSnapshotClient
from nahtlos.ops.volume_client import VolumeClient
from nahtlos.runtime.controllers.cloud import (
    CampaignView,
    CloudEvent,
    HostChange,
    HostView,
    JoinAnswer,
    JoinRequest,
    ServerChange,
    ServerRequest,
    ServerView,
    Status,
)
from nahtlos.runtime.controllers.consoles import ConsoleOutput
from nahtlos.wire.tls import ORCHESTRATOR, orchestrator_client_context

TIMEOUT = 30.0
CONNECT_TIMEOUT = 5.0

_T = TypeVar("_T")


class OperatorClient:
    """Use as an async context manager, or call `close`."""

    def __init__(self, http: httpx.AsyncClient, where: str, dial: Dial) -> None:
        self._http = http
        self._dial = dial
        self.where = where
        self._networks = NetworkClient(self._ask_at)
        self._volumes = VolumeClient(self._ask_at)
        self._projects = ProjectClient(self._ask_at)
        self._power = PowerClient(self._ask_at)
        self._server_snapshots = ServerSnapshotClient(self._ask_at)
        self._availability = AvailabilityClient(self._ask_at)
        self._placement = PlacementClient(self._ask_at)

    @classmethod
    def unix(cls, path: Path, *, timeout: float = TIMEOUT) -> "OperatorClient":
        """Over the orchestrator's unix socket, as root on its machine."""
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        return cls(_http(f"http://{ORCHESTRATOR}", transport, {}, timeout), str(path), dial_unix(path))

    @classmethod
    def tls(
        cls,
        url: str,
        *,
        ca_file: Path,
        token_file: Path | None = None,
        pki_dir: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> "OperatorClient":
        """Over TLS at `url` (https://address:port) with an operator's token or certificate. With neither,
        only `join` is open. Credentials come from files, so that they stay off command lines."""
        if not url.startswith("https://"):
            raise Refused(f"'{url}' does not begin with https://", field="url")
        headers = {"Authorization": f"Bearer {_token(token_file)}"} if token_file else {}
        context = orchestrator_client_context(ca_file, pki_dir)
        return cls(_http(url, _Named(context), headers, timeout), url, dial_tls(url, context, headers))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def networks(self) -> NetworkClient:
        return self._networks

    @property
    def volumes(self) -> VolumeClient:
        return self._volumes

    @property
    def power(self) -> PowerClient:
        return self._power

    @property
    def server_snapshots(self) -> ServerSnapshotClient:
        return self._server_snapshots

    @property
    def availability(self) -> AvailabilityClient:
        return self._availability

    @property
    def projects(self) -> ProjectClient:
        return self._projects

    @property
    def placement(self) -> PlacementClient:
        return self._placement

    # --- the cloud, hosts, releases

    async def status(self) -> Status:
        return await self._get("status", Status)

    async def hosts(self) -> tuple[HostView, ...]:
        return await self._get("hosts", tuple[HostView, ...])

    async def host(self, host: HostId) -> HostView:
        return await self._get(f"hosts/{_part(host)}", HostView)

    async def set_host_intent(self, host: HostId, intent: HostIntent) -> HostView:
        return await self._ask("PUT", f"hosts/{_part(host)}/intent", IntentChange(intent=intent), HostView)

    async def change_host(self, host: HostId, change: HostChange) -> HostView:
        return await self._ask("PATCH", f"hosts/{_part(host)}", change, HostView)

    async def create_join_token(self, host: HostId, role: HostRole, ttl_seconds: int) -> str:
        asked = JoinTokenRequest(host=host, role=role, ttl_seconds=ttl_seconds)
        return (await self._ask("POST", "join-tokens", asked, JoinToken)).token

    async def join(self, request: JoinRequest) -> JoinAnswer:
        return await self._ask("POST", "join", request, JoinAnswer)

    async def releases(self) -> tuple[Release, ...]:
        return await self._get("releases", tuple[Release, ...])

    async def release(self, release: ReleaseId) -> Release:
        return await self._get(f"releases/{_part(release)}", Release)

    async def register_release(self, release: ReleaseId) -> Release:
        return await self._ask("POST", "releases", ReleaseRegistration(release=release), Release)

    async def images(self) -> tuple[ImageId, ...]:
        return await self._get("images", tuple[ImageId, ...])

    async def set_promised(self, promised: Size) -> None:
        await self._ask("PUT", "promised", promised, None)

    # --- operators, for root over the unix socket

    async def operators(self) -> tuple[Listed, ...]:
        return await self._get("operators", tuple[Listed, ...])

    async def add_operator(self, name: str) -> OperatorCredential:
        return await self._ask("POST", "operators", OperatorName(name=name), OperatorCredential)

    async def remove_operator(self, name: str) -> None:
        await self._ask("DELETE", f"operators/{_part(name)}", None, None)

    # --- servers

    async def servers(self) -> tuple[ServerView, ...]:
        return await self._get("servers", tuple[ServerView, ...])

    async def server(self, server: ServerId) -> ServerView:
        return await self._get(f"servers/{_part(server)}", ServerView)

    async def create_server(self, request: ServerRequest) -> ServerView:
        return await self._ask("POST", "servers", request, ServerView)

    async def change_server(self, server: ServerId, change: ServerChange) -> ServerView:
        return await self._ask("PATCH", f"servers/{_part(server)}", change, ServerView)

    async def move_server(self, server: ServerId, to: HostId | None) -> ServerView:
        return await self._ask("POST", f"servers/{_part(server)}/move", MoveRequest(to=to), ServerView)

    async def replace_vmm(self, server: ServerId, by: ReleaseId | None) -> ServerView:
        path = f"servers/{_part(server)}/replacement"
        return await self._ask("POST", path, ReplaceRequest(by=by), ServerView)

    async def delete_server(self, server: ServerId) -> ServerView:
        return await self._ask("DELETE", f"servers/{_part(server)}", None, ServerView)

    async def console_read(self, server: ServerId, offset: int) -> tuple[bytes, int]:
        part = await self._get(f"servers/{_part(server)}/console?offset={offset}", ConsolePart)
        return part.data, part.next_offset

    async def console_write(self, server: ServerId, data: bytes) -> None:
        await self._ask("POST", f"servers/{_part(server)}/console", ConsoleInput(data=data), None)

    async def console_log(self, server: ServerId) -> ConsoleOutput:
        """All that is kept of what it has said."""
        return await self._get(f"servers/{_part(server)}/console/log", ConsoleOutput)

    async def console_stream(self, server: ServerId, **query: str | int | bool) -> ClientConnection:
        """A WebSocket on which `console_frames` are spoken, to be closed by the caller."""
        asked = urlencode({name: int(v) if isinstance(v, bool) else v for name, v in query.items()})
        return await self._dialled(f"servers/{_part(server)}/console/stream?{asked}")

    async def display_stream(self, server: ServerId) -> ClientConnection:
        """A WebSocket with RFB in binary messages, to be closed by the caller."""
        return await self._dialled(f"servers/{_part(server)}/display")

    async def _dialled(self, path: str) -> ClientConnection:
        try:
            return await self._dial(f"/v1/{path}")
        except PermissionError as error:
            raise self._unreachable(error) from error

    # --- upgrades

    async def plan_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> Forecast:
        asked = UpgradeRequest(
            to=to, hosts=hosts, component=component, strategy=strategy, no_way_back=no_way_back
        )
        return await self._ask("POST", "upgrades/plan", asked, Forecast)

    async def start_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> CampaignView:
        asked = UpgradeRequest(
            to=to, hosts=hosts, component=component, strategy=strategy, no_way_back=no_way_back
        )
        return await self._ask("POST", "upgrades", asked, CampaignView)

    async def campaigns(self) -> tuple[Campaign, ...]:
        return await self._get("campaigns", tuple[Campaign, ...])

    async def campaign(self, campaign: CampaignId | None) -> CampaignView:
        return await self._get(f"campaigns/{_part(campaign or NEWEST)}", CampaignView)

    async def pause_upgrade(self) -> CampaignView:
        return await self._ask("POST", "upgrades/pause", None, CampaignView)

    async def resume_upgrade(self) -> CampaignView:
        return await self._ask("POST", "upgrades/resume", None, CampaignView)

    async def cancel_upgrade(self) -> CampaignView:
        return await self._ask("POST", "upgrades/cancel", None, CampaignView)

    async def commit_upgrade(self) -> CampaignView:
        return await self._ask("POST", "upgrades/commit", None, CampaignView)

    async def rollback_upgrade(self) -> CampaignView:
        return await self._ask("POST", "upgrades/rollback", None, CampaignView)

    # --- events

    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]:
        return await self._get(f"events?after={after}&limit={limit}", tuple[CloudEvent, ...])

    async def follow(self, after: int) -> AsyncIterator[CloudEvent]:
        """Events after `after`, then new ones. Ends with Unavailable when the stream breaks: ask again
        with the number of the last event that came."""
        silence = httpx.Timeout(CONNECT_TIMEOUT, read=3 * STREAM_KEEPALIVE)
        try:
            async with self._http.stream(
                "GET", f"/v1/events/stream?after={after}", timeout=silence
            ) as response:
                if response.is_error:
                    raise _error(response, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        yield msgspec.json.decode(line.removeprefix("data: "), type=CloudEvent)
        except (httpx.TransportError, ssl.SSLError) as error:
            raise self._unreachable(error) from error
        raise Unavailable(f"the event stream of {self.where} ended")

    # --- requests

    async def _get(self, path: str, kind: type[_T]) -> _T:
        return await self._ask("GET", path, None, kind)

    async def _ask_at(
        self,
        method: str,
        path: tuple[str, ...],
        body: msgspec.Struct | None,
        kind: type[Any] | None,
        query: str = "",
    ) -> Any:
        where = "/".join(_part(part) for part in path)
        return await self._ask(method, f"{where}?{query}" if query else where, body, kind)

    async def _ask(self, method: str, path: str, body: msgspec.Struct | None, kind: type[_T] | None) -> _T:
        """The decoded answer; `kind` None if none is expected."""
        content = None if body is None else msgspec.json.encode(body)
        try:
            response = await self._http.request(method, f"/v1/{path}", content=content)
        except (httpx.TransportError, ssl.SSLError) as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise _error(response, response.content)
        if kind is None:
            return None  # pyright: ignore[reportReturnType]
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as error:
            raise Unavailable(f"{self.where} answered {path} with something else: {error}") from error

    def _unreachable(self, error: Exception) -> Error:
        what = str(error) or type(error).__name__
        if _caused_by_permission(error):
            return Refused(
                f"{self.where} is for root alone",
                field="user",
                remedy="run it as root, or reach the cloud over TLS with an operator's credential",
            )
        return Unavailable(
            f"no orchestrator answers at {self.where}: {what}", remedy="check that it runs and where"
        )


async def wait_until_ready(client: OperatorClient, *, timeout: float) -> Status:
    """The status of an orchestrator that has just been started. Unavailable after `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    return await client.status()
                except Unavailable:
                    await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise Unavailable(f"no orchestrator answers at {client.where} within {timeout:g} s") from error


class _Named(httpx.AsyncHTTPTransport):
    """TLS to whoever proves to be the orchestrator, at whatever address it is."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, retries=0)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": ORCHESTRATOR}
        return await super().handle_async_request(request)


def _http(
    url: str, transport: httpx.AsyncBaseTransport, headers: dict[str, str], timeout: float
) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        transport=transport,
        headers=headers,
        timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT),
        trust_env=False,
    )


def _caused_by_permission(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, PermissionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _token(file: Path) -> str:
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise Refused(f"cannot read {file}: {error.strerror}", field="token_file") from error
    if not token:
        raise Refused(f"{file} is empty", field="token_file")
    return token


def _part(name: str) -> str:
    """`name` as one segment of a path. An empty one, one of dots or one with a slash would mean another
    path (servers decode %2F before they route)."""
    if name.strip(".") == "" or "/" in name:
        raise Refused(f"'{name}' is no valid name", field="name")
    return quote(name, safe="")


def _error(response: httpx.Response, content: bytes) -> Error:
    try:
        return msgspec.json.decode(content, type=ErrorBody).error.raised()
    except msgspec.DecodeError:
        return Unavailable(f"HTTP {response.status_code} from something that is not an orchestrator")
