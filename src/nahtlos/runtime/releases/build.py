"""`python -m nahtlos.runtime.releases.build`: builds releases and images, for the Makefile.

Prints what it does as plain lines; the operator's command line draws its own progress over the same calls.
"""

import argparse
import sys
import time
from pathlib import Path

from nahtlos.model.errors import Error, Refused
from nahtlos.runtime.releases.builder import NETWORK_TRACKS, TRACKS, build_release
from nahtlos.runtime.releases.debian_image import build_debian
from nahtlos.runtime.releases.image import build_image
from nahtlos.runtime.releases.progress import Progress

_LINE_EVERY = 2.0


class Lines:
    """A line for each new step, and now and then one for a step that takes long."""

    def __init__(self) -> None:
        self._step = ""
        self._at = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.step == self._step and now - self._at < _LINE_EVERY:
            return
        self._step, self._at = progress.step, now
        print(f"  {progress.step:<9} {progress.text}{_share(progress)}", flush=True)


def _share(progress: Progress) -> str:
    if progress.total <= 1:
        return ""
    if progress.unit == "bytes":
        return f"  {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB"
    return f"  {progress.done} of {progress.total}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nahtlos.runtime.releases.build", description=__doc__)
    tracks = sorted({**TRACKS, **NETWORK_TRACKS})
    parser.add_argument("--track", action="append", default=[], choices=tracks, help="repeatable")
    parser.add_argument("--image", action="store_true", help="build the guest image")
    parser.add_argument("--debian", action="store_true", help="build the Debian image")
    parser.add_argument("--refresh", action="store_true", help="look for newer versions")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--guest-dir", type=Path, default=Path("guest"))
    chosen = parser.parse_args(arguments)
    build: Path = chosen.build_dir
    try:
        for track in chosen.track:
            print(f"release {track}", flush=True)
            build_release(track, build / "releases", build / "downloads", Lines(), refresh=chosen.refresh)
        if chosen.image:
            print("guest image", flush=True)
            build_image(chosen.guest_dir, build / "images", build / "downloads", Lines())
        if chosen.debian:
            print("Debian image", flush=True)
            image = build_debian(build / "debian", Lines(), refresh=chosen.refresh)
            print(image.raw(build / "debian"))
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
