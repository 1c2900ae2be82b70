"""The operator API and its client at real sockets: every call, every error, who may call."""

import asyncio
import logging
import socket
import ssl
from typing import Any

import httpx
import msgspec
import pytest

from nahtlos.model.blueprint import CampaignState, HostIntent
from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import CampaignId, HostId, ImageId, ReleaseId, ServerId
from nahtlos.model.nouns import Component, HostRole, Size
from nahtlos.ops import api
from nahtlos.ops.client import OperatorClient, wait_until_ready
from nahtlos.ops.serve import TlsPlace, serving
from nahtlos.runtime.controllers.cloud import Cloud, JoinRequest, ServerRequest
from nahtlos.wire.tls import ORCHESTRATOR, orchestrator_client_context

HOST = HostId("host-1")
SERVER = ServerId("web-1")
NEW = ReleaseId("qemu-11.1.3-000000000002")


# --- every call --------------------------------------------------------------------------------------


async def test_hosts_and_status(reachable: Any) -> None:
    async with reachable.unix() as client:
        assert (await client.status()).orchestrator_epoch == 3
        assert [h.id for h in await client.hosts()] == ["host-1", "host-2"]
        assert (await client.host(HOST)).servers == (SERVER,)
        assert (await client.set_host_intent(HOST, HostIntent.DRAINED)).intent is HostIntent.DRAINED
        await client.set_promised(Size(vcpus=3, memory_mib=700))
    assert reachable.cloud.intents[HOST] is HostIntent.DRAINED
    assert reachable.cloud.promised == Size(vcpus=3, memory_mib=700)


async def test_joining_takes_a_token_once_and_no_operator(reachable: Any) -> None:
    async with reachable.unix() as client:
        token = await client.create_join_token(HostId("host-3"), HostRole.EDGE, 60)
    request = JoinRequest(
        token=token,
        host=HostId("host-3"),
        role=HostRole.EDGE,
        address="10.99.0.13",
        peer_port=7444,
        csr_pem="request",
    )
    async with reachable.tls() as newcomer:
        assert (await newcomer.join(request)).certificate_pem == "certificate"
        with pytest.raises(Refused) as caught:
            await newcomer.join(request)
        assert caught.value.field == "token"


async def test_releases_and_images(reachable: Any) -> None:
    async with reachable.unix() as client:
        assert [r.version for r in await client.releases()] == ["10.0.8", "11.1.3"]
        assert (await client.release(NEW)).id == NEW
        assert (await client.register_release(NEW)).id == NEW
        assert await client.images() == (ImageId("checker-1"),)


async def test_servers(reachable: Any) -> None:
    async with reachable.unix() as client:
        created = await client.create_server(ServerRequest(name="web-2", host=HOST))
        assert (created.id, created.host) == ("web-2", HOST)
        assert [s.id for s in await client.servers()] == ["web-1", "web-2"]
        assert (await client.move_server(SERVER, HostId("host-2"))).host == "host-2"
        assert (await client.move_server(SERVER, None)).host == "host-2"
        assert (await client.delete_server(SERVER)).id == SERVER
        with pytest.raises(NotFound):
            await client.server(SERVER)


async def test_the_console_carries_any_bytes(reachable: Any) -> None:
    async with reachable.unix() as client:
        data, following = await client.console_read(SERVER, 0)
        await client.console_write(SERVER, b"\x00\xffroot\n")
        assert data == b"login: "
        assert await client.console_read(SERVER, following) == (b"\x00\xffroot\n", following + 7)


async def test_upgrades(reachable: Any) -> None:
    async with reachable.unix() as client:
        assert (await client.plan_upgrade(NEW, None)).total_moves == 1
        assert len((await client.plan_upgrade(NEW, (HOST,))).hosts) == 1
        assert (await client.plan_upgrade(NEW, None, Component.STORAGE)).component is Component.STORAGE
        assert await client.campaigns() == ()
        assert (await client.start_upgrade(NEW, None)).campaign.state is CampaignState.RUNNING
        assert (await client.pause_upgrade()).campaign.state is CampaignState.PAUSED
        assert (await client.resume_upgrade()).campaign.state is CampaignState.RUNNING
        with pytest.raises(Conflict, match="c-1 runs"):
            await client.start_upgrade(NEW, None)
        assert (await client.cancel_upgrade()).campaign.state is CampaignState.CANCELLED
        assert (await client.campaign(None)).campaign.id == "c-1"
        assert (await client.campaign(CampaignId("c-1"))).hosts_upgraded == 1
        assert [c.id for c in await client.campaigns()] == ["c-1"]


