"""What an operator sees of a load balancer's members: only what its host says now."""

import io

import msgspec
from rich.console import Console

from nahtlos.model.ids import HostId, LoadBalancerId, NetworkId
from nahtlos.model.inventory import HostInventory, Inventory, LoadBalancerStatus, MemberStatus
from nahtlos.model.networking import LoadBalancerSpec, Member
from nahtlos.model.nouns import HostRole, Size
from nahtlos.ops.cli import network_pictures
from nahtlos.runtime.controllers.network_views import balancer_view

HERE, ELSEWHERE = HostId("host-1"), HostId("host-2")
SPEC = LoadBalancerSpec(
    id=LoadBalancerId("lb"),
    number=1,
    network=NetworkId("blue"),
    vip="10.1.0.200",
    port=80,
    host=HERE,
    members=(Member(address="10.1.0.20", port=8080), Member(address="10.1.0.21", port=8080)),
)
STATUS = LoadBalancerStatus(
    id=SPEC.id,
    connections=4,
    members=(
        MemberStatus(address="10.1.0.20", port=8080, up=True, connections=4),
        MemberStatus(address="10.1.0.21", port=8080, up=False),
    ),
)


def inventory(host: HostId, *, connected: bool = True) -> Inventory:
    said = HostInventory(
        host=host,
        role=HostRole.COMPUTE,
        boot_id="b",
        agent_version="1",
        taken_at=0.0,
        generation=1,
        target_generation=1,
        capacity=Size(),
        load_balancers=(STATUS,),
    )
    return Inventory(hosts={host: said}, connected=frozenset({host} if connected else ()))


def test_members_are_shown_as_the_carrying_host_finds_them() -> None:
    view = balancer_view(SPEC, inventory(HERE))
    assert view.status == STATUS
    assert msgspec.json.decode(msgspec.json.encode(view), type=LoadBalancerSpec) == SPEC
    out = io.StringIO()
    console = Console(file=out, width=160)
    console.print(network_pictures.balancer(view))
    console.print(network_pictures.balancers([view]))
    lines = out.getvalue().splitlines()
    assert any("10.1.0.20 " in line and " up " in line for line in lines), lines
    assert any("10.1.0.21 " in line and " down " in line for line in lines), lines
    assert lines[-1].split()[-2:] == ["2", "1"], lines


def test_nothing_is_said_of_what_no_connected_carrier_told() -> None:
    assert balancer_view(SPEC, inventory(ELSEWHERE)).status is None
    assert balancer_view(SPEC, inventory(HERE, connected=False)).status is None
