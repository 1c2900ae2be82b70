"""`Cloud` over the store: reads the state, checks the request, writes intent, wakes the planning loop.

Every request that writes reads what it decides from in the same transaction, so two requests cannot both
get the last address, the same name, or the one campaign. Nothing here waits for hosts, except the console,
which is one question to one agent.
"""

from collections.abc import AsyncIterator, Callable

from msgspec import UNSET

from nahtlos import __version__
from nahtlos.model.blueprint import (
    Campaign,
    CampaignState,
    Forecast,
    HostIntent,
    Strategy,
    WaitKind,
)
from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import CampaignId, HostId, ImageId, ReleaseId, ServerId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import DATA_PLACES, Component, HostRole, HostSpec, Release, Size
from nahtlos.planner.predict import forecast
from nahtlos.runtime.controllers import (
    attachment_requests,
    experience,
    guest_requests,
    move_requests,
    requests,
    server_requests,
    turning,
    upgrade_requests,
    views,
    volume_homes,
)
from nahtlos.runtime.controllers.agents import Agents
from nahtlos.runtime.controllers.availability_service import AvailabilityService
from nahtlos.runtime.controllers.catalogues import Identity, ImageCatalog, ReleaseCatalog
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
from nahtlos.runtime.controllers.console_service import ConsoleService
from nahtlos.runtime.controllers.event_log import EventLog
from nahtlos.runtime.controllers.look import Look, Looks
from nahtlos.runtime.controllers.network_requests import checked_project
from nahtlos.runtime.controllers.network_service import NetworkService, let_go
from nahtlos.runtime.controllers.placement_requests import (
    check_group,
    check_pin,
    check_withdrawal,
    place_asked,
)
from nahtlos.runtime.controllers.placement_service import PlacementService
from nahtlos.runtime.controllers.port_requests import new_ports
from nahtlos.runtime.controllers.power_fence import PowerFence
from nahtlos.runtime.controllers.power_service import PowerService
from nahtlos.runtime.controllers.project_requests import check_project
from nahtlos.runtime.controllers.project_service import ProjectService
from nahtlos.runtime.controllers.server_snapshot_service import ServerSnapshotService
from nahtlos.runtime.controllers.share_requests import check_shares_somewhere
from nahtlos.runtime.controllers.state import State, read
from nahtlos.runtime.controllers.volume_service import KeyMaker, VolumeService
from nahtlos.runtime.identity.tokens import new_token, token_digest
from nahtlos.runtime.store import campaigns, operations
from nahtlos.runtime.store import intent as intents
from nahtlos.runtime.store import placement as placements
from nahtlos.runtime.store import volumes as volume_rows
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.store import AsyncConnection, Store
from nahtlos.wire.messages import ConsoleData, ConsoleRead, ConsoleWrite

CONSOLE_TIMEOUT = 5.0
VERIFIES = 20


