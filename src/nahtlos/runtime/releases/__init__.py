"""Releases of what the cloud runs on: built from Debian's packages, content-addressed, side by side."""

from nahtlos.runtime.releases.builder import TRACKS, build_release
from nahtlos.runtime.releases.bundle import list_releases, load_manifest, load_release
from nahtlos.runtime.releases.progress import OnProgress, Progress

__all__ = [
    "TRACKS",
    "OnProgress",
    "Progress",
    "build_release",
    "list_releases",
    "load_manifest",
    "load_release",
]
