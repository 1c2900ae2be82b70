"""The supervisor's process: `python -m nahtlos.entry.supervisor --socket PATH --state DIR`; with `--keeper`
instead of `--socket` the process beside it that ends what is leased, too."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from nahtlos.model.errors import Error
from nahtlos.physical.supervisor.keeper import run_keeper
from nahtlos.physical.supervisor.server import run_supervisor


def main() -> int:
    parser = argparse.ArgumentParser(prog="nahtlos-supervisor", description=__doc__)
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--socket", type=Path, help="unix socket to answer on")
    role.add_argument("--keeper", action="store_true", help="keep its leases instead")
    parser.add_argument("--state", type=Path, required=True, help="folder of its journal")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # Without a handler, so that no Python code runs at the end: units and sockets' paths stay.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if options.keeper:
            run_keeper(options.state)
        else:
            run_supervisor(options.socket, options.state)
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