class CloudService:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        log: EventLog,
        *,
        leader_epoch: Callable[[], int | None],
        wake: Callable[[], None],
        identity: Identity,
        releases: ReleaseCatalog,
        images: ImageCatalog,
        keys: KeyMaker | None = None,
    ) -> None:
        self._store = store
        self._looks = Looks(store, agents)
        self._agents = agents
        self._log = log
        self._leader_epoch = leader_epoch
        self._wake = wake
        self._identity = identity
        self._releases = releases
        self._images = images
        self.networks = NetworkService(self._looks, said=self._said)
        self.volumes = VolumeService(self._looks, said=self._said, images=images, keys=keys)
        self.availability = AvailabilityService(self._looks, said=self._said)
        self.power_fence = PowerFence(store, self._looks, said=self._said, wake=wake)
        self.projects = ProjectService(self._looks, said=self._said)
        self.power = PowerService(self._looks, said=self._said, shown=self.server)
        self.server_snapshots = ServerSnapshotService(self._looks, said=self._said, shown=self.server)
        self.consoles = ConsoleService(agents, self.server)
        self.placement = PlacementService(self._looks, said=self._said)

    # --- looking -------------------------------------------------------------------------------------

    async def _read(self, tx: AsyncConnection) -> tuple[State, Inventory]:
        state = await read(tx, self._agents.latest)
        return state, state.inventory(self._agents.connected)

    async def status(self) -> Status:
        look, epoch = await self._looks.now(), self._leader_epoch()
        return Status(
            version=__version__,
            orchestrator_epoch=epoch or 0,
            leader=epoch is not None,
            blueprint=look.state.blueprint.id if look.state.blueprint else "",
            converged=look.report.converged,
            waiting=look.report.waiting,
            capacity=look.report.capacity,
            time=self._store.clock(),
        )

    # --- hosts ---------------------------------------------------------------------------------------

    async def hosts(self) -> tuple[HostView, ...]:
        look = await self._looks.now()
        state, inventory = look.state, look.inventory
        return tuple(views.host_view(state, inventory, host, whole=False) for host in state.hosts)

    async def host(self, host: HostId) -> HostView:
        look = await self._looks.now()
        state, inventory = look.state, look.inventory
        return views.host_view(state, inventory, requests.known_host(state, host), whole=True)

    async def set_host_intent(self, host: HostId, intent: HostIntent) -> HostView:
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            requests.check_intent(state, host, intent)
            check_withdrawal(state, inventory, host, intent)
            await intents.set_intent(tx, host, intent)
        self._said("host.intent", host, f"{host} is to be {intent}")
        return await self.host(host)

    async def change_host(self, host: HostId, change: HostChange) -> HostView:
        async with self._looks.changing() as tx:
            state, _ = await self._read(tx)
            spec = requests.changed_host(state, host, change)
            await intents.put_host(tx, spec, self._store.clock())
        domain = f"in failure domain {spec.domain}" if spec.domain else "a failure domain of its own"
        self._said("host.changed", host, f"{host} is {domain}")
        return await self.host(host)

    async def create_join_token(self, host: HostId, role: HostRole, ttl_seconds: int) -> str:
        checked_name(host, "host")
        requests.checked_ttl(ttl_seconds)
        token = new_token()
        async with self._looks.changing() as tx:
            expires_at = self._store.clock() + ttl_seconds
            await intents.add_token(tx, token_digest(token), host, role, expires_at)
        self._said("host.token", host, f"a token lets {host} join as {role} within {ttl_seconds} s")
        return token

    async def join(self, request: JoinRequest) -> JoinAnswer:
        now = self._store.clock()
        async with self._looks.changing() as tx:
            # The token first: without one, nothing is to be learned here.
            await intents.use_token(tx, token_digest(request.token), request.host, request.role, now)
            state, _ = await self._read(tx)
            requests.check_join(state, request)
            certificate = self._identity.sign_host_csr(request.csr_pem, request.host, request.address)
            spec = HostSpec(
                id=request.host,
                role=request.role,
                address=request.address,
                peer_port=request.peer_port,
                domain=request.domain or requests.domain_of(state, request.host),
            )
            await intents.put_host(tx, spec, now)
        self._said("host.joined", request.host, f"{request.host} has joined as {request.role}")
        return JoinAnswer(certificate_pem=certificate, ca_pem=self._identity.certificate_pem)

    # --- releases and images -------------------------------------------------------------------------

    async def releases(self) -> tuple[Release, ...]:
        async with self._store.reading() as tx:
            return tuple((await intents.releases(tx)).values())

    async def release(self, release: ReleaseId) -> Release:
        async with self._store.reading() as tx:
            known = await intents.releases(tx)
        if release not in known:
            raise NotFound(
                f"no release '{release}' is registered",
                field="release",
                remedy=f"registered: {requests.listed(known)}",
            )
        return known[release]

    async def register_release(self, release: ReleaseId) -> Release:
        """The first hypervisor registered is what hosts run until a campaign takes them elsewhere."""
        verified = await self._verified(release)
        async with self._looks.changing() as tx:
            await self._take_up(tx, verified)
        self._said("release.registered", release, f"{release} is verified and registered")
        return verified

    async def _verified(self, release: ReleaseId) -> Release:
        try:
            return await self._releases.verified(release)
        except TimeoutError as error:
            raise Unavailable(f"the files of {release} could not be hashed in time") from error

    async def _take_up(self, tx: AsyncConnection, release: Release) -> None:
        await intents.put_release(tx, release, self._store.clock())
        default = await intents.setting_of(tx, intents.DEFAULT_RELEASE, str)
        if default is None and release.component is Component.HYPERVISOR:
            await intents.set_setting(tx, intents.DEFAULT_RELEASE, release.id)

    async def images(self) -> tuple[ImageId, ...]:
        return tuple(sorted(await self._images.images()))

    # --- servers -------------------------------------------------------------------------------------

    async def servers(self) -> tuple[ServerView, ...]:
        look = await self._looks.now()
        return tuple(self._server_view(look, server) for server in look.state.servers)

    async def server(self, server: ServerId) -> ServerView:
        look = await self._looks.now()
        return self._server_view(look, requests.known_server(look.state, server))

    def _server_view(self, look: Look, server: ServerId) -> ServerView:
        return views.server_view(look.state, look.inventory, look.report, server)

    async def create_server(self, request: ServerRequest) -> ServerView:
        name = ServerId(checked_name(request.name, "name"))
        project = checked_project(request.project)
        size = requests.server_size(request)
        image = requests.chosen_image(request, await self._images.images())
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            if name in state.servers:
                raise Conflict(f"a server '{name}' exists", field="name", remedy="choose another name")
            if request.host is not None:
                requests.compute_host(state, request.host)
            spec, disk = requests.server_of(
                request,
                size=size,
                image=image,
                machine=requests.machine_type((await intents.releases(tx)).values()),
                ports=new_ports(state.topology(), name, project, request.networks),
            )
            spec = server_requests.with_hardware(request, spec)
            compute = [h for h, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
            if spec.display:
                server_requests.check_display(self._agents.lacking("display", compute))
            if spec.data_places != DATA_PLACES:
                server_requests.check_data_places(self._agents.lacking("data-places", compute))
            check_shares_somewhere(inventory, spec.cpu, request.host)
            spec = guest_requests.with_channel(state, inventory, spec)
            volume = volume_homes.system_disk(state, inventory, disk, request.copies)
            spec, data = attachment_requests.with_data_volumes(state, spec, request.volumes)
            check_project(state, project, servers={name: spec}, volumes={volume.id: volume})
            check_group(state, request.group, project)
            requests.check_promise(state, size)
            host = place_asked(state, request.host, request.pin)
            requests.check_room(state, inventory, spec, host, group=request.group)
            await intents.add_server(tx, spec, volume, self._store.clock(), host)
            if request.group is not None:
                await placements.set_group(tx, name, request.group)
            await placements.pin(tx, name, request.pin)
            for each in data:
                await self.volumes.attach(tx, each, spec)
        self._said("server.created", name, f"{name} is to be: {requests.words(size)}, {spec.ports[0].ip}")
        return await self.server(name)

    async def change_server(self, server: ServerId, change: ServerChange) -> ServerView:
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            changed = server_requests.changed_server(state, inventory, server, change)
            await volume_rows.put_server(tx, changed.server)
            if change.pin is not UNSET:
                check_pin(state, server, change.pin)
                await placements.pin(tx, server, change.pin)
            for volume in changed.volumes:
                await volume_rows.put(tx, volume)
        self._said("server.changed", server, f"{server} is to have {server_requests.asked(change)}")
        return await self.server(server)

    async def move_server(self, server: ServerId, to: HostId | None) -> ServerView:
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            move_requests.check_move(state, inventory, server, to)
            await intents.request_move(tx, server, to)
        self._said("server.move", server, f"{server} is to move to {to or 'another host'}")
        return await self.server(server)

    async def replace_vmm(self, server: ServerId, by: ReleaseId | None) -> ServerView:
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            releases = await intents.releases(tx)
            release = move_requests.check_replacement(state, inventory, server, by, releases)
            await intents.request_replacement(tx, server, release)
        self._said("server.replace", server, f"{server} is to run {release}, in place")
        return await self.server(server)

    async def delete_server(self, server: ServerId) -> ServerView:
        async with self._looks.changing() as tx:
            state, _ = await self._read(tx)
            requests.known_server(state, server)
            await intents.mark_server_removed(tx, server, self._store.clock())
            await let_go(tx, state.topology(), server)
            state, inventory = await self._read(tx)
        self._said("server.deleted", server, f"{server} is to be deleted")
        return views.server_view(state, inventory, views.NOTHING, server)

    async def console_read(self, server: ServerId, offset: int) -> tuple[bytes, int]:
        if offset < 0:
            raise Refused(f"{offset} is no offset", field="offset", remedy="begin with 0")
        host = await self._host_of(server)
        request = ConsoleRead(server=server, offset=offset)
        answer = await self._agents.request(host, request, timeout=CONSOLE_TIMEOUT)
        if not isinstance(answer, ConsoleData):
            raise Unavailable(f"{host} gave no console data")
        return answer.data, answer.next_offset

    async def console_write(self, server: ServerId, data: bytes) -> None:
        host = await self._host_of(server)
        await self._agents.request(host, ConsoleWrite(server=server, data=data), timeout=CONSOLE_TIMEOUT)

    async def _host_of(self, server: ServerId) -> HostId:
        view = await self.server(server)
        if view.host is None or view.state is None:
            raise Conflict(f"{server} does not run yet", field="server", remedy="wait until it runs")
        return view.host

    # --- upgrades ------------------------------------------------------------------------------------

    async def plan_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> Forecast:
        release = await self._verified(to)
        async with self._store.reading() as tx:
            state, inventory = await self._read(tx)
            chosen = upgrade_requests.upgrade_hosts(state, hosts, component)
            upgrade_requests.check_upgrade(state, release, chosen, component, strategy)
            return await self._forecast(tx, state, inventory, to, chosen, component, strategy, no_way_back)

    async def _forecast(
        self,
        tx: AsyncConnection,
        state: State,
        inventory: Inventory,
        to: ReleaseId,
        hosts: tuple[HostId, ...],
        component: Component,
        strategy: Strategy,
        no_way_back: bool,
    ) -> Forecast:
        samples = await experience.measured(tx, state.servers)
        verify_seconds = await self._verify_seconds(tx)
        return forecast(
            state.policy(),
            inventory,
            state.blueprint,
            to,
            hosts=hosts,
            samples=samples,
            verify_seconds=verify_seconds,
            component=component,
            strategy=strategy,
            no_way_back=no_way_back,
        )

    async def _verify_seconds(self, tx: AsyncConnection) -> float | None:
        verifies = [v for v in await operations.newest(tx, "verify", VERIFIES) if v.times]
        lasted = sorted(max(v.times.values()) - min(v.times.values()) for v in verifies)
        return lasted[len(lasted) // 2] if lasted else None

    async def start_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> CampaignView:
        release = await self._verified(to)
        async with self._looks.changing() as tx:
            await campaigns.check_none_open(tx)
            state, inventory = await self._read(tx)
            chosen = upgrade_requests.upgrade_hosts(state, hosts, component)
            upgrade_requests.check_upgrade(state, release, chosen, component, strategy)
            predicted = await self._forecast(
                tx, state, inventory, to, chosen, component, strategy, no_way_back
            )
            _refuse_blocked(predicted)
            campaign = await campaigns.begin(
                tx,
                to_release=to,
                component=component,
                strategy=strategy,
                no_way_back=no_way_back,
                from_releases=upgrade_requests.releases_in_use(state, chosen, component),
                hosts=chosen,
                moves_forecast=predicted.total_moves,
                now=self._store.clock(),
            )
            await self._take_up(tx, release)
        text = f"{campaign.id}: {component} of {requests.listed(chosen)} to {to}"
        self._said("campaign.begun", campaign.id, text)
        return await self.campaign(campaign.id)

    async def campaigns(self) -> tuple[Campaign, ...]:
        async with self._store.reading() as tx:
            return tuple(row.campaign for row in await campaigns.history(tx))

    async def campaign(self, campaign: CampaignId | None) -> CampaignView:
        look = await self._looks.now()
        async with self._store.reading() as tx:
            rows = {row.campaign.id: row for row in await campaigns.history(tx)}
            wanted = campaign if campaign is not None else next(reversed(rows), None)
            if wanted is None or wanted not in rows:
                raise NotFound(
                    f"no campaign '{wanted}'" if wanted else "there was no campaign yet",
                    field="campaign",
                    remedy=f"campaigns: {requests.listed(rows)}" if rows else "nahtlos upgrade start RELEASE",
                )
            records = await operations.of_campaign(tx, wanted)
        return views.campaign_view(look.state, look.inventory, look.report, rows[wanted], records)

    async def pause_upgrade(self) -> CampaignView:
        return await self._steer(CampaignState.PAUSED, (CampaignState.RUNNING,))

    async def resume_upgrade(self) -> CampaignView:
        return await self._steer(CampaignState.RUNNING, (CampaignState.PAUSED,))

    async def cancel_upgrade(self) -> CampaignView:
        return await self._steer(CampaignState.CANCELLED, (CampaignState.RUNNING, CampaignState.PAUSED))

    async def commit_upgrade(self) -> CampaignView:
        async with self._looks.changing() as tx:
            committed = turning.committed(turning.open_one(await campaigns.current(tx)))
            await campaigns.put(tx, committed)
        self._said("campaign.committed", committed.id, f"{committed.id} does not go back any more")
        return await self.campaign(committed.id)

    async def rollback_upgrade(self) -> CampaignView:
        async with self._store.reading() as tx:
            back = turning.rolled_back(await campaigns.newest(tx))
        await self._verified(back.to_release)
        async with self._looks.changing() as tx:
            back = turning.rolled_back(await campaigns.newest(tx))
            await campaigns.put(tx, back)
        self._said("campaign.rolled-back", back.id, f"{back.id} goes back to {back.to_release}")
        return await self.campaign(back.id)

    async def _steer(self, state: CampaignState, of: tuple[CampaignState, ...]) -> CampaignView:
        async with self._looks.changing() as tx:
            row = await campaigns.current(tx)
            turning.open_one(row)
            assert row is not None
            if row.campaign.state not in of:
                raise Conflict(
                    f"{row.campaign.id} is {row.campaign.state}",
                    field="campaign",
                    remedy=f"this needs a campaign that is {' or '.join(of)}",
                )
            await campaigns.set_state(tx, row.campaign, state)
        self._said("campaign.state", row.campaign.id, f"{row.campaign.id} is {state}")
        return await self.campaign(row.campaign.id)

    # --- the rest ------------------------------------------------------------------------------------

    async def set_promised(self, promised: Size) -> None:
        async with self._looks.changing() as tx:
            state, inventory = await self._read(tx)
            requests.check_promised(state, inventory, promised)
            await intents.set_setting(tx, intents.PROMISED, promised)
        self._said("promised", "cloud", f"{requests.words(promised)} are promised")

    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]:
        return await self._log.after(after, limit)

    def follow(self, after: int) -> AsyncIterator[CloudEvent]:
        return self._log.follow(after)

    def _said(self, kind: str, subject: str, text: str) -> None:
        self._log.say(EventDraft(kind=kind, subject=subject, text=text))
        self._wake()


def _refuse_blocked(predicted: Forecast) -> None:
    """A campaign that cannot come to its end is not begun."""
    lasting = [b for b in predicted.blockers if b.kind in (WaitKind.BLOCKED, WaitKind.CAPACITY)]
    if lasting:
        first = lasting[0]
        raise Conflict(first.reason, field=first.subject, remedy=first.remedy)
