"""What this kernel offers the network driver, found by asking it for things it must refuse or accept.

Changes nothing: devices are asked for with an address no device may have, rules are only checked.
"""

import errno
from pathlib import Path

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import links, nft, tap
from nahtlos.physical.network.firewall.layout import Tracking
from nahtlos.physical.network.netlink import KernelRefused, Netlink
from nahtlos.physical.ports import NetworkCapabilities

NEEDED = ("bridge devices", "vxlan devices", "veth devices", "tap devices", "gate")
"""For moves without loss; the names are those of the details."""

GATE_PROBE = """
table netdev nahtlos-probe {
  set moving { type ether_addr; elements = { 02:00:00:00:00:01 comment "probe" } }
  chain probe {
    type filter hook ingress device "lo" priority -500; policy accept;
    ether daddr @moving fwd to "lo"
  }
}
"""
BRIDGE_CONNTRACK_PROBE = """
table bridge nahtlos-probe {
  chain probe { type filter hook forward priority 0; policy accept; ct state established accept; }
}
"""


TRACKING_PROBE = """
table inet nahtlos-probe {
  chain zone { type filter hook prerouting priority raw; policy accept; ct zone set 1; }
  chain probe { type filter hook prerouting priority mangle; policy accept; ct state new meta mark set 1; }
}
"""
BRIDGE_SETTINGS = Path("/proc/sys/net/bridge")


async def tracking() -> Tracking | None:
    """How bridged packets can come to belong to connections; None: not at all."""
    if await _accepts(BRIDGE_CONNTRACK_PROBE):
        return Tracking.BRIDGE
    if BRIDGE_SETTINGS.exists() and await _accepts(TRACKING_PROBE):
        return Tracking.NETFILTER
    return None


TRACKING_WORDS = {
    Tracking.BRIDGE: "used: stateful and strict; connections are tracked by nf_conntrack_bridge",
    Tracking.NETFILTER: "used: stateful and strict; connections are tracked by way of br_netfilter, as this "
    "kernel has no nf_conntrack_bridge",
    None: "missing: this kernel tracks no connections on bridges (load the module nf_conntrack_bridge or "
    "br_netfilter); spoofing is prevented all the same",
}


async def examine(netlink: Netlink) -> NetworkCapabilities:
    details = {f"{kind} devices": _device_kind(netlink, kind) for kind in ("bridge", "vxlan", "veth")}
    details["tap devices"] = "used" if tap.DEVICE.exists() else f"missing: {tap.DEVICE} does not exist"
    details["gate"] = await _rules(GATE_PROBE, "used: nftables, netdev ingress, forwarding to a veth pair")
    lossless = all(details[name].startswith("used") for name in NEEDED)
    way = await tracking()
    details["firewall"] = TRACKING_WORDS[way]
    details["vhost-net"] = _present(Path("/dev/vhost-net"))
    return NetworkCapabilities(
        lossless_move=lossless,
        ct_transfer=False,
        strict_stateful=way is not None,
        shaper=False,
        details=details,
    )


def _device_kind(netlink: Netlink, kind: str) -> str:
    try:
        netlink.change([links.impossible(kind)])
    except KernelRefused as refused:
        if refused.code == errno.EOPNOTSUPP:
            return f"missing: this kernel has no {kind} devices (load the module {kind})"
    return "used"


async def _accepts(text: str) -> bool:
    try:
        return not await nft.check(text)
    except Unavailable:
        return False


async def _rules(text: str, used: str) -> str:
    try:
        reason = await nft.check(text)
    except Unavailable as error:
        return f"missing: {error}"
    return f"missing: {reason}" if reason else used


def _present(path: Path) -> str:
    return "there; the VMM may use it" if path.exists() else f"missing: {path} does not exist"
