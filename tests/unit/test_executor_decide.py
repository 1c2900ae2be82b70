"""What agents are told, decided from blueprints: configurations, generations, passing on, orders, acks."""

from dataclasses import replace

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    HostIntent,
    HostPhase,
    HostPlan,
    PlannedMove,
    PlannedVerify,
    Policy,
)
from nahtlos.model.config import HostConfig, UnderlayShares
from nahtlos.model.ids import (
    BlueprintId,
    HostId,
    ImageId,
    NetworkId,
    OperationId,
    PortId,
    ReleaseId,
    ServerId,
    VolumeId,
)
from nahtlos.model.inventory import (
    HostInventory,
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
)
from nahtlos.model.networking import NetworkSpec, PortSpec
from nahtlos.model.nouns import Assignment, HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.topology import MoveCompression, Topology, Underlay
from nahtlos.runtime.executor.decide import decide
from nahtlos.runtime.executor.world import World
from nahtlos.wire.messages import BeginMove, BeginVerify

H1, H2, H3, EDGE = HostId("host-1"), HostId("host-2"), HostId("host-3"), HostId("edge-1")
WEB = ServerId("web-1")
PORT = PortId("web-1-eth0")
OLD = ReleaseId("qemu-10")
MOVE = PlannedMove(
    id=OperationId("move-1"), server=WEB, source=H1, destination=H2, epoch=2, reason="requested"
)


def host_spec(host: HostId, number: int) -> HostSpec:
    role = HostRole.EDGE if host == EDGE else HostRole.COMPUTE
    return HostSpec(id=host, role=role, address=f"10.99.0.{number}", peer_port=7444)


def policy() -> Policy:
    hosts = {H1: host_spec(H1, 11), H2: host_spec(H2, 12), H3: host_spec(H3, 13), EDGE: host_spec(EDGE, 5)}
    network = NetworkSpec(
        id=NetworkId("tenant"),
        vni=100,
        cidr="10.77.0.0/24",
        gateway_ip="10.77.0.1",
        gateway_mac="02:00:00:4d:00:01",
        gateway_host=EDGE,
        dhcp_ip="10.77.0.2",
    )
    port = PortSpec(id=PORT, network=network.id, mac="52:54:00:4d:00:0a", ip="10.77.0.10")
    web = ServerSpec(
        id=WEB,
        size=Size(vcpus=1, memory_mib=256),
        volume=VolumeId("web-1-disk"),
        ports=(port,),
        machine="pc-q35-10.0",
    )
    volume = VolumeSpec(id=web.volume, size_mib=160, image=ImageId("guest"), host=H3, epoch=4)
    return Policy(
        hosts=hosts,
        intents=dict.fromkeys(hosts, HostIntent.ACTIVE),
        servers={WEB: web},
        volumes={volume.id: volume},
        networks=(network,),
    )


def blueprint(owner: HostId = H1, epoch: int = 1, **changes: object) -> Blueprint:
    serving = HostPlan(phase=HostPhase.SERVING, release=OLD)
    plain = Blueprint(
        id=BlueprintId("bp-1"),
        parent=None,
        hosts={
            H1: serving,
            H2: serving,
            H3: serving,
            EDGE: HostPlan(phase=HostPhase.SERVING, release=None),
        },
        servers={WEB: Assignment(server=WEB, host=owner, epoch=epoch)},
    )
    return msgspec.structs.replace(plain, **changes)


def inventory(generations: dict[HostId, int], *seen: tuple[HostId, OperationStatus]) -> Inventory:
    hosts = {
        host: HostInventory(
            host=host,
            role=HostRole.COMPUTE,
            boot_id="boot",
            agent_version="1",
            taken_at=0.0,
            generation=generation,
            target_generation=generation,
            capacity=Size(vcpus=4, memory_mib=1024),
            operations=tuple(status for where, status in seen if where == host),
        )
        for host, generation in generations.items()
    }
    return Inventory(hosts=hosts, connected=frozenset(hosts))


def status(operation: str, state: OperationState) -> OperationStatus:
    return OperationStatus(id=OperationId(operation), kind=OperationKind.MOVE, state=state, step="")


def world(**changes: object) -> World:
    plain = World(policy=policy(), inventory=inventory({}), blueprint=blueprint(), configs={})
    return replace(plain, **changes)


def after(seen: World) -> World:
    """The same world once its configurations are stored."""
    return replace(seen, configs={h: o.config for h, o in decide(seen).hosts.items()})


def converged(seen: World) -> World:
    return replace(seen, inventory=inventory({h: c.generation for h, c in seen.configs.items()}))


def config(seen: World, host: HostId) -> HostConfig:
    return decide(seen).hosts[host].config


