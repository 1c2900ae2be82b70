"""The orchestrator's process: composition of store, identity, catalogues, listeners and controllers.

python -m nahtlos.entry.orchestrator --settings FILE --fd-agents N --fd-api N --fd-operator N

The three listening sockets are inherited, so that they outlive this process: who dials while it restarts
waits instead of being refused. SIGTERM ends it in order; kill -9 at any moment loses nothing.
"""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from nahtlos.entry.image_intake import ImageIntake
from nahtlos.model.errors import Error, ErrorRecord
from nahtlos.ops.api import Enrolment, create_app
from nahtlos.ops.serve import serving
from nahtlos.runtime.controllers.bootstrap import bootstrap
from nahtlos.runtime.controllers.catalogues import FolderReleases
from nahtlos.runtime.controllers.orchestrator import Orchestrator
from nahtlos.runtime.identity import CertificateAuthority, Keyring, Operators
from nahtlos.runtime.settings import OrchestratorSettings, load_settings
from nahtlos.runtime.store.store import Store
from nahtlos.wire.tls import CA_FILE
from nahtlos.wire.websocket import WebSocketTransport

_log = logging.getLogger("nahtlos.orchestrator")


async def run(settings: OrchestratorSettings, *, fd_agents: int, fd_api: int, fd_operator: int) -> None:
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as held:
        alone = _lock(settings.lock, held)
        store = await Store.open(settings.database)
        try:
            await bootstrap(store, settings.cloud)
            orchestrator = Orchestrator(
                store,
                holder=f"{socket.gethostname()}/{os.getpid()}",
                alone=alone,
                identity=CertificateAuthority.load(settings.ca_dir),
                releases=FolderReleases(settings.releases_dir),
                images=ImageIntake(
                    settings.images_dir, settings.releases_dir, settings.state_dir / "image-jail"
                ),
                keyring=Keyring(settings.ca_dir),
            )
            await _serve(settings, orchestrator, fd_agents, fd_api, fd_operator)
            await orchestrator.resign()
        finally:
            await store.close()


async def _serve(
    settings: OrchestratorSettings, orchestrator: Orchestrator, fd_agents: int, fd_api: int, fd_operator: int
) -> None:
    """Until SIGTERM or SIGINT."""
    operators = Operators(settings.operators)
    enrolment = Enrolment(operators=operators, ca_file=settings.pki_dir / CA_FILE)
    app = create_app(orchestrator.cloud, operators.authenticate, enrolment)
    operator, api = socket.socket(fileno=fd_operator), socket.socket(fileno=fd_api)
    async with (
        serving(app, unix_socket=operator, tls=api, pki_dir=settings.pki_dir),
        asyncio.TaskGroup() as tasks,
    ):
        controllers = tasks.create_task(orchestrator.run())
        listener = await WebSocketTransport(settings.pki_dir).listen(
            "", 0, orchestrator.serve_agent, sock=socket.socket(fileno=fd_agents)
        )
        try:
            await _told_to_end()
        finally:
            _log.info("ending")
            controllers.cancel()
            await listener.close()


async def _told_to_end() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether this is the only process on this database. Held until the process ends, however it ends."""
    file = held.enter_context(path.open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="nahtlos-orchestrator", description="One orchestrator of a cloud.")
    parser.add_argument("--settings", type=Path, required=True)
    for name, what in (
        ("agents", "agents dial in"),
        ("api", "operators call over TLS"),
        ("operator", "root calls"),
    ):
        text = f"inherited listening socket at which {what}"
        parser.add_argument(f"--fd-{name}", type=int, required=True, metavar="N", help=text)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings(options.settings)
        asyncio.run(
            run(
                settings,
                fd_agents=options.fd_agents,
                fd_api=options.fd_api,
                fd_operator=options.fd_operator,
            )
        )
    except Error as error:
        print(f"nahtlos-orchestrator: {ErrorRecord.of(error).kind}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
