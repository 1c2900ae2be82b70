"""The virtual network from the command line to agents' configurations: the real API over a real orchestrator
and store, with scripted agents."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from scripted_cloud import EDGE, ScriptedCloud

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, NetworkId
from nahtlos.model.networking import AddressPair, Rate
from nahtlos.ops.cli.amounts import host_and_port, numbers, octets, pair, port_request, rate, rate_text
from nahtlos.ops.cli.command import NAMES
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.network_client import NetworkClient
from nahtlos.runtime.controllers.networks import Networks, PortRequest

H1 = HostId("host-1")
Run = Callable[..., Awaitable[Result]]


def told(scripted: ScriptedCloud, host: HostId = H1) -> Any:
    config = scripted.agents[host].config
    assert config is not None
    return config


async def made(run: Run) -> None:
    """Two networks with a server each, a group, a router with a way out, a floating IP, a load balancer."""
    for line in (
        "network create blue --cidr 10.1.0.0/24",
        "network create green --cidr 10.2.0.0/24 --mtu 1400",
        "subnet create blue6 --network blue --cidr 2001:db8:1::/64 --dns 2001:db8::53",
        "security-group create web",
        "server create a --network blue,ip=10.1.0.20,group=web,ingress=50M",
        "server create b --network green --network blue",
        "router create wan --subnet blue --subnet green",
        "router gateway set wan --host edge-1 --address 203.0.113.2",
        "floating-ip create front --address 203.0.113.10",
        "floating-ip assign front a-eth0",
        "load-balancer create lb --network blue --port 80 --vip 10.1.0.200 --member 10.1.0.20:8080",
    ):
        await run(line)


async def test_from_the_command_line_to_the_agents(run: Run, scripted: ScriptedCloud) -> None:
    await made(run)
    await run("security-group rule add web --protocol tcp --port 80-81 --remote 10.2.0.0/24")
    await run("port set a-eth0 --egress 20M --burst 64k --allowed-pair 10.9.0.0/24")
    config = told(scripted)
    blue = next(n for n in config.networks if n.spec.id == "blue")
    port = next(p for p in blue.ports if p.id == "a-eth0")
    assert port.bandwidth.ingress == Rate(bits_per_second=50_000_000)
    assert port.bandwidth.egress == Rate(bits_per_second=20_000_000, burst_bytes=65536)
    assert port.allowed_pairs == (AddressPair(cidr="10.9.0.0/24"),)
    (web,) = config.security_groups
    assert (web.rules[-1].port_min, web.rules[-1].remote_cidr) == (80, "10.2.0.0/24")
    assert [b.spec.vip for b in config.load_balancers] == ["10.1.0.200"]
    assert [f.address for f in told(scripted, EDGE).routers[0].floating_ips] == ["203.0.113.10"]
    await run("security-group rule remove web 3")
    assert len(told(scripted).security_groups[0].rules) == 2, "waited for, so it is there"


SHOWN = (
    ("network list", "10.1.0.0/24, 2001:db8:1::/64"),
    ("network show blue", "router wan"),
    ("network underlay show", "left alone"),
    ("subnet list", "2001:db8::53"),
    ("subnet show blue6", "2001:db8:1::1"),
    ("port list", "(203.0.113.10)"),
    ("port show a-eth0", "50 Mbit/s"),
    ("port show b-eth0", "none: open"),
    ("security-group list", "web"),
    ("security-group show web", "a-eth0"),
    ("router list", "203.0.113.2 at edge-1"),
    ("router show wan", "10.2.0.1"),
    ("floating-ip list", "10.1.0.20"),
    ("floating-ip show front", "wan"),
    ("load-balancer list", "10.1.0.200:80"),
    ("load-balancer show lb", "10.1.0.20"),
    ("port trace b-eth0 10.1.0.20 --protocol tcp --port 80", "no rule of web allows it"),
    ("port trace a-eth0 8.8.8.8", "floating IP: 10.1.0.20 becomes 203.0.113.10"),
    ("server show b", "b-eth0, b-eth1"),
)

CHANGES = (
    ("network set green --mtu 1300", "1300"),
    ("network underlay set --rate 10G --control 20 --tenants 50 --mtu 9000", "10000 Mbit/s"),
    ("network underlay set --moves 20 --tenants 60", "20 %"),
    ("network underlay unset", "left alone"),
    ("subnet set blue6 --no-dhcp --dns none", "no"),
    ("port set a-eth0 --ingress none --egress 1.5G", "1.5 Gbit/s"),
    ("port set a-eth0 --security-group none", "none: open"),
    ("security-group delete web", "deleted"),
    ("router route add wan 192.168.0.0/16 10.2.0.10", "192.168.0.0/16"),
    ("router route remove wan 192.168.0.0/16 10.2.0.10", "no routes"),
    ("router gateway set wan --host edge-1 --address 203.0.113.3 --no-snat", "no SNAT"),
    ("router set wan --gateway-host edge-1", "203.0.113.3"),
    ("load-balancer member add lb 10.1.0.21:8080 --weight 3", "10.1.0.21"),
    ("load-balancer member set lb 10.1.0.21:8080 --drain", "draining"),
    ("load-balancer member remove lb 10.1.0.21:8080", "10.1.0.20"),
    ("load-balancer set lb --interval-ms 500 --host host-3", "every 500 ms"),
    ("load-balancer delete lb", "deleted"),
    ("floating-ip unassign front", "front"),
    ("floating-ip delete front", "deleted"),
    ("router gateway unset wan", "wan"),
    ("subnet create green2 --network green --cidr 10.22.0.0/24 --gateway none --no-dhcp", "green2"),
    ("subnet set green2 --gateway 10.22.0.1", "10.22.0.1"),
    ("router attach wan green2", "green2"),
    ("router detach wan blue green green2", "no subnets attached"),
    ("router delete wan", "deleted"),
    ("subnet delete green2", "deleted"),
    ("server delete b --yes", "deleted"),
    ("network delete green", "deleted"),
)


async def test_every_command_shows_its_result(run: Run) -> None:
    await made(run)
    for line, shown in SHOWN:
        assert shown in (await run(line)).stdout, line
        as_json = json.loads((await run(f"{line} --json")).stdout)
        assert isinstance(as_json, list if line.endswith("list") else dict), line
    for line, shown in CHANGES:
        assert shown in (await run(line)).stdout, line


REFUSED = (
    ("network create x --cidr 10.1.0.1/24", "cidr", "write 10.1.0.0/24"),
    ("network create x --cidr 10.9.0.0/24 --mtu 500", "mtu", "at least 576"),
    ("network delete tenant", "network", "settings"),
    ("network show nowhere", "network", "networks: tenant"),
    ("subnet create x --network nowhere --cidr 10.9.0.0/24", "network", "no network"),
    ("port set web-1-eth0 --ingress fast", "ingress", "50M"),
    ("port set web-1-eth0 --ingress 1k", "ingress", "cannot be shaped"),
    ("port set web-1-eth0 --burst 64k", "burst", "give --ingress"),
    ("port set web-1-eth0", "port", "nothing to change"),
    ("port set web-1-eth0 --security-group none --security-group x", "security_groups", "no security"),
    ("port trace web-1-eth0 nowhere", "address", "no IP address"),
    ("security-group rule add none --protocol tcp", "security_group", "no security group"),
    ("security-group rule remove none 1", "security_group", "no security group"),
    ("router attach none tenant", "router", "no router"),
    ("router create x --subnet tenant", "subnet", "uplink"),
    ("floating-ip create x --address 10.77.0.9", "address", "belongs to network tenant"),
    ("load-balancer create x --network tenant --port 80 --member 10.77.0.10", "member", "10.0.0.5:80"),
    ("load-balancer member set none 10.0.0.1:80", "member", "--weight"),
    ("server create x --network tenant,speed=1", "network", "names: ip"),
    ("server create x --network tenant,ip=10.77.0.1", "ip", "gateway"),
    ("network underlay set --control 20", "rate", "--rate"),
    ("network underlay set --rate none", "rate", "unset"),
    ("network underlay set --rate 1G --control 20", "control", "make it 100"),
)


async def test_what_is_refused_names_field_and_remedy(run: Run, scripted: ScriptedCloud) -> None:
    await scripted.servers("web-1")
    for line, field, words in REFUSED:
        result = await run(f"{line} --json", code=2)
        error = json.loads(result.stdout)["error"]
        assert error["field"] == field, line
        assert words in f"{error['message']} {error['remedy']}", line
        assert error["remedy"], line
    for line, field, _ in REFUSED[:2]:
        assert f"Error: {field}: " in (await run(line, code=2)).stderr


async def test_a_rule_that_is_not_there_and_one_member_that_is_not(run: Run) -> None:
    await run("security-group create web --empty --no-stateful")
    refused = await run("security-group rule remove web 1", code=2)
    assert "it has 0" in refused.stderr
    await run("load-balancer create lb --network tenant --port 80")
    refused = await run("load-balancer member set lb 10.77.0.9:80 --drain", code=2)
    assert "has no member 10.77.0.9:80" in refused.stderr


async def test_waiting_for_a_host_that_does_not_converge_ends(run: Run, scripted: ScriptedCloud) -> None:
    scripted.agents[H1].converges = False
    late = await run("network create blue --cidr 10.1.0.0/24 --deadline 0.5", code=3)
    assert "host-1 not yet converged" in late.stderr
    await run("network create green --cidr 10.2.0.0/24 --no-wait")
    scripted.agents[H1].converge()
    await run("subnet create six --network green --cidr 2001:db8::/64 --no-wait")


async def test_paths_and_status_codes(socket: Path) -> None:
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(base_url="http://x/v1/", transport=transport) as http:
        body = {"name": "blue", "cidr": "10.1.0.0/24"}
        assert (await http.post("networks", json=body)).status_code == 201
        assert (await http.post("networks", json=body)).status_code == 409
        assert (await http.get("networks/none")).status_code == 404
        unknown = await http.post("networks", json={"name": "x"})
        assert (unknown.status_code, unknown.json()["error"]["field"]) == (422, "cidr")
        wrong = await http.patch("networks/blue", json={"mtu": "large"})
        assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "mtu")
        assert (await http.patch("networks/blue", json={})).json()["mtu"] == 1500
        assert (await http.delete("networks/blue")).status_code == 204
        assert (await http.post("ports", json={})).status_code == 405
        null = await http.patch("routers/none", json={"gateway": None})
        assert null.status_code == 404


async def test_names_are_completed(socket: Path, run: Run) -> None:
    await made(run)
    async with OperatorClient.unix(socket) as client:
        found = {name: await ask(client) for name, ask in NAMES.items() if name != "operator"}
    assert found["network"] == ["blue", "green", "tenant"]
    assert found["subnets"] == ["blue", "blue6", "green", "tenant"]
    assert found["port"] == ["a-eth0", "b-eth0", "b-eth1"]
    assert (found["group"], found["router"], found["floating_ip"]) == (["web"], ["wan"], ["front"])
    assert found["balancer"] == ["lb"]


def test_every_call_of_the_networks_is_in_the_client() -> None:
    calls = {name for name in vars(Networks) if not name.startswith("_")}
    assert calls <= vars(NetworkClient).keys()


# --- how amounts are typed ---------------------------------------------------------------------------


def test_amounts() -> None:
    assert rate("50M", "f") == Rate(bits_per_second=50_000_000)
    assert rate("1.5Gbit/s", "f") == Rate(bits_per_second=1_500_000_000)
    assert rate("100kbit", "f", 5000) == Rate(bits_per_second=100_000, burst_bytes=5000)
    assert rate("none", "f") is None
    assert [octets(text, "f") for text in ("1500", "64k", "1MiB")] == [1500, 65536, 1 << 20]
    assert [rate_text(r) for r in (None, Rate(bits_per_second=500_000))] == ["not limited", "500 kbit/s"]
    assert rate_text(Rate(bits_per_second=2_500_000, burst_bytes=9)) == "2.5 Mbit/s, burst 9 B"
    assert pair("10.0.0.0/8,52:54:00:00:00:01").mac == "52:54:00:00:00:01"
    assert host_and_port("[2001:db8::1]:80", "f") == ("2001:db8::1", 80)
    assert [numbers(text, "f") for text in ("80", "80-90", "8/0")] == [(80, None), (80, 90), (8, 0)]
    whole = port_request("blue,ip=10.1.0.5,group=a,group=b,address=2001:db8::5,pair=10.9.0.0/24,queues=2")
    assert whole == PortRequest(
        network=NetworkId("blue"),
        ip="10.1.0.5",
        addresses=("2001:db8::5",),
        allowed_pairs=(AddressPair(cidr="10.9.0.0/24"),),
        security_groups=whole.security_groups,
        queues=2,
    )
    assert whole.security_groups == ("a", "b")


@pytest.mark.parametrize(
    "call",
    [
        lambda: rate("fast", "f"),
        lambda: rate("-1M", "f"),
        lambda: octets("much", "f"),
        lambda: pair("", "f"),
        lambda: host_and_port("10.0.0.1", "f"),
        lambda: numbers("80-", "f"),
        lambda: port_request("blue,ip"),
        lambda: port_request("blue,ip=1,ip=2"),
        lambda: port_request("blue,queues=many"),
    ],
)
def test_amounts_that_are_none(call: Callable[[], object]) -> None:
    with pytest.raises(Refused) as caught:
        call()
    assert caught.value.remedy
