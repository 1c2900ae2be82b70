"""The command line against the API at a real socket: results, JSON, exit codes."""

import asyncio
import contextlib
import json
import os
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nahtlos.entry import cli as entry
from nahtlos.lab.paths import BuildPaths, LabPaths
from nahtlos.model.blueprint import CampaignState
from nahtlos.model.errors import Error, Refused, Stale, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.cli.app import build_app
from nahtlos.ops.cli.command import Place, Surroundings, completer
from nahtlos.ops.cli.terminal import attach

NEW = "qemu-11.1.3-000000000002"
Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def run(reachable: Any, tmp_path: Path) -> Run:
    """Runs the command line in a thread, as the API it talks to lives in the test's own loop."""
    surroundings = Surroundings(
        socket_of_lab=lambda name: reachable.socket if name == "demo" else tmp_path / name,
        build_dir=tmp_path / "build",
    )
    app = build_app(surroundings)

    async def invoke(*arguments: str, **options: Any) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), **options)

    return invoke


# --- every command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("status",), "epoch 3"),
        (("host", "list"), "host-2"),
        (("host", "show", "host-1"), "10.99.0.11"),
        (("host", "cordon", "host-1"), "cordoned"),
        (("host", "drain", "host-1"), "drained"),
        (("host", "activate", "host-1"), "active"),
        (("release", "list"), "qemu-11.1.3-000000000002"),
        (("release", "show", NEW), "pc-q35-10.0"),
        (("server", "list"), "web-1"),
        (("server", "show", "web-1"), "10.77.0.10"),
        (("server", "create", "web-2"), "running"),
        (("server", "move", "web-1"), "host-2"),
        (("server", "move", "web-1", "--to", "host-2"), "host-2"),
        (("server", "delete", "web-1"), "deleted"),
        (("server", "console", "web-1"), "login: "),
        (("server", "console", "web-1", "--send", "root"), "login: root"),
        (("upgrade", "plan", NEW), "web-1 → host-2"),
        (("upgrade", "start", NEW), "running"),
        (("upgrade", "start", "--component", "network", "--to", NEW), "network"),
        (("upgrade", "plan", "--component", "storage", "--to", NEW), "stays in use"),
        (("upgrade", "plan", "--strategy", "in-place", NEW), "row:"),
        (("upgrade", "start", "--strategy", "in-place", NEW), "in-place"),
        (("operator", "list"), "alice"),
        (("promise", "--vcpus", "4", "--memory-mib", "1024"), "of what is promised"),
    ],
)
async def test_every_command_shows_its_result(run: Run, arguments: tuple[str, ...], shown: str) -> None:
    result = await run(*arguments)
    assert result.exit_code == 0, result.output
    assert shown in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("status",), {"orchestrator_epoch": 3}),
        (("host", "show", "host-1"), {"id": "host-1", "intent": "active"}),
        (("host", "drain", "host-1"), {"intent": "drained", "phase": "drained"}),
        (("release", "show", NEW), {"version": "11.1.3"}),
        (("server", "create", "web-2", "--host", "host-2"), {"id": "web-2", "host": "host-2"}),
        (("server", "move", "web-1"), {"host": "host-2"}),
        (("server", "delete", "web-1"), {"id": "web-1"}),
        (("server", "console", "web-1"), {"text": "login: ", "next_offset": 7}),
        (("upgrade", "plan", NEW), {"total_moves": 1, "blockers": [], "strategy": "auto"}),
        (("upgrade", "plan", NEW, "--strategy", "move"), {"strategy": "move"}),
        (("upgrade", "start", NEW), {"hosts_total": 2}),
    ],
)
async def test_every_result_can_be_json(
    run: Run, arguments: tuple[str, ...], expected: dict[str, Any]
) -> None:
    result = await run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert {name: value[name] for name in expected} == expected
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("host", "list"), ("server", "list"), ("release", "list")])
async def test_lists_are_json_arrays(run: Run, arguments: tuple[str, ...]) -> None:
    before, after = await run("--json", *arguments), await run(*arguments, "--json")
    assert json.loads(before.stdout) == json.loads(after.stdout)
    assert isinstance(json.loads(before.stdout), list)


