"""A link between the hosts of a lab that carries only so much: how it is capped, what is dropped where, and a
control in which it is filled without any move.

A cap is a queue: a stream that is faster fills it, and what comes then is dropped, whoever sent it. So a
packet that is missing is looked for at each hop before a move is blamed.
"""

import asyncio
import json
import subprocess
import sys
from typing import Any

from nahtlos.lab.datacentre import Datacentre
from nahtlos.lab.topology import SWITCH

HOSTS = ("host-1", "host-2")
DEADLINE = 20.0
PORT = 40123
"""Outside of the ports of streams: what fills the link in the control is nobody's move."""
SINK = "import socket;s=socket.create_server(('',{port}));c,_=s.accept()\nwhile c.recv(1<<20):pass"
SOURCE = (
    "import socket,time;c=socket.create_connection(('{address}',{port}));e=time.time()+{seconds}\n"
    "while time.time()<e:c.sendall(bytes(1<<18))"
)


def cap_links(datacentre: Datacentre, bytes_per_second: int) -> None:
    """What the switch sends to either host."""
    assert datacentre.topology is not None
    namespace = datacentre.topology.node(SWITCH).namespace
    for host in HOSTS:
        shaped = f"rate {bytes_per_second * 8}bit burst 512kb latency 50ms"
        command = f"tc -n {namespace} qdisc add dev p-{host} root tbf {shaped}"
        subprocess.run(command.split(), check=True, timeout=DEADLINE, capture_output=True)


def dropped(datacentre: Datacentre) -> dict[str, int]:
    """Packets, by hop, since each was made: the cap's queues, the hosts' own, their taps' rings."""
    assert datacentre.topology is not None
    topology = datacentre.topology
    found = {"cap": sum(_queued(topology.node(SWITCH).namespace, "p-host"))}
    for host in HOSTS:
        namespace = topology.node(host).namespace
        found[f"{host} queues"] = sum(_queued(namespace, ""))
        links = _json(f"ip -n {namespace} -s -j link show type tun")
        found[f"{host} taps"] = sum(link["stats64"]["tx"]["dropped"] for link in links)
    return found


def _queued(namespace: str, device: str) -> list[int]:
    found = _json(f"tc -n {namespace} -s -j qdisc show")
    return [each.get("drops", 0) for each in found if each["dev"].startswith(device)]


def _json(command: str) -> list[dict[str, Any]]:
    done = subprocess.run(command.split(), check=True, timeout=DEADLINE, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")


async def fill(datacentre: Datacentre, seconds: float) -> None:
    """One bulk stream from the first host to the second."""
    assert datacentre.topology is not None
    first, second = (datacentre.topology.node(host) for host in HOSTS)
    sink = _python(second.namespace, SINK.format(port=PORT))
    try:
        await asyncio.sleep(1.0)
        text = SOURCE.format(address=second.address, port=PORT, seconds=seconds)
        source = _python(first.namespace, text)
        await asyncio.to_thread(source.wait, seconds + DEADLINE)
    finally:
        sink.kill()
        sink.wait()


def _python(namespace: str, text: str) -> subprocess.Popen[bytes]:
    command = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-c", text]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
