"""`python -m nahtlos.runtime.evidence DIR` makes a report again from its records, and shows it.
Exit code 1 if a promise was not kept."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from nahtlos.model.errors import Error
from nahtlos.runtime.evidence.publish import publish
from nahtlos.runtime.evidence.report import collect
from nahtlos.runtime.evidence.text import render_text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nahtlos.runtime.evidence", description="Make a report again.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    try:
        report = collect(folder)
        publish(folder, report)
    except (OSError, Error) as error:
        print(error, file=sys.stderr)
        return 2
    Console().print(render_text(report))
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