async def test_a_campaign_goes_back_until_it_is_committed(reachable: Any) -> None:
    async with reachable.unix() as client:
        assert (await client.plan_upgrade(NEW, None)).returns
        assert not (await client.plan_upgrade(NEW, None, no_way_back=True)).returns
        assert (await client.start_upgrade(NEW, None)).campaign.returns
        assert (await client.rollback_upgrade()).campaign.rolled_back
        assert (await client.commit_upgrade()).campaign.committed
        with pytest.raises(Conflict, match="point of no return") as refusal:
            await client.rollback_upgrade()
        assert refusal.value.field == "campaign" and refusal.value.remedy


# --- events ------------------------------------------------------------------------------------------


async def test_events_by_page(reachable: Any) -> None:
    for text in "abc":
        await reachable.cloud.say(text)
    async with reachable.unix() as client:
        assert [e.text for e in await client.events(1, 10)] == ["b", "c"]
        assert [e.number for e in await client.events(0, 2)] == [1, 2]


async def test_events_as_they_happen(reachable: Any) -> None:
    await reachable.cloud.say("before")
    seen: list[str] = []
    follows = asyncio.Event()

    async def follow(client: OperatorClient) -> None:
        async for event in client.follow(0):
            seen.append(event.text)
            follows.set()
            if len(seen) == 3:
                return

    async with reachable.unix() as client, asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(follow(client))
        await follows.wait()
        await reachable.cloud.say("during")
        await reachable.cloud.say("after: ✓ \n data: x")
    assert seen == ["before", "during", "after: ✓ \n data: x"]


async def test_a_stream_goes_on_after_the_last_event_seen(reachable: Any) -> None:
    for text in "abc":
        await reachable.cloud.say(text)
    transport = httpx.AsyncHTTPTransport(uds=str(reachable.socket))
    async with (
        httpx.AsyncClient(base_url="http://x", transport=transport) as http,
        http.stream("GET", "/v1/events/stream", headers={"Last-Event-ID": "2"}) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("id:"):
                assert line == "id: 3"
                break


async def test_a_silent_stream_says_that_it_is_there(reachable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "STREAM_KEEPALIVE", 0.05)
    parts = api.event_stream(reachable.cloud.follow(0))
    assert [await anext(parts) for _ in range(3)][1:] == [b": still here\n\n"] * 2
    await parts.aclose()  # type: ignore[attr-defined]


async def test_a_stream_that_breaks_is_unavailable(reachable: Any) -> None:
    async with reachable.unix() as client:
        stream = client.follow(0)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    nobody = OperatorClient.unix(reachable.socket.with_name("nobody.sock"))
    with pytest.raises(Unavailable):
        await anext(nobody.follow(0))
    await nobody.close()


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refused("no", field="f", remedy="r"), 422),
        (NotFound("no", field="f", remedy="r"), 404),
        (Conflict("no", field="f", remedy="r"), 409),
        (Stale("no", field="f", remedy="r"), 409),
        (Unavailable("no", field="f", remedy="r"), 503),
    ],
)
async def test_errors_arrive_as_they_were_raised(reachable: Any, error: Error, status: int) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(reachable.socket))
    async with httpx.AsyncClient(base_url="http://x", transport=transport) as http:
        reachable.cloud.fails = error
        response = await http.get("/v1/status")
        assert response.status_code == status
        assert response.json() == {
            "error": {"kind": error.kind, "message": "no", "field": "f", "remedy": "r"}
        }
    async with reachable.unix() as client:
        reachable.cloud.fails = error
        with pytest.raises(type(error)) as caught:
            await client.status()
    assert type(caught.value) is type(error)
    assert (caught.value.message, caught.value.field, caught.value.remedy) == ("no", "f", "r")