async def test_a_campaign_shows_where_its_way_back_ends(run: Run, reachable: Any) -> None:
    assert "it can be rolled back" in " ".join((await run("upgrade", "plan", NEW)).stdout.split())
    assert "no way back" in (await run("upgrade", "plan", NEW, "--no-way-back")).stdout
    assert "upgrade rollback" in (await run("upgrade", "start", NEW)).stdout
    assert "it is rolled back" in (await run("upgrade", "rollback")).stdout
    assert "past the point of no return" in (await run("upgrade", "commit")).stdout
    refused = await run("upgrade", "rollback")
    assert refused.exit_code == 2 and "point of no return" in refused.stderr


async def test_an_upgrade_from_plan_to_report(run: Run, reachable: Any) -> None:
    assert (await run("upgrade", "start", NEW, "--host", "host-1")).exit_code == 0
    assert "paused" in (await run("upgrade", "pause")).stdout
    assert "running" in (await run("upgrade", "resume")).stdout
    reachable.cloud.state = CampaignState.DONE
    watched = await run("upgrade", "watch", "--json")
    assert watched.exit_code == 0
    assert json.loads(watched.stdout.splitlines()[-1])["campaign"]["state"] == "done"
    assert (await run("upgrade", "watch")).exit_code == 0
    assert "nothing has ended in it yet" in (await run("upgrade", "report")).stdout
    assert json.loads((await run("upgrade", "report", "c-1", "--json")).stdout)["hosts_upgraded"] == 1


async def test_a_cancelled_campaign_is_a_failure_to_who_watches(run: Run) -> None:
    await run("upgrade", "start", NEW)
    assert (await run("upgrade", "cancel")).exit_code == 0
    assert (await run("upgrade", "watch")).exit_code == 1
    assert (await run("upgrade", "watch", "--json")).exit_code == 1


async def test_a_blocked_plan_names_the_remedy_and_is_refused(run: Run) -> None:
    result = await run("upgrade", "plan", NEW, "--host", "host-2")
    assert result.exit_code == 2
    assert "not connected" in result.stdout
    assert "→ start it" in result.stdout


async def test_a_cloud_elsewhere_is_reached_with_a_credential_from_a_file(run: Run, reachable: Any) -> None:
    where = ("--url", reachable.url, "--ca", str(reachable.ca_file))
    for credential in (
        ("--token-file", str(reachable.token_file)),
        ("--pki-dir", str(reachable.pki / "alice")),
    ):
        assert (await run("host", "list", *where, *credential)).exit_code == 0
        assert (await run(*where, *credential, "host", "list")).exit_code == 0
    environment = {"NAHTLOS_URL": reachable.url, "NAHTLOS_CA": str(reachable.ca_file)}
    assert (await run("host", "list", env=environment)).exit_code == 2
    environment["NAHTLOS_TOKEN_FILE"] = str(reachable.token_file)
    assert (await run("host", "list", env=environment)).exit_code == 0


# --- operators ---------------------------------------------------------------------------------------


