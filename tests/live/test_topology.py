"""A lab's namespaces and cables, as the kernel has them."""

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from nahtlos.lab import topology
from nahtlos.lab.topology import Node, Topology
from nahtlos.model.errors import Refused
from nahtlos.physical.network import links
from nahtlos.physical.network.netlink import Netlink

pytestmark = [pytest.mark.live, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
LAB = f"nlt-top{os.getpid() % 10000}"


@pytest.fixture
def lab() -> Iterator[Topology]:
    created = topology.create(LAB, 2)
    yield created
    topology.destroy(LAB)


def reaches(node: Node, address: str, size: int = 56) -> bool:
    ping = ["ping", "-c1", "-W1", "-M", "do", "-s", str(size), address]
    return subprocess.run([*node.enter, *ping], capture_output=True, timeout=5, check=False).returncode == 0


def test_every_host_reaches_every_other_with_room_for_a_tunnel(lab: Topology) -> None:
    assert [n.address for n in lab.underlay] == ["10.99.0.1", "10.99.0.5", "10.99.0.11", "10.99.0.12"]
    assert all(reaches(lab.control, n.address, 1600 - 28) for n in lab.underlay[1:])
    assert not reaches(lab.control, lab.edge.address, 1600 - 27)


def test_the_client_outside_reaches_the_edge_and_no_host(lab: Topology) -> None:
    assert reaches(lab.client, topology.OUTSIDE_GATEWAY)
    assert not reaches(lab.client, lab.hosts[0].address)


def test_creating_again_changes_nothing(lab: Topology) -> None:
    def indices() -> dict[str, int]:
        with Netlink() as sock:
            return {name: link.index for name, link in links.read_links(sock).items()}

    before = [topology.within(n.namespace, indices) for n in lab.nodes]
    assert topology.create(LAB, 2) == lab
    assert [topology.within(n.namespace, indices) for n in lab.nodes] == before


def test_a_stalled_link_keeps_its_carrier_and_a_cut_one_does_not(lab: Topology) -> None:
    host = lab.hosts[0]

    def carrier() -> bool:
        return (
            "LOWER_UP"
            in subprocess.run(
                [*host.enter, "ip", "link", "show", "eth0"], capture_output=True, text=True, check=True
            ).stdout
        )

    for _ in range(2):
        topology.stall(lab, host.name, on=True)
    assert carrier()
    assert not reaches(lab.control, host.address)
    assert reaches(lab.control, lab.hosts[1].address)
    for _ in range(2):
        topology.stall(lab, host.name, on=False)
    assert reaches(lab.control, host.address)
    topology.set_link(lab, host.name, up=False)
    assert not carrier()
    assert not reaches(lab.control, host.address)
    topology.set_link(lab, host.name, up=True)
    assert reaches(lab.control, host.address)


def test_destroying_leaves_nothing_and_may_be_repeated(lab: Topology) -> None:
    assert set(topology.destroy(LAB)) == {n.namespace for n in lab.nodes}
    assert topology.destroy(LAB) == ()
    assert topology.namespaces_of(LAB) == ()


def test_laying_a_lab_takes_no_time_worth_showing() -> None:
    began = time.monotonic()
    try:
        topology.create(LAB, 6)
    finally:
        topology.destroy(LAB)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["", "UPPER", "far-too-long-a-name", "-a", "a-", "9a", "a/b"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(Refused) as refused:
        topology.describe(name, 3)
    assert refused.value.field == "lab"


def test_a_bad_node_is_refused_by_name(lab: Topology) -> None:
    with pytest.raises(Refused, match="no node 'host-9'"):
        topology.set_link(lab, "host-9", up=False)
    with pytest.raises(Refused, match="no cable"):
        topology.stall(lab, "client", on=True)


def test_names_that_begin_alike_are_told_apart() -> None:
    assert topology.node_of("a", "nl-a-host-1") == "host-1"
    assert topology.node_of("a", "nl-a-b-host-1") is None
    assert topology.node_of("a-b", "nl-a-b-host-1") == "host-1"
    assert topology.node_of("a-b", "nl-a-host-1") is None
