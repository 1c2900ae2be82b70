"""A cloud in memory behind the operator API, and ways to reach it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main
from click.testing import CliRunner, Result
from scripted_cloud import ScriptedCloud, opened

from nahtlos.model.blueprint import (
    Campaign,
    CampaignState,
    CapacityReport,
    Forecast,
    ForecastHost,
    ForecastMove,
    HostIntent,
    HostPhase,
    Strategy,
    Waiting,
    WaitKind,
)
from nahtlos.model.errors import Conflict, Error, NotFound, Refused
from nahtlos.model.ids import CampaignId, HostId, ImageId, ReleaseId, ServerId, checked_name
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Component, HostRole, Release, Size
from nahtlos.ops.api import Enrolment, create_app
from nahtlos.ops.cli.app import build_app
from nahtlos.ops.cli.command import Surroundings
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.serve import Listening, TlsPlace, serving
from nahtlos.runtime.controllers import leader
from nahtlos.runtime.controllers.cloud import (
    CampaignView,
    CloudEvent,
    HostView,
    JoinAnswer,
    JoinRequest,
    ServerRequest,
    ServerView,
    Status,
)
from nahtlos.runtime.controllers.consoles import ConsoleOutput, ConsolePlace
from nahtlos.runtime.identity import CertificateAuthority, Operators

OLD = ReleaseId("qemu-10.0.8-000000000001")
NEW = ReleaseId("qemu-11.1.3-000000000002")
CAPACITY = CapacityReport(
    promised=Size(vcpus=2, memory_mib=512), in_service=Size(vcpus=8, memory_mib=4096), share=1.0
)
SIZE = Size(vcpus=1, memory_mib=256)
Run = Callable[..., Awaitable[Result]]


class FakeConsoles:
    """Of one server, whose history begins anew when `FakeCloud.history` changes."""

    def __init__(self, cloud: "FakeCloud") -> None:
        self._cloud = cloud

    async def log(self, server: ServerId) -> ConsoleOutput:
        data, _ = await self._cloud.console_read(server, 0)
        return ConsoleOutput(history=self._cloud.history, offset=0, data=data)

    async def follow(self, server: ServerId, place: ConsolePlace) -> AsyncGenerator[ConsoleOutput]:
        while True:
            data, _ = await self._cloud.console_read(server, 0)
            anew = place.history not in ("", self._cloud.history)
            offset = 0 if anew else place.offset
            if anew or data[offset:]:
                part = ConsoleOutput(
                    history=self._cloud.history,
                    offset=offset,
                    data=data[offset:],
                    dropped=None if anew else 0,
                )
                place = part.end
                yield part
                self._cloud.shown = place.offset
            self._cloud.followed.set()
            await asyncio.sleep(0.01)

    def claim(self, server: ServerId, session: str, *, force: bool) -> bool:
        if force or self._cloud.writer in ("", session):
            self._cloud.writer = session
        return self._cloud.writer == session

    def release(self, server: ServerId, session: str) -> None:
        if self._cloud.writer == session:
            self._cloud.writer = ""

    async def type(self, server: ServerId, session: str, data: bytes) -> None:
        if self._cloud.writer != session:
            raise Conflict("another session types", field="session")
        if self._cloud.type_error is not None:
            raise self._cloud.type_error
        await self._cloud.console_write(server, data)

    async def display(self, server: ServerId) -> Any:
        return await self._cloud.display(server)


class FakeCloud:
    """Remembers what it was asked; every change happens at once. `fails` makes the next call fail."""

    def __init__(self) -> None:
        self.fails: Error | None = None
        self.intents = dict.fromkeys((HostId("host-1"), HostId("host-2")), HostIntent.ACTIVE)
        self.places: dict[ServerId, HostId] = {ServerId("web-1"): HostId("host-1")}
        self.console = b"login: "
        self.history = "h-1"
        self.writer = ""
        self.display: Any = None
        """Opens one."""
        self.followed = asyncio.Event()
        self.type_error: Error | None = None
        self.shown = 0
        """How far whoever follows the console has been sent it."""
        self.state: CampaignState | None = None
        self.component = Component.HYPERVISOR
        self.strategy = Strategy.AUTO
        self.turned: dict[str, bool] = {}
        """Of the campaign, whether it has a way back."""
        self.promised: Size | None = None
        self.tokens: list[str] = []
        self.log: list[CloudEvent] = []
        self.settles = True
        """Whether what is asked for comes about."""
        self.told = asyncio.Condition()

    def _may_fail(self) -> None:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error

    async def status(self) -> Status:
        self._may_fail()
        return Status(
            version="0.1.0",
            orchestrator_epoch=3,
            leader=True,
            blueprint="bp-7",
            converged=True,
            waiting=(),
            capacity=CAPACITY,
            time=1000.0,
        )

    def _host(self, host: HostId) -> HostView:
        if host not in self.intents:
            raise NotFound(f"there is no host '{host}'", field="host", remedy="see host list")
        return HostView(
            id=host,
            role=HostRole.COMPUTE,
            address="10.99.0.11",
            intent=self.intents[host],
            phase=HostPhase.DRAINED if self.intents[host] == HostIntent.DRAINED else HostPhase.SERVING,
            connected=True,
            release=OLD,
            verified_release=OLD,
            accelerator=None,
            capacity=Size(vcpus=4, memory_mib=2048),
            used=SIZE,
            servers=tuple(s for s, h in self.places.items() if h == host),
            generation=5,
            target_generation=5,
            seen_at=999.0,
        )

    async def hosts(self) -> tuple[HostView, ...]:
        self._may_fail()
        return tuple(self._host(h) for h in self.intents)

    async def host(self, host: HostId) -> HostView:
        return self._host(host)

    async def set_host_intent(self, host: HostId, intent: HostIntent) -> HostView:
        self._host(host)
        self.intents[host] = intent
        return self._host(host)

    async def create_join_token(self, host: HostId, role: HostRole, ttl_seconds: int) -> str:
        checked_name(host, "host")
        self.tokens.append(f"token-{host}-{role}-{ttl_seconds}")
        return self.tokens[-1]

    async def join(self, request: JoinRequest) -> JoinAnswer:
        if request.token not in self.tokens:
            raise Refused("unknown or used join token", field="token", remedy="ask for a new one")
        self.tokens.remove(request.token)
        return JoinAnswer(certificate_pem="certificate", ca_pem="ca")

    async def releases(self) -> tuple[Release, ...]:
        return (await self.release(OLD), await self.release(NEW))

    async def release(self, release: ReleaseId) -> Release:
        if release not in (OLD, NEW):
            raise NotFound(f"there is no release '{release}'", field="release", remedy="build it")
        version = release.split("-")[1]
        return Release(
            id=release,
            component=Component.HYPERVISOR,
            version=version,
            suite="trixie",
            digest=release[-12:] + "0" * 52,
            machine_types=("pc-q35-10.0",),
        )

    async def register_release(self, release: ReleaseId) -> Release:
        return await self.release(release)

    async def images(self) -> tuple[ImageId, ...]:
        return (ImageId("checker-1"),)

    def _server(self, server: ServerId) -> ServerView:
        if server not in self.places:
            raise NotFound(f"there is no server '{server}'", field="server", remedy="see server list")
        return ServerView(
            id=server,
            host=self.places[server],
            epoch=1,
            state=RunState.RUNNING if self.settles else RunState.STARTING,
            release=OLD,
            size=SIZE,
            ip="10.77.0.10",
            mac="52:54:00:4d:00:0a",
            volume_host=HostId("host-2"),
            moving_to=None,
            waits_for="" if self.settles else "host-1 must start it",
            created_at=900.0,
        )

    async def servers(self) -> tuple[ServerView, ...]:
        return tuple(self._server(s) for s in self.places)

    async def server(self, server: ServerId) -> ServerView:
        self._may_fail()
        return self._server(server)

    async def create_server(self, request: ServerRequest) -> ServerView:
        self._may_fail()
        name = ServerId(checked_name(request.name, "name"))
        if name in self.places:
            raise Conflict(f"there is a server '{name}' already", field="name", remedy="choose another name")
        self.places[name] = request.host or HostId("host-1")
        return self._server(name)

    async def move_server(self, server: ServerId, to: HostId | None) -> ServerView:
        self._may_fail()
        before = self._server(server)
        if to is not None:
            self._host(to)
        if self.settles:
            self.places[server] = to or HostId("host-2")
            return self._server(server)
        return msgspec.structs.replace(before, moving_to=to or HostId("host-2"))

    async def delete_server(self, server: ServerId) -> ServerView:
        view = self._server(server)
        if self.settles:
            del self.places[server]
        return view

    @property
    def consoles(self) -> "FakeConsoles":
        return FakeConsoles(self)

    async def console_read(self, server: ServerId, offset: int) -> tuple[bytes, int]:
        self._server(server)
        return self.console[offset:], len(self.console)

    async def console_write(self, server: ServerId, data: bytes) -> None:
        self._server(server)
        self.console += data

    async def plan_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> Forecast:
        await self.release(to)
        move = ForecastMove(
            server=ServerId("web-1"),
            source=HostId("host-1"),
            destination=HostId("host-2"),
            seconds=4.5,
            gap_ms=55.0,
            gap_ms_max=90.0,
        )
        chosen = hosts or tuple(self.intents)
        return Forecast(
            to_release=to,
            component=component,
            strategy=strategy,
            hosts=tuple(
                ForecastHost(
                    host=h, from_release=OLD, to_release=to, moves=(move,) if not i else (), seconds=12.0
                )
                for i, h in enumerate(chosen)
            ),
            total_moves=1,
            moves_per_server=1.0,
            seconds=24.0,
            gap_ms_p50=55.0,
            capacity_floor=1.0,
            blockers=(
                Waiting(subject="host-2", kind=WaitKind.BLOCKED, reason="not connected", remedy="start it"),
            )
            if hosts == (HostId("host-2"),)
            else (),
            basis="measured",
            returns=component is Component.HYPERVISOR and not no_way_back,
        )

    async def start_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> CampaignView:
        await self.release(to)
        self.component, self.strategy, self.turned = component, strategy, {"no_way_back": no_way_back}
        if self.state == CampaignState.RUNNING:
            raise Conflict("campaign c-1 runs", field="campaign", remedy="cancel it or wait for its end")
        return self._become(CampaignState.RUNNING)

    def _become(self, state: CampaignState) -> CampaignView:
        self.state = state
        return self._campaign()

    def _campaign(self) -> CampaignView:
        if self.state is None:
            raise NotFound("there has been no campaign yet", field="campaign", remedy="start one")
        campaign = Campaign(
            id=CampaignId("c-1"),
            to_release=NEW,
            hosts=tuple(self.intents),
            state=self.state,
            component=self.component,
            strategy=self.strategy,
            **self.turned,
        )
        return CampaignView(
            campaign=campaign,
            hosts_total=2,
            hosts_upgraded=1,
            moves_done=1,
            moves_failed=0,
            moves_total_forecast=2,
            running=(),
            waiting=(),
            capacity=CAPACITY,
            capacity_floor=1.0,
            operations=(),
        )

    async def campaigns(self) -> tuple[Campaign, ...]:
        return () if self.state is None else (self._campaign().campaign,)

    async def campaign(self, campaign: CampaignId | None) -> CampaignView:
        view = self._campaign()
        if campaign not in (None, view.campaign.id):
            raise NotFound(f"there is no campaign '{campaign}'", field="campaign")
        return view

    async def pause_upgrade(self) -> CampaignView:
        self._campaign()
        return self._become(CampaignState.PAUSED)

    async def resume_upgrade(self) -> CampaignView:
        self._campaign()
        return self._become(CampaignState.RUNNING)

    async def commit_upgrade(self) -> CampaignView:
        self.turned = {"committed": True}
        return self._campaign()

    async def rollback_upgrade(self) -> CampaignView:
        if self.turned.get("committed") or self.turned.get("no_way_back"):
            raise Conflict("c-1 is past its point of no return", field="campaign", remedy="start another one")
        self.turned = {"rolled_back": True}
        return self._campaign()

    async def cancel_upgrade(self) -> CampaignView:
        self._campaign()
        return self._become(CampaignState.CANCELLED)

    async def set_promised(self, promised: Size) -> None:
        self._may_fail()
        self.promised = promised

    async def say(self, text: str) -> None:
        async with self.told:
            number = len(self.log) + 1
            self.log.append(CloudEvent(number=number, at=1.0 * number, kind="test", subject="s", text=text))
            self.told.notify_all()

    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]:
        return tuple(self.log[after : after + limit])

    async def follow(self, after: int) -> AsyncIterator[CloudEvent]:
        while True:
            async with self.told:
                while len(self.log) <= after:
                    await self.told.wait()
            for event in self.log[after:]:
                yield event
            after = len(self.log)


class Reachable:
    """The API over a fake cloud at real sockets."""

    def __init__(self, cloud: FakeCloud, folder: Path, pki: Path, listening: Listening) -> None:
        self.cloud = cloud
        self.socket = folder / "operator.sock"
        self.url = f"https://127.0.0.1:{listening.tls_port}"
        self.pki = pki
        self.ca_file = pki / "ca" / "ca.pem"
        self.token_file = pki / "token"

    def unix(self) -> OperatorClient:
        return OperatorClient.unix(self.socket)

    def tls(self, *, token_file: Path | None = None, party: str | None = None) -> OperatorClient:
        return OperatorClient.tls(
            self.url,
            ca_file=self.ca_file,
            token_file=token_file,
            pki_dir=self.pki / party if party else None,
        )


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, an orchestrator, a host, two operators' certificates (one not listed), a token."""
    folder = tmp_path_factory.mktemp("pki")
    authority = CertificateAuthority.open(folder / "ca")
    authority.issue_orchestrator("127.0.0.1").write(folder / "orchestrator")
    authority.issue_host(HostId("host-1"), "127.0.0.1").write(folder / "host-1")
    authority.issue_operator("alice").write(folder / "alice")
    authority.issue_operator("mallory").write(folder / "mallory")
    operators = Operators(folder / "operators.json")
    operators.add("alice")
    (folder / "token").write_text(operators.add_token("bob") + "\n")
    (folder / "wrong-token").write_text("guessed\n")
    return folder