async def test_a_bug_tells_the_log_and_not_the_caller(
    reachable: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(reachable.cloud, "status", broken)
    async with reachable.unix() as client:
        with pytest.raises(Error, match="internal error") as caught:
            await client.status()
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "servers", b"{", "body"),
        ("POST", "servers", b"", "body"),
        ("POST", "servers", b"[]", "body"),
        ("POST", "servers", b"{}", "name"),
        ("POST", "servers", b'{"name": "a", "vcpus": "many"}', "vcpus"),
        ("POST", "servers", b'{"name": "Bad Name"}', "name"),
        ("PUT", "hosts/host-1/intent", b'{"intent": "sleeping"}', "intent"),
        ("POST", "upgrades", b'{"to": "x", "hosts": [1]}', "hosts[0]"),
        ("POST", "join-tokens", b'{"host": "host-9", "ttl_seconds": 0}', "ttl_seconds"),
        ("GET", "events?after=soon", b"", "after"),
        ("GET", "events?limit=0", b"", "limit"),
    ],
)
async def test_bad_input_names_its_field(
    reachable: Any, method: str, path: str, body: bytes, field: str
) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(reachable.socket))
    async with httpx.AsyncClient(base_url="http://x", transport=transport) as http:
        response = await http.request(method, f"/v1/{path}", content=body)
    assert response.status_code == 422
    assert response.json()["error"]["kind"] == "refused"
    assert response.json()["error"]["field"] == field


async def test_unknown_paths_and_methods_have_the_same_shape(reachable: Any) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(reachable.socket))
    async with httpx.AsyncClient(base_url="http://x", transport=transport) as http:
        for method, path, status in (("GET", "/v1/nothing", 404), ("PATCH", "/v1/servers", 405)):
            response = await http.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["field"] == "path"


async def test_a_long_body_is_refused_before_it_is_read_whole(reachable: Any) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(reachable.socket))
    async with httpx.AsyncClient(base_url="http://x", transport=transport) as http:
        response = await http.post("/v1/servers", content=b"x" * (api.MAX_BODY + 1))
    assert response.status_code == 413
    assert response.json()["error"]["field"] == "body"


async def test_names_cannot_leave_their_place_in_a_path(reachable: Any) -> None:
    async with reachable.unix() as client:
        for name in ("web-1?x", "web 1", "%2e%2e", "web-1%2fconsole"):
            with pytest.raises(NotFound):
                await client.server(ServerId(name))
        for name in ("", ".", "..", "../status", "web-1/console"):
            with pytest.raises(Refused):
                await client.server(ServerId(name))


async def test_something_else_at_the_place_is_unavailable(tmp_path: Any) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    listening = await asyncio.start_unix_server(other, str(tmp_path / "s"))
    async with listening, OperatorClient.unix(tmp_path / "s") as client:
        with pytest.raises(Unavailable, match="something else"):
            await client.status()


async def test_waiting_for_an_orchestrator_has_an_end(tmp_path: Any, reachable: Any) -> None:
    async with reachable.unix() as client:
        assert (await wait_until_ready(client, timeout=1)).leader
    async with OperatorClient.unix(tmp_path / "nobody") as client:
        with pytest.raises(Unavailable, match=r"within 0\.2 s"):
            await wait_until_ready(client, timeout=0.2)


# --- who may call ------------------------------------------------------------------------------------


async def test_the_unix_socket_is_for_root_alone(reachable: Any) -> None:
    assert reachable.socket.stat().st_mode & 0o777 == 0o600


async def test_over_tls_a_token_or_a_listed_certificate_proves_an_operator(reachable: Any) -> None:
    async with reachable.tls(token_file=reachable.token_file) as client:
        assert (await client.status()).leader
    async with reachable.tls(party="alice") as client:
        assert (await client.status()).leader


@pytest.mark.parametrize("party", [None, "host-1", "mallory", "orchestrator"])
async def test_over_tls_nobody_else_is_an_operator(reachable: Any, party: str | None) -> None:
    async with reachable.tls(party=party) as client:
        for call in (client.status, client.hosts, client.cancel_upgrade):
            with pytest.raises(Refused) as caught:
                await call()
            assert caught.value.field == "authorization"
        with pytest.raises(Refused):
            await anext(client.follow(0))