def test_the_first_configuration_holds_everything() -> None:
    seen = world(topology=Topology(uplinks={"tenant": "out0"}))
    orders = decide(seen)
    assert {c.host for c in orders.new_configs} == {H1, H2, H3, EDGE}
    owner = orders.hosts[H1].config
    assert (owner.generation, owner.release) == (1, OLD)
    (server,) = owner.servers
    assert (server.spec.id, server.epoch) == (WEB, 1)
    attachment = server.volume
    assert (attachment.address, attachment.port, attachment.export) == ("10.99.0.13", 10809, "web-1-disk.e4")
    assert [v.id for v in orders.hosts[H3].config.volumes] == ["web-1-disk"]
    for host in (H2, H3, EDGE):
        told = orders.hosts[host].config
        assert told.servers == ()
        (network,) = told.networks
        assert network.gateway_vtep == "10.99.0.5"
        assert network.vteps == ("10.99.0.5", "10.99.0.11", "10.99.0.12", "10.99.0.13")
        assert [(p.id, p.host, p.vtep) for p in network.ports] == [(PORT, H1, "10.99.0.11")]
    edge = orders.hosts[EDGE].config
    assert edge.release is None
    assert [(u.network, u.interface) for u in edge.uplinks] == [("tenant", "out0")]
    assert owner.uplinks == ()


def test_nothing_new_is_no_new_generation() -> None:
    seen = after(world())
    orders = decide(seen)
    assert orders.new_configs == ()
    assert all(orders.hosts[h].config is c for h, c in seen.configs.items())


def test_only_what_changed_gets_a_new_generation() -> None:
    plans = dict(blueprint().hosts)
    plans[H2] = HostPlan(phase=HostPhase.SWITCHING, release=ReleaseId("qemu-11"))
    seen = replace(after(world()), blueprint=blueprint(hosts=plans))
    (changed,) = decide(seen).new_configs
    assert (changed.host, changed.generation, changed.release) == (H2, 2, "qemu-11")


def test_a_moving_server_is_its_sources() -> None:
    seen = replace(after(world()), blueprint=blueprint(moves=(MOVE,)))
    assert decide(seen).new_configs == ()


def test_after_a_move_the_source_passes_on_until_all_have_converged() -> None:
    seen = converged(after(world()))
    moved = replace(seen, blueprint=blueprint(owner=H2, epoch=2))
    source, destination = config(moved, H1), config(moved, H2)
    assert (source.servers, source.reflect) == ((), (PORT,))
    assert [(s.spec.id, s.epoch) for s in destination.servers] == [(WEB, 2)]
    assert destination.reflect == ()
    assert [p.vtep for p in config(moved, EDGE).networks[0].ports] == ["10.99.0.12"]

    told = after(moved)
    assert config(told, H1).reflect == (PORT,), "nobody has converged yet"
    generations = {h: c.generation for h, c in told.configs.items()}
    for late in (H2, H3, EDGE):
        partly = replace(told, inventory=inventory({**generations, late: generations[late] - 1}))
        assert config(partly, H1).reflect == (PORT,), f"{late} has not converged"
    gone = replace(told, inventory=inventory({h: g for h, g in generations.items() if h != H3}))
    assert config(gone, H1).reflect == (PORT,), "host-3 was never heard of: it may still send here"

    for state in (OperationState.RUNNING, OperationState.UNDONE):
        late = msgspec.structs.replace(status("move-0", state), server=WEB)
        holding = replace(told, inventory=inventory(generations, (H3, late)))
        assert config(holding, H1).reflect == (PORT,), "host-3 has not put this server's ports right yet"

    over = after(converged(told))
    assert over.configs[H1].reflect == ()
    assert decide(converged(over)).new_configs == ()


def test_a_server_that_comes_back_is_not_passed_on() -> None:
    moved = after(replace(converged(after(world())), blueprint=blueprint(owner=H2, epoch=2)))
    back = after(replace(moved, blueprint=blueprint(owner=H1, epoch=3)))
    assert back.configs[H1].reflect == ()
    assert back.configs[H2].reflect == (PORT,)


def test_a_move_begins_at_its_destination_then_at_its_source() -> None:
    seen = replace(after(world()), blueprint=blueprint(moves=(MOVE,)))
    orders = decide(seen)
    (begin,) = orders.hosts[H2].begin
    assert orders.hosts[H1].begin == ()
    assert isinstance(begin, BeginMove)
    order = begin.order
    assert (order.id, order.server.epoch, order.epoch) == (MOVE.id, 1, 2)
    assert (order.source_address, order.destination_address) == ("10.99.0.11", "10.99.0.12")
    assert [(p.id, p.host) for p in order.ports] == [(PORT, H1)]

    running = status("move-1", OperationState.RUNNING)
    told = replace(seen, inventory=inventory({H1: 1, H2: 1}, (H2, running)))
    assert decide(told).hosts[H2].begin == ()
    assert decide(told).hosts[H1].begin == (begin,)
    both = replace(seen, inventory=inventory({H1: 1, H2: 1}, (H2, running), (H1, running)))
    assert decide(both).hosts[H1].begin == decide(both).hosts[H2].begin == ()