async def test_an_operator_is_added_used_and_withdrawn(
    run: Run, reachable: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    token_file, ca_file = tmp_path / "carol.token", tmp_path / "ca.pem"
    added = await run(
        "operator", "add", "carol", "--out", str(token_file), "--ca-out", str(ca_file), "--json"
    )
    assert added.exit_code == 0, added.output
    assert json.loads(added.stdout) == {
        "name": "carol",
        "token_file": str(token_file),
        "ca_file": str(ca_file),
    }
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    assert token
    assert token not in added.output + caplog.text
    where = ("--url", reachable.url, "--ca-file", str(ca_file), "--token-file", str(token_file))
    assert (await run("host", "list", *where)).exit_code == 0
    assert {"name": "carol", "tokens": 1} in json.loads((await run("operator", "list", "--json")).stdout)
    assert (await run("operator", "remove", "carol")).exit_code == 0
    refused = await run("host", "list", *where)
    assert refused.exit_code == 2
    assert "Error: authorization: " in refused.stderr


async def test_operators_are_added_by_root_alone(run: Run, reachable: Any, tmp_path: Path) -> None:
    where = ("--url", reachable.url, "--ca-file", str(reachable.ca_file))
    new = tmp_path / "new"
    for arguments in (
        ("operator", "add", "eve", "--out", str(new)),
        ("operator", "remove", "alice"),
        ("operator", "list"),
    ):
        for credential in (
            ("--token-file", str(reachable.token_file)),
            ("--pki-dir", str(reachable.pki / "alice")),
        ):
            result = await run(*arguments, *where, *credential, "--json")
            assert result.exit_code == 2
            assert json.loads(result.stdout)["error"]["field"] == "authorization"
    assert not new.exists()
    assert "alice" in (await run("operator", "list")).stdout


async def test_no_token_is_given_that_cannot_be_kept(run: Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out, ca_out, field in (
        (taken, None, "out"),
        (tmp_path / "no" / "folder", None, "out"),
        (tmp_path / "token", taken, "ca_out"),
    ):
        more = ("--ca-out", str(ca_out)) if ca_out else ()
        result = await run("operator", "add", "dora", "--out", str(out), *more)
        assert result.exit_code == 2
        assert f"Error: {field}: " in result.stderr
    assert taken.read_text() == "mine"
    assert not (tmp_path / "token").exists()
    assert "dora" not in (await run("operator", "list")).stdout


@pytest.mark.parametrize("name", ["root", "Bad_Name"])
async def test_a_refused_operator_leaves_no_file(run: Run, tmp_path: Path, name: str) -> None:
    result = await run("operator", "add", name, "--out", str(tmp_path / "token"))
    assert result.exit_code == 2
    assert "Error: operator: " in result.stderr
    assert not (tmp_path / "token").exists()


# --- waiting -----------------------------------------------------------------------------------------


async def test_what_is_not_done_by_the_deadline_is_unavailable(run: Run, reachable: Any) -> None:
    reachable.cloud.settles = False
    for arguments in (
        ("server", "create", "web-2"),
        ("server", "move", "web-1"),
        ("server", "delete", "web-1"),
    ):
        result = await run(*arguments, "--deadline", "0.3", "--json")
        assert result.exit_code == 3, result.output
        error = json.loads(result.stdout)["error"]
        assert (error["kind"], error["field"]) == ("unavailable", "deadline")
    assert "host-1 must start it" in (await run("server", "move", "web-1", "--deadline", "0.1")).stderr


async def test_without_waiting_the_command_returns_at_once(run: Run, reachable: Any) -> None:
    reachable.cloud.settles = False
    for arguments in (
        ("server", "create", "web-2"),
        ("server", "move", "web-1"),
        ("host", "drain", "host-1"),
    ):
        assert (await run(*arguments, "--no-wait")).exit_code == 0


async def test_waiting_outlasts_an_orchestrator_that_is_away(run: Run, reachable: Any) -> None:
    reachable.cloud.settles = False

    async def come_about() -> None:
        while ServerId("web-2") not in reachable.cloud.places:
            await asyncio.sleep(0.01)
        reachable.cloud.fails = Unavailable("not the leader")
        await asyncio.sleep(0.3)
        reachable.cloud.settles = True

    async with asyncio.TaskGroup() as group:
        group.create_task(come_about())
        result = await run("server", "create", "web-2", "--deadline", "10")
    assert result.exit_code == 0, result.output


async def test_following_a_console_ends_when_the_server_does(run: Run, reachable: Any) -> None:
    async def write_and_end() -> None:
        await reachable.cloud.followed.wait()
        reachable.cloud.console += b"more\n"
        while reachable.cloud.shown < len(reachable.cloud.console):
            await asyncio.sleep(0.01)
        del reachable.cloud.places["web-1"]

    async with asyncio.TaskGroup() as group:
        group.create_task(write_and_end())
        result = await run("server", "console", "web-1", "--follow")
    assert result.stdout == "login: more\n"
    assert result.exit_code == 2


async def test_a_terminal_is_attached_until_it_leaves(reachable: Any) -> None:
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    try:
        async with reachable.unix() as client, asyncio.timeout(10), asyncio.TaskGroup() as group:
            attached = group.create_task(attach(client, ServerId("web-1"), theirs, theirs))
            assert await asyncio.to_thread(os.read, ours, 100) == b"login: "
            os.write(ours, b"root\r")
            assert await asyncio.to_thread(os.read, ours, 100) == b"root\r"
            os.write(ours, b"\x03\x1d")
            await attached
        assert reachable.cloud.console == b"login: root\r\x03"
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


async def test_attaching_needs_a_terminal(reachable: Any) -> None:
    with (reachable.token_file).open() as file:
        async with reachable.unix() as client:
            with pytest.raises(Refused, match="no terminal"):
                await attach(client, ServerId("web-1"), file.fileno(), file.fileno())


# --- exit codes and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("host", "show", "host-9"), "host"),
        (("host", "drain", "host-9"), "host"),
        (("server", "show", "none"), "server"),
        (("server", "move", "none"), "server"),
        (("server", "move", "web-1", "--to", "host-9"), "host"),
        (("server", "delete", "none"), "server"),
        (("server", "console", "none"), "server"),
        (("server", "create", "web-1"), "name"),
        (("server", "create", "Bad_Name"), "name"),
        (("release", "show", "qemu-9"), "release"),
        (("release", "build", "9.9"), "track"),
        (("upgrade", "plan", "qemu-9"), "release"),
        (("upgrade", "plan"), "to"),
        (("upgrade", "start", NEW, "--to", "qemu-9"), "to"),
        (("upgrade", "start", "qemu-9"), "release"),
        (("upgrade", "watch"), "campaign"),
        (("upgrade", "pause"), "campaign"),
        (("upgrade", "report", "--evidence", "/nonexistent"), "folder"),
        (("server", "show", "../status"), "name"),
        (("operator", "remove", "nobody"), "operator"),
        (("operator", "remove", "../status"), "name"),
        (("host", "list", "--url", "http://x:1", "--ca", "x"), "url"),
        (("host", "list", "--url", "https://x:1"), "ca"),
        (("host", "list", "--url", "https://x:1", "--ca", "/nonexistent"), "ca_file"),
    ],
)
async def test_bad_input_is_refused_by_field(run: Run, arguments: tuple[str, ...], field: str) -> None:
    shown = await run(*arguments)
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert f"Error: {field}: " in shown.stderr
    result = await run(*arguments, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["field"] == field


async def test_two_campaigns_at_once_are_refused(run: Run) -> None:
    assert (await run("upgrade", "start", NEW)).exit_code == 0
    result = await run("upgrade", "start", NEW)
    assert result.exit_code == 2
    assert "→ cancel it" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(Error("failed"), 1), (Refused("no"), 2), (Unavailable("later"), 3), (Stale("raced"), 4)],
)
async def test_exit_codes_follow_the_kinds_of_errors(
    run: Run, reachable: Any, error: Error, code: int
) -> None:
    reachable.cloud.fails = error
    result = await run("status")
    assert result.exit_code == code
    assert error.message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("host", "list", "--lab", "other"),
        ("host", "list", "--socket", "/nonexistent.sock"),
        ("--lab", "other", "host", "list"),
    ],
)
async def test_a_cloud_that_is_not_there_is_unavailable(run: Run, arguments: tuple[str, ...]) -> None:
    result = await run(*arguments)
    assert result.exit_code == 3
    assert "→" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("server", "create"),
        ("server", "create", "a", "--vcpus", "0"),
        ("server", "create", "a", "--vcpus", "many"),
        ("server", "explode"),
        ("nonsense",),
        ("host", "list", "--colour"),
    ],
)
async def test_mistakes_on_the_command_line_are_refused(run: Run, arguments: tuple[str, ...]) -> None:
    assert (await run(*arguments)).exit_code == 2


