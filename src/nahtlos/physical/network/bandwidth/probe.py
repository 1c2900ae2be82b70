"""What this kernel offers for bandwidth, found by doing it all in a namespace that is gone a moment later.

Owns one file of the run directory, in which the answer is kept. Changes nothing outside the namespace that it
makes for its own thread.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from errno import ENOENT
from pathlib import Path

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import links
from nahtlos.physical.network.bandwidth import traffic_control as tc
from nahtlos.physical.network.netlink import KernelRefused, Netlink, Request

CLONE_NEWNET = 0x40000000
DEVICE = "probe"
WITHIN = 30.0
A_BUCKET = tc.Bucket(rate=1_000_000, burst=10_000, limit=50_000)
A_CLASS = tc.Class(tc.HANDLE | 1, tc.ROOT, 1_000_000, 1_000_000, 10_000, 10_000, 0, 10_000)


class Offered(msgspec.Struct, frozen=True):
    """Why each thing cannot be had; empty if it can."""

    bucket: str
    redirect: str
    classes: str
    better: dict[str, str]
    """What might be better, by kind: empty if this kernel has it. None at all: nothing could be tried."""

    @property
    def ports(self) -> bool:
        """Ports can be limited in both directions."""
        return not self.bucket and not self.redirect

    def words(self) -> dict[str, str]:
        limits = (
            "used: htb at the tap and, for what a server sends, at an ifb of its own (ingress, u32, mirred)"
        )
        missing = "; ".join(reason for reason in (self.bucket, self.redirect) if reason)
        return {
            "bandwidth of ports": f"missing: {missing}" if missing else limits,
            "shares of the underlay": f"missing: {self.classes}"
            if self.classes
            else "used: htb, nft priority",
            **{name: _better(name, reason) for name, reason in self.better.items()},
        }


_INSTEAD = {
    "fq_codel": "queues are bfifo",
    "clsact": "ingress serves",
    "matchall": "u32 serves",
    "police": "frames are queued, not dropped at once",
}


def _better(name: str, reason: str) -> str:
    return f"{reason or 'there, not used'}: {_INSTEAD[name]}"


def remembered(record: Path) -> Offered:
    """As `examine` found it since this host was started: making a namespace disturbs what moves."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(record.read_bytes(), type=Offered)
    found = examine()
    if found.better:
        record.parent.mkdir(parents=True, exist_ok=True)
        new = record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(found))
        new.replace(record)
    return found


def examine() -> Offered:
    """Blocks for some milliseconds; to be called in a worker thread."""
    found: list[Offered] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                raise Unavailable(f"no namespace of its own: {os.strerror(ctypes.get_errno())}")
            with Netlink() as netlink:
                found.append(_examine(netlink))
        except (OSError, Unavailable) as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="shaping-probe", daemon=True)
    thread.start()
    thread.join(WITHIN)
    if found:
        return found[0]
    reason = str(errors[0]) if errors else f"no answer within {WITHIN:.0f} s"
    return Offered(bucket=reason, redirect=reason, classes=reason, better={})


def _examine(netlink: Netlink) -> Offered:
    born = _tried(netlink, "ifb", links.create_ifb(DEVICE), links.configure(DEVICE, up=True))
    devices = links.read_links(netlink)
    index = devices[DEVICE].index if DEVICE in devices else devices["lo"].index
    loopback = devices["lo"].index
    redirected = born or _tried(
        netlink,
        "ingress, u32 and mirred",
        tc.put_ingress(loopback, DEVICE),
        tc.redirect(loopback, index, DEVICE),
    )
    return Offered(
        bucket=_tried(
            netlink,
            "htb and bfifo",
            *tc.put_bucket(index, A_BUCKET, DEVICE),
            tc.remove_root(index, DEVICE),
        ),
        redirect=redirected,
        classes=_tried(
            netlink,
            "htb, bfifo and u32",
            tc.put_htb(index, 1, DEVICE),
            tc.put_class(index, A_CLASS, DEVICE),
            tc.put_queue(index, (tc.OURS + 1) << 16, A_CLASS.handle, 10_000, DEVICE),
            tc.classify(index, tc.ARP, A_CLASS.handle, DEVICE),
        ),
        better={
            **{
                kind: _known(netlink, kind, lambda k: tc.probe(k, loopback))
                for kind in ("fq_codel", "clsact")
            },
            "matchall": _known(netlink, "matchall", lambda k: tc.probe_filter(k, loopback)),
            "police": _known(netlink, "police", lambda k: tc.probe_action(k, loopback)),
        },
    )


def _tried(netlink: Netlink, what: str, *requests: Request) -> str:
    try:
        netlink.change(requests)
    except KernelRefused as refused:
        return f"this kernel refuses {what} ({os.strerror(refused.code)})"
    return ""


def _known(netlink: Netlink, kind: str, request: Callable[[str], Request]) -> str:
    try:
        netlink.change([request(kind)])
    except KernelRefused as refused:
        if refused.code == ENOENT:
            return "missing"
    return ""
