"""Whether a bridge hands its IP packets to the inet hooks (br_netfilter), where they can be tracked.

Owns two settings of each of this driver's bridges, so that bridges on which nothing is tracked cost nothing.
Never decides on which.
"""

import struct

from nahtlos.physical.network.netlink import (
    RTM_GETLINK,
    RTM_NEWLINK,
    Netlink,
    Request,
    attributes,
    nested,
    text,
    u8,
)

IFLA_NAME, IFLA_LINKINFO, INFO_KIND, INFO_DATA = 3, 18, 1, 2
CALL_IPTABLES, CALL_IP6TABLES = 36, 37
HEADER = struct.pack("BxHiII", 0, 0, 0, 0, 0)


def handed_on(netlink: Netlink, bridge: str) -> bool | None:
    """None if there is no such bridge; False also if only one family is."""
    body = netlink.query(RTM_GETLINK, HEADER + text(IFLA_NAME, bridge))
    if body is None:
        return None
    info = attributes(attributes(body[16:]).get(IFLA_LINKINFO, b""))
    data = attributes(info.get(INFO_DATA, b""))
    return all(data.get(kind, b"\0")[0] for kind in (CALL_IPTABLES, CALL_IP6TABLES))


def hand_on(bridge: str, *, on: bool) -> Request:
    data = nested(INFO_DATA, u8(CALL_IPTABLES, on), u8(CALL_IP6TABLES, on))
    body = HEADER + text(IFLA_NAME, bridge) + nested(IFLA_LINKINFO, text(INFO_KIND, "bridge"), data)
    return Request(RTM_NEWLINK, 0, body, f"configure bridge {bridge}")
