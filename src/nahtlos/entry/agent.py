"""The agent's process: composition of the real physical layer, and joining a cloud.

python -m nahtlos.entry.agent run  --settings FILE [--fd-peer N]
python -m nahtlos.entry.agent join --settings FILE --url https://ADDRESS:PORT --ca FILE --token-file FILE
"""

import argparse
import asyncio
import http.client
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import msgspec

from nahtlos.model.errors import Error, ErrorRecord, Refused, Unavailable
from nahtlos.physical.agent.agent import Agent
from nahtlos.physical.agent.keyring import AskedKeyring
from nahtlos.physical.hypervisor.driver import QemuHypervisor
from nahtlos.physical.memory_room import within_room
from nahtlos.physical.network.native import NativeNetwork
from nahtlos.physical.ports import Drivers
from nahtlos.physical.settings import AgentSettings, load_settings
from nahtlos.physical.storage.backends import Backends
from nahtlos.physical.storage.ceph.driver import CephStorage
from nahtlos.physical.storage.embedded import EmbeddedStorage
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.wire.credentials import host_key_and_csr, write_pki_dir
from nahtlos.wire.tls import ORCHESTRATOR, client_context_without_certificate, party_of
from nahtlos.wire.transport import Channel, Listener, OnChannel
from nahtlos.wire.websocket import WebSocketTransport

JOIN_SECONDS = 20.0

SWITCH_SECONDS = 0.0005
"""Worker threads read the kernel's tables; by default each may keep the event loop waiting for 5 ms every
time it wakes, and it wakes several times while a guest stands still (99th percentile of a round trip beside
such a thread: 14 ms by default, 5 ms so)."""

log = logging.getLogger("nahtlos.agent")


class InheritedListener:
    """A transport whose listener is a socket the supervisor holds: it outlives this process, so peers
    that dial while the agent restarts wait instead of being refused."""

    def __init__(self, transport: WebSocketTransport, fd: int | None) -> None:
        self._transport = transport
        self._fd = fd

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        return await self._transport.dial(address, port, expect=expect, timeout=timeout)

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> Listener:
        held = socket.socket(fileno=self._fd) if self._fd is not None else None
        return await self._transport.listen(address, port, on_channel, sock=held)


async def run(settings: AgentSettings, fd_peer: int | None) -> None:
    supervisor = SupervisorClient(settings.supervisor_socket)
    for folder in (settings.state_dir, settings.run_dir, settings.ram_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings, less = within_room(settings)
    if less:
        log.warning("%s", less)
    keyring = AskedKeyring()
    drivers = Drivers(
        supervisor=supervisor,
        hypervisor=QemuHypervisor(settings, supervisor),
        network=NativeNetwork(settings, supervisor),
        storage=_storage(settings, supervisor, keyring),
    )
    agent = Agent(
        settings,
        drivers,
        InheritedListener(WebSocketTransport(settings.pki_dir), fd_peer),
        settings.state_dir / "ledger.sqlite",
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        on_bug=lambda error: log.error("bug", exc_info=error),
    )
    keyring.ask = agent.ask
    task = asyncio.ensure_future(agent.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped")


def _storage(settings: AgentSettings, supervisor: SupervisorClient, keyring: AskedKeyring) -> Backends:
    embedded = EmbeddedStorage(settings, supervisor, keyring)
    ceph = CephStorage(settings, settings.ceph, supervisor) if settings.ceph else None
    if ceph is not None:
        embedded.copies.export_from(ceph.snapshot_node)
    return Backends(embedded, ceph)


def join(settings: AgentSettings, url: str, ca: Path, token: str) -> None:
    """Prove by a one-time token that this host may join; the key is made here and stays here."""
    key, csr = host_key_and_csr(settings.host)
    answer = _post_join(
        url,
        ca,
        {
            "token": token,
            "host": settings.host,
            "role": settings.role,
            "address": settings.address,
            "peer_port": settings.peer_port,
            "csr_pem": csr,
            "domain": settings.domain,
        },
    )
    write_pki_dir(settings.pki_dir, answer["ca_pem"], answer["certificate_pem"], key)


def _post_join(url: str, ca: Path, body: dict[str, object]) -> dict[str, str]:
    """The token is sent only to who proves to be the orchestrator."""
    where = urlsplit(url)
    if where.scheme != "https" or not where.hostname:
        raise Refused(f"'{url}' is no https address", field="url", remedy="use https://ADDRESS:PORT")
    context = client_context_without_certificate(ca)
    connection = http.client.HTTPSConnection(
        where.hostname, where.port or 443, timeout=JOIN_SECONDS, context=context
    )
    try:
        connection.connect()
        peer = party_of(cast("dict[str, object]", connection.sock.getpeercert()))  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        if peer != ORCHESTRATOR:
            raise Refused(f"{url} proved to be {peer or 'nobody known'}", field="url")
        connection.request(
            "POST", "/v1/join", msgspec.json.encode(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        payload = response.read()
    except OSError as error:
        raise Unavailable(f"{url} cannot be reached: {error}", field="url") from error
    finally:
        connection.close()
    if response.status != 200:
        raise _refusal(payload)
    return msgspec.json.decode(payload, type=dict[str, str])


def _refusal(payload: bytes) -> Error:
    try:
        return msgspec.json.decode(payload, type=dict[str, ErrorRecord])["error"].raised()
    except (msgspec.DecodeError, KeyError):
        return Unavailable("the orchestrator gave no reason")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nahtlos-agent")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "join"):
        command = commands.add_parser(name)
        command.add_argument("--settings", type=Path, required=True)
        if name == "run":
            command.add_argument("--fd-peer", type=int)
        else:
            command.add_argument("--url", required=True)
            command.add_argument("--ca", type=Path, required=True)
            command.add_argument("--token-file", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(
        level=os.environ.get("NAHTLOS_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    arguments = _arguments()
    try:
        settings = load_settings(arguments.settings)
        if arguments.command == "run":
            asyncio.run(run(settings, arguments.fd_peer))
        else:
            join(settings, arguments.url, arguments.ca, arguments.token_file.read_text().strip())
    except Error as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2 if isinstance(error, Refused) else 3)


if __name__ == "__main__":
    main()
