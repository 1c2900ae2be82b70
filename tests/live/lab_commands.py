"""Commands of a lab that are run in this process, which spares each a start; with a build folder of the lab's
own, so that images can be taken in without any other lab seeing them."""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test_command_line import CommandLine
from typer.testing import CliRunner

from nahtlos.entry.cli import application
from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.paths import BuildPaths


class LabCommands(CommandLine):
    def __init__(self, lab: str, build: Path) -> None:
        super().__init__(lab)
        self.build = BuildPaths(build)
        self._app = application(self.build)

    def run(self, *arguments: str, within: str = "") -> subprocess.CompletedProcess[str]:
        assert not within, "these run where the test does"
        given = CliRunner().invoke(self._app, list(arguments), env={"NAHTLOS_LAB": self.lab})
        failed = given.exception if not isinstance(given.exception, SystemExit) else None
        assert failed is None, (arguments, failed, given.output)
        return subprocess.CompletedProcess(arguments, given.exit_code, given.stdout, given.stderr)

    def checksum(self, snapshot: str, file: Path, host: str = "") -> str:
        """Of what a snapshot holds, as its host has written it raw to `file`."""
        where = ("--host", host) if host else ()
        words = ("image", "export", "--snapshot", snapshot, str(file), "--format", "raw", *where)
        return str(self.json(*words)["record"]["result"]["sha256"])


def own_build(folder: Path) -> Path:
    """The checkout's build, but for the images: of these only the guest's."""
    shared = BuildPaths.default()
    folder.mkdir()
    for name in ("releases", "cache", "downloads"):
        (folder / name).symlink_to(shared.root / name)
    (folder / "images").mkdir()
    for file in shared.images.glob("guest-*"):
        try:
            os.link(file, folder / "images" / file.name)
        except OSError:
            shutil.copy(file, folder / "images" / file.name)
    return folder


@contextmanager
def lab_commands(prefix: str, folder: Path) -> Generator[LabCommands]:
    line = LabCommands(unique_name(prefix), own_build(folder / "build"))
    try:
        yield line
    finally:
        ended: Any = line.run("lab", "down")
        assert ended.returncode == 0, ended.stderr
