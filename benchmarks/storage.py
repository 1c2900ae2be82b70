"""`make bench-storage`: what volumes cost a server, and what it notices while they are changed under it.

Every comparison is made by turns in one run. Each subject stands in a module of its own, which says what its
figures are made of; what all of them share is in `storage_site`.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine

from benchmarks import storage_io, storage_limits, storage_relocation, storage_stalls, storage_torture
from benchmarks.figures import Figures

SUBJECTS: dict[str, Callable[..., Coroutine[object, object, None]]] = {
    "io": storage_io.measure,
    "limits": storage_limits.measure,
    "relocation": storage_relocation.measure,
    "stalls": storage_stalls.measure,
    "torture": storage_torture.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="more turns, many rounds of faults")
    parser.add_argument(
        "--only", choices=sorted(SUBJECTS), action="append", help="may be given several times"
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("needs root", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended on the way out
    figures = Figures()
    for name, measure in SUBJECTS.items():
        if arguments.only is None or name in arguments.only:
            print(f"measuring {name}", file=sys.stderr)
            asyncio.run(measure(figures, long=arguments.long))
    return figures.finish("storage", "volumes")


if __name__ == "__main__":
    sys.exit(main())
