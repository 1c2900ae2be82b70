"""What is to be probed: the plan, read and checked. Pure."""

import re

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.values import Value

SAFE_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]*$")


class PlannedServer(Value, frozen=True, kw_only=True):
    name: str
    ip: str
    start: float | None = None


class Plan(Value, frozen=True, kw_only=True):
    servers: tuple[PlannedServer, ...] = ()
    udp_pps: int = 250
    tcp_interval: float = 0.05
    http_interval: float = 0.1
    api_socket: str | None = None


def paces(plan: Plan) -> tuple[float, ...]:
    """How often what is said to each server."""
    return (plan.udp_pps, plan.tcp_interval, plan.http_interval)


def decode_plan(data: bytes) -> Plan:
    """The plan, or `Refused` naming the field that is wrong."""
    try:
        plan = msgspec.json.decode(data, type=Plan)
    except msgspec.DecodeError as error:
        raise Refused(f"not a probe plan: {error}", field="plan", remedy="see nahtlos.lab.probe") from error
    if not 1 <= plan.udp_pps <= 2000:
        raise Refused(f"{plan.udp_pps} datagrams a second", field="udp_pps", remedy="1 to 2000")
    for server in plan.servers:
        if not SAFE_NAME.match(server.name):
            raise Refused(f"'{server.name}' is no server's name", field="servers.name")
    return plan
