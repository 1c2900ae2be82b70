"""Releases of what the cloud runs on: built from Debian's packages, content-addressed, side by side."""

from nahtlos.runtime.releases.builder import NETWORK_TRACKS, TRACKS, build_release
from nahtlos.runtime.releases.image import GuestImage, build_image, list_images
from nahtlos.runtime.releases.progress import OnProgress, Progress
from nahtlos.wire.bundle import broken_releases, list_releases, load_manifest, load_release

__all__ = [
    "NETWORK_TRACKS",
    "TRACKS",
    "GuestImage",
    "OnProgress",
    "Progress",
    "broken_releases",
    "build_image",
    "build_release",
    "list_images",
    "list_releases",
    "load_manifest",
    "load_release",
]