@pytest.fixture(autouse=True)
def _of_no_width(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """Whatever terminal the tests are run from."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    yield FakeCloud()


@asynccontextmanager
async def reachable_cloud(cloud: FakeCloud, folder: Path, pki: Path) -> AsyncGenerator[Reachable]:
    operators = Operators(pki / "operators.json")
    enrolment = Enrolment(operators=operators, ca_file=pki / "ca" / "ca.pem")
    app = create_app(cloud, operators.authenticate, enrolment)
    tls = TlsPlace(address="127.0.0.1", port=0, pki_dir=pki / "orchestrator")
    async with serving(app, unix_socket=folder / "operator.sock", tls=tls) as listening:
        yield Reachable(cloud, folder, pki, listening)


@pytest.fixture
async def reachable(cloud: FakeCloud, tmp_path: Path, pki: Path) -> AsyncGenerator[Reachable]:
    async with reachable_cloud(cloud, tmp_path, pki) as place:
        yield place


@pytest.fixture
def ask(reachable: Reachable, tmp_path: Path) -> Run:
    """A line of the command line's, asked of the fake cloud."""
    surroundings = Surroundings(socket_of_lab=lambda _: reachable.socket, build_dir=tmp_path / "build")
    app = typer.main.get_command(build_app(surroundings))

    async def invoke(line: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, line.split())

    return invoke


# --- a real orchestrator with scripted agents ---------------------------------------------------------


@pytest.fixture
async def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedCloud]:
    """It leads on where the machine has no time for it for a while."""
    monkeypatch.setattr(leader, "LEASE_SECONDS", 60.0)
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        yield cloud


@pytest.fixture
async def socket(scripted: ScriptedCloud, tmp_path: Path) -> AsyncIterator[Path]:
    operators = Operators(tmp_path / "operators.json")
    app = create_app(scripted.cloud, operators.authenticate)
    async with serving(app, unix_socket=tmp_path / "operator.sock"):
        yield tmp_path / "operator.sock"


@pytest.fixture
def run(socket: Path, tmp_path: Path) -> Run:
    surroundings = Surroundings(socket_of_lab=lambda _: socket, build_dir=tmp_path / "build")
    app = typer.main.get_command(build_app(surroundings))

    async def invoke(line: str, code: int = 0) -> Result:
        result = await asyncio.to_thread(CliRunner().invoke, app, line.split())
        assert result.exit_code == code, result.output + str(result.exception)
        return result

    return invoke
