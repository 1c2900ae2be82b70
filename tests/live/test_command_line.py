"""The real command line on a real lab: an operator's day, from `lab up` to `lab down`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nahtlos.lab.datacentre import API_PORT, unique_name
from nahtlos.lab.paths import BuildPaths, LabPaths

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(300),
]
STEP_SECONDS = 150.0


class CommandLine:
    """Runs `nahtlos` as a shell would, always on one lab."""

    def __init__(self, lab: str) -> None:
        self.lab = lab

    def run(self, *arguments: str, within: str = "") -> subprocess.CompletedProcess[str]:
        """`within`: the node whose network the command is run in."""
        enter = ["nsenter", f"--net=/run/netns/nl-{self.lab}-{within}"] if within else []
        return subprocess.run(
            [*enter, sys.executable, "-m", "nahtlos.entry.cli", *arguments],
            env={**os.environ, "NAHTLOS_LAB": self.lab},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        done = self.run("--json", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str) -> dict[str, str]:
        done = self.run("--json", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        error = json.loads(done.stdout)["error"]
        assert error["message"]
        assert error["remedy"]
        return error


@pytest.fixture
def nahtlos() -> Iterator[CommandLine]:
    line = CommandLine(unique_name("cli"))
    yield line
    ended = line.run("lab", "down")
    assert ended.returncode == 0, ended.stderr
    paths = LabPaths(line.lab)
    assert not any(path.exists() for path in (paths.run, paths.state, paths.ram))


def test_an_operators_day(nahtlos: CommandLine, tmp_path: Path) -> None:
    old, new = (r.id for r in BuildPaths.default().movable_releases())
    assert nahtlos.json("lab", "status")["up"] is False
    opened = nahtlos.json("lab", "up", "--hosts", "2")
    assert opened["status"]["converged"]
    assert {h["phase"] for h in opened["hosts"]} == {"serving"}
    assert nahtlos.refused("lab", "up")["field"] == "lab"
    assert {r["id"] for r in nahtlos.json("release", "list")} >= {old, new}

    created = nahtlos.json("server", "create", "web", "--memory-mib", "128", "--host", "host-1")
    assert (created["host"], created["release"]) == ("host-1", old)
    lacks = nahtlos.refused("server", "create", "big", "--memory-mib", "1000", "--host", "host-1")
    assert lacks["field"] in ("host", "memory_mib")
    _booted(nahtlos)
    assert nahtlos.json("server", "move", "web", "--to", "host-2")["host"] == "host-2"
    assert nahtlos.refused("server", "move", "web", "--to", "host-2")["field"] == "to"

    _credentials(nahtlos, tmp_path)
    _upgrade(nahtlos, old, new)

    assert nahtlos.json("host", "drain", "host-1")["phase"] == "drained"
    assert nahtlos.json("host", "activate", "host-1")["intent"] == "active"
    nahtlos.json("server", "delete", "web")
    assert nahtlos.json("server", "list") == []


def _booted(nahtlos: CommandLine) -> None:
    deadline = time.monotonic() + STEP_SECONDS
    while "NAHTLOS-READY" not in nahtlos.json("server", "console", "web")["text"]:
        assert time.monotonic() < deadline, "the guest did not boot"
        time.sleep(0.5)


def _upgrade(nahtlos: CommandLine, old: str, new: str) -> None:
    plan = nahtlos.json("upgrade", "plan", new)
    assert [h["to_release"] for h in plan["hosts"]] == [new, new]
    assert nahtlos.refused("upgrade", "plan", "qemu-0.0.0-000000000000")["field"] == "release"
    assert nahtlos.json("upgrade", "start", new)["campaign"]["state"] == "running"
    assert nahtlos.refused("upgrade", "start", new)["field"] == "campaign"
    assert nahtlos.json("upgrade", "pause")["campaign"]["state"] == "paused"
    assert nahtlos.json("upgrade", "resume")["campaign"]["state"] == "running"
    watched = nahtlos.run("upgrade", "watch", "--json")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    last = json.loads(watched.stdout.splitlines()[-1])
    assert (last["campaign"]["state"], last["hosts_upgraded"], last["moves_failed"]) == ("done", 2, 0)
    assert nahtlos.json("upgrade", "report")["campaign"]["from_releases"] == [old]
    assert nahtlos.json("server", "show", "web")["release"] == new


def _credentials(nahtlos: CommandLine, folder: Path) -> None:
    """An operator elsewhere: a token of the root-only socket is good for TLS until it is withdrawn."""
    token, ca = folder / "token", folder / "ca.pem"
    nahtlos.json("operator", "add", "ann", "--out", str(token), "--ca-out", str(ca))
    where = ("--url", f"https://10.99.0.1:{API_PORT}", "--ca-file", str(ca), "--token-file", str(token))
    listed = nahtlos.run("server", "list", "--json", *where, within="host-1")
    assert [s["id"] for s in json.loads(listed.stdout)] == ["web"], listed.stderr
    assert nahtlos.run("operator", "list", *where, within="host-1").returncode == 2
    nahtlos.json("operator", "remove", "ann")
    assert nahtlos.run("server", "list", *where, within="host-1").returncode == 2
    secret = token.read_text().strip()
    logs = LabPaths(nahtlos.lab).state.glob("*/*.log")
    assert not any(secret in log.read_text(errors="replace") for log in logs)