def test_mistakes_on_the_command_line_can_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(["server", "create", "--json"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "refused"


async def test_without_a_terminal_nothing_is_cut_or_broken_into_lines(run: Run, reachable: Any) -> None:
    result = await run("release", "show", "q" * 200)
    assert f"there is no release '{'q' * 200}'" in result.stderr
    reachable.cloud.settles = False
    assert "host-1 must start it" in (await run("server", "list")).stdout.splitlines()[1]


async def test_a_socket_that_is_for_root_alone_says_so(
    run: Run, reachable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_path: Path, **_options: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    result = await run("host", "list")
    assert result.exit_code == 2
    assert "Error: user: " in result.stderr


async def test_a_broken_release_is_named_also_beside_json(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "build" / "releases" / "qemu-1.0-000000000000"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    result = await run("release", "list", "--built", "--json")
    assert json.loads(result.stdout) == []
    assert "the manifest is broken" in result.stderr


# --- labs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["lab", "up"], ["lab", "down"]])
def test_labs_are_made_by_root(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as ended:
        entry.main([*arguments, "--lab", "never", "--json"])
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["field"] == "user"
    assert error["remedy"]


def test_what_the_machine_lacks_is_named_before_a_lab_is_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)

    def lacking() -> None:
        raise Refused("missing: nftables", field="packages", remedy="apt-get install nftables, or make setup")

    monkeypatch.setattr(entry, "require_lab", lacking)
    with pytest.raises(SystemExit) as ended:
        entry.main(["lab", "up", "--lab", "never", "--json"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "packages"
    assert not LabPaths("never").run.exists()


def test_no_lab_is_begun_on_a_broken_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(entry, "require_lab", lambda: None)
    monkeypatch.setattr(BuildPaths, "default", classmethod(lambda cls: cls(tmp_path)))
    broken = tmp_path / "releases" / "qemu-1.0-000000000000"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        entry.main(["lab", "up", "--lab", "never", "--json"])
    assert ended.value.code == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["field"].endswith("manifest.json")
    assert "build" in error["remedy"]
    assert not LabPaths("never").run.exists()


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_lab_names_are_checked(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        entry.main(["lab", command, "--lab", "../etc", "--json"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "lab"


def test_a_lab_that_is_not_up_has_a_status_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        entry.main(["lab", "status", "--lab", "never-up", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "never-up",
        "up": False,
        "processes": 0,
        "status": None,
        "hosts": [],
    }


async def test_a_lab_that_runs_is_not_opened_again(
    reachable: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(
        "nahtlos.lab.paths.LabPaths.operator_socket", property(lambda _paths: reachable.socket)
    )

    def up() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            entry.main(["lab", "up", "--lab", "never", "--json"])
        return ended.value.code

    assert await asyncio.to_thread(up) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["field"]) == ("conflict", "lab")


# --- the shared options ------------------------------------------------------------------------------


def test_what_is_said_at_the_command_stands_against_what_was_said_before() -> None:
    before = Place(lab="a", json=True, url="https://x", ca=Path("ca"))
    assert Place(lab="b").over(before) == Place(lab="b", json=True, ca=Path("ca"))
    assert Place(json=False).over(before) == Place(lab="a", json=False, url="https://x", ca=Path("ca"))


async def test_names_are_completed_from_the_cloud(reachable: Any, tmp_path: Path) -> None:
    class Context:
        def __init__(self, **params: object) -> None:
            self.params = params

        def find_root(self) -> "Context":
            return self

    async def names(client: Any) -> list[str]:
        return [h.id for h in await client.hosts()]

    surroundings = Surroundings(
        socket_of_lab=lambda name: reachable.socket if name == "demo" else tmp_path / name, build_dir=tmp_path
    )
    complete: Any = completer(surroundings, names)
    assert await asyncio.to_thread(complete, Context(), "host-") == ["host-1", "host-2"]
    assert await asyncio.to_thread(complete, Context(), "x") == []
    assert await asyncio.to_thread(complete, Context(lab="other"), "host-") == []