def test_a_move_the_destination_gave_up_is_not_begun_at_its_source() -> None:
    undone = status("move-1", OperationState.UNDONE)
    seen = world(blueprint=blueprint(moves=(MOVE,)), inventory=inventory({H1: 1, H2: 1}, (H2, undone)))
    orders = decide(seen)
    assert orders.hosts[H1].begin == orders.hosts[H2].begin == ()


def test_the_destination_of_a_move_is_told_that_its_source_is_fenced() -> None:
    hosts = {**blueprint().hosts}
    hosts[H1] = msgspec.structs.replace(hosts[H1], fenced="its lease has run out")
    running = status("move-1", OperationState.RUNNING)
    both = inventory({H1: 1, H2: 1}, (H1, running), (H2, running))
    told = decide(world(blueprint=blueprint(moves=(MOVE,), hosts=hosts), inventory=both)).hosts
    assert (told[H1].cancel, told[H2].cancel, told[H3].cancel) == ((), (MOVE.id,), ())
    alive = decide(world(blueprint=blueprint(moves=(MOVE,)), inventory=both)).hosts
    assert alive[H2].cancel == ()
    over = inventory({H1: 1, H2: 1}, (H2, status("move-1", OperationState.UNDONE)))
    assert (
        decide(world(blueprint=blueprint(moves=(MOVE,), hosts=hosts), inventory=over)).hosts[H2].cancel == ()
    )


def test_memory_is_compressed_where_moves_get_little_of_a_link_or_always() -> None:
    def ordered(compression: MoveCompression, mbit: int | None) -> bool:
        shares = None if mbit is None else UnderlayShares(bits_per_second=mbit * 10**6)
        underlay = Underlay(shares=shares, move_compression=compression)
        seen = world(blueprint=blueprint(moves=(MOVE,)), topology=Topology(underlay=underlay))
        (begin,) = decide(seen).hosts[H2].begin
        assert isinstance(begin, BeginMove)
        return begin.order.compressed

    auto, always, never = MoveCompression.AUTO, MoveCompression.ALWAYS, MoveCompression.NEVER
    assert [ordered(auto, mbit) for mbit in (None, 40_000, 1_000)] == [False, False, True]
    assert [ordered(always, mbit) for mbit in (None, 40_000)] == [True, True]
    assert not ordered(never, 1_000)


def test_refused_and_held_back_moves_are_not_offered() -> None:
    for why in ("refused", "held_back"):
        seen = world(blueprint=blueprint(moves=(MOVE,)), **{why: frozenset({MOVE.id})})
        assert decide(seen).hosts[H2].begin == ()


def test_a_move_of_a_deleted_server_is_not_begun() -> None:
    without = msgspec.structs.replace(policy(), servers={}, removed_servers=frozenset({WEB}))
    orders = decide(world(policy=without, blueprint=blueprint(moves=(MOVE,))))
    assert orders.hosts[H2].begin == ()
    assert orders.hosts[H1].config.servers == ()
    assert orders.hosts[H1].config.removed_servers == (WEB,)
    assert orders.hosts[EDGE].config.removed_servers == ()


def test_a_verify_begins_at_its_host() -> None:
    verify = PlannedVerify(id=OperationId("verify-1"), host=H3, release=OLD)
    orders = decide(world(blueprint=blueprint(verifies=(verify,))))
    assert orders.hosts[H3].begin == (BeginVerify(id=verify.id, release=OLD),)
    assert orders.hosts[H1].begin == ()


def test_only_recorded_ends_no_blueprint_waits_for_are_acknowledged() -> None:
    done, stuck = status("move-1", OperationState.DONE), status("move-1", OperationState.STUCK)
    over = frozenset({OperationId("move-1")})
    cases = (
        (done, blueprint(), over, (MOVE.id,)),
        (done, blueprint(), frozenset[OperationId](), ()),
        (done, blueprint(moves=(MOVE,)), over, ()),
        (stuck, blueprint(), over, ()),
    )
    for seen, current, ended, expected in cases:
        told = world(blueprint=current, inventory=inventory({H1: 1}, (H1, seen)), ended=ended)
        assert decide(told).hosts[H1].acknowledge == expected


def test_a_removed_volume_is_named_to_its_host_alone() -> None:
    volume = policy().volumes[VolumeId("web-1-disk")]
    without = msgspec.structs.replace(policy(), servers={}, volumes={})
    orders = decide(world(policy=without, removed_volumes=(volume,)))
    assert orders.hosts[H3].config.removed_volumes == ("web-1-disk",)
    assert orders.hosts[H3].config.volumes == ()
    assert orders.hosts[H1].config.removed_volumes == ()
