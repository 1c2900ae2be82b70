"""Whether the underlay can be shared as it is asked for. Pure."""

from collections.abc import Mapping

from nahtlos.model.config import UnderlayShares
from nahtlos.model.errors import Refused
from nahtlos.model.ids import (
    NetworkId,
)
from nahtlos.model.networking import (
    Family,
    NetworkSpec,
)
from nahtlos.model.topology import Underlay
from nahtlos.runtime.controllers.network_requests import MIN_MTU, TUNNEL_BYTES, in_use
from nahtlos.runtime.controllers.port_requests import MAX_RATE

MIN_UNDERLAY_RATE = 10**6
MOST_CHANNELS = 16


def checked_underlay(asked: Underlay, networks: Mapping[NetworkId, NetworkSpec]) -> Underlay:
    if asked.mtu and not MIN_MTU[Family.IPV6] + TUNNEL_BYTES <= asked.mtu <= 65535:
        raise Refused(
            f"an underlay with an MTU of {asked.mtu}",
            field="mtu",
            remedy=f"give {MIN_MTU[Family.IPV6] + TUNNEL_BYTES} to 65535, or 0 if it is not known",
        )
    larger = [n.id for n in networks.values() if asked.mtu and n.mtu > asked.mtu - TUNNEL_BYTES]
    in_use(f"more than the {asked.mtu - TUNNEL_BYTES} that are left", larger, "mtu", "make their MTU smaller")
    if not 1 <= asked.move_channels <= MOST_CHANNELS:
        raise Refused(
            f"moves by {asked.move_channels} connections",
            field="move_channels",
            remedy=f"give 1 to {MOST_CHANNELS}, no more than hosts have processors to spare",
        )
    if asked.shares is not None:
        _check_shares(asked.shares)
    return asked


def _check_shares(shares: UnderlayShares) -> None:
    if not MIN_UNDERLAY_RATE <= shares.bits_per_second <= MAX_RATE:
        raise Refused(
            f"{shares.bits_per_second} bit/s is no underlay",
            field="bits_per_second",
            remedy=f"give {MIN_UNDERLAY_RATE // 10**6} Mbit/s to {MAX_RATE // 10**9} Gbit/s",
        )
    for field in ("control", "moves", "tenants"):
        if not 1 <= getattr(shares, field) <= 98:
            raise Refused(f"{getattr(shares, field)} percent", field=field, remedy="give 1 to 98")
    total = shares.control + shares.moves + shares.tenants
    if total != 100:
        raise Refused(
            f"control, moves and tenants are {total} percent together", field="control", remedy="make it 100"
        )
