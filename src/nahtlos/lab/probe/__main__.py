"""`python -m nahtlos.lab.probe --plan FILE --out DIR`"""

import argparse
import gc
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from nahtlos.lab.probe.prober import Prober
from nahtlos.model.errors import Error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nahtlos.lab.probe", description="Measure servers from outside.")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        prober = Prober(options.plan, out)
    except (OSError, Error) as error:
        print(json.dumps({"error": str(error)}), file=sys.stderr)
        return 2

    def stop(number: int, frame: FrameType | None) -> None:
        prober.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    gc.freeze()
    gc.disable()
    prober.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