async def test_a_wrong_token_proves_nobody_and_is_not_logged(
    reachable: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with reachable.tls(token_file=reachable.pki / "wrong-token") as client:
        with pytest.raises(Refused, match="credential"):
            await client.create_server(ServerRequest(name="web-9"))
    assert "guessed" not in _ours(caplog)
    assert "web-9" not in reachable.cloud.places


async def test_changes_are_logged_with_the_operator_and_without_bodies(
    reachable: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    token = reachable.token_file.read_text().strip()
    async with reachable.tls(token_file=reachable.token_file) as client:
        await client.console_write(SERVER, b"hunter2")
        with pytest.raises(NotFound):
            await client.delete_server(ServerId("none"))
        given = await client.create_join_token(HostId("host-3"), HostRole.COMPUTE, 60)
    assert "bob POST /v1/servers/web-1/console: ok" in caplog.text
    assert "bob DELETE /v1/servers/none: NotFound" in caplog.text
    for secret in (token, "hunter2", given):
        assert secret not in _ours(caplog)


def _ours(caplog: pytest.LogCaptureFixture) -> str:
    """The log without what the HTTP client on the caller's side writes."""
    return "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("httpc"))


async def test_a_credential_goes_to_the_orchestrator_only(reachable: Any, pki: Any) -> None:
    """A host of the same cloud listens where the orchestrator should."""
    app = api.create_app(reachable.cloud, _anybody)
    place = TlsPlace(address="127.0.0.1", port=0, pki_dir=pki / "host-1")
    async with (
        serving(app, tls=place) as impostor,
        OperatorClient.tls(
            f"https://127.0.0.1:{impostor.tls_port}",
            ca_file=reachable.ca_file,
            token_file=reachable.token_file,
        ) as client,
    ):
        with pytest.raises(Unavailable, match="certificate"):
            await client.status()


async def _anybody(_presented: object) -> str:
    return "anybody"


async def test_no_plain_http_at_the_tls_port(reachable: Any) -> None:
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.TransportError):
            await http.get(reachable.url.replace("https", "http") + "/v1/status")


async def test_only_current_tls(reachable: Any) -> None:
    context = orchestrator_client_context(reachable.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    port = int(reachable.url.rsplit(":", 1)[1])
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=ORCHESTRATOR)


async def test_places_that_are_taken_are_unavailable(reachable: Any, pki: Any, tmp_path: Any) -> None:
    app = api.create_app(reachable.cloud, _anybody)
    port = int(reachable.url.rsplit(":", 1)[1])
    with pytest.raises(Unavailable, match="cannot listen"):
        async with serving(app, tls=TlsPlace(address="127.0.0.1", port=port, pki_dir=pki / "orchestrator")):
            pass
    with pytest.raises(Refused, match="longer than"):
        async with serving(app, unix_socket=tmp_path / ("x" * 108)):
            pass


async def test_requests_are_answered_when_the_server_is_told_to_end(
    cloud: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orchestrator that is replaced leaves no caller without an answer."""
    asked, ready = asyncio.Event(), asyncio.Event()
    answer = await cloud.status()

    async def slow() -> Any:
        asked.set()
        await asyncio.sleep(0.3)
        return answer

    monkeypatch.setattr(cloud, "status", slow)

    async def serve() -> None:
        async with serving(api.create_app(cloud, _anybody), unix_socket=tmp_path / "s"):
            ready.set()
            await asyncio.Event().wait()

    server = asyncio.ensure_future(serve())
    await ready.wait()
    async with OperatorClient.unix(tmp_path / "s") as client, asyncio.TaskGroup() as group:
        call = group.create_task(client.status())
        await asked.wait()
        server.cancel()
    assert call.result() == answer
    with pytest.raises(asyncio.CancelledError):
        await server


async def test_it_serves_on_inherited_sockets(cloud: Any, pki: Any) -> None:
    held = socket.create_server(("127.0.0.1", 0))
    app = api.create_app(cloud, _anybody)
    async with (
        serving(app, tls=held.dup(), pki_dir=pki / "orchestrator") as listening,
        OperatorClient.tls(
            f"https://127.0.0.1:{listening.tls_port}", ca_file=pki / "ca" / "ca.pem"
        ) as client,
    ):
        assert (await client.status()).leader
    held.close()


def test_every_call_of_the_cloud_is_in_the_client() -> None:
    calls = {name for name, member in vars(Cloud).items() if callable(member) and not name.startswith("_")}
    assert calls <= vars(OperatorClient).keys()


def test_structs_travel_unchanged() -> None:
    request = JoinRequest(
        token="t", host=HOST, role=HostRole.COMPUTE, address="10.99.0.11", peer_port=7444, csr_pem="c"
    )
    assert msgspec.json.decode(msgspec.json.encode(request), type=JoinRequest) == request
