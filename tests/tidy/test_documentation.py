"""What documentation says of the command line is so, and what it links to is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from nahtlos.entry.cli import application

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOR_OPERATORS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPOKEN = re.compile(r"`(nahtlos [^`]+)`")


def commands(of: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(of, "commands"):
        for name, each in of.commands.items():
            yield from commands(each, (*path, name))
    else:
        yield path, of


COMMANDS = dict(commands(typer.main.get_command(application())))
GROUPS = {path[0] for path in COMMANDS}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_every_command_is_in_the_table_of_commands_and_no_other() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    listed = {tuple(words.split()) for words in re.findall(r"^\| `([a-z][a-z0-9 -]*)`", page, re.MULTILINE)}
    assert listed == set(COMMANDS)


def test_every_group_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [group for group in sorted(GROUPS) if f"`{group}" not in text] == []


def told(page: Path) -> Iterator[str]:
    """Calls of the command line that a page shows, also such as are cut short in its prose."""
    text = page.read_text()
    for block in FENCE.findall(text):
        yield from re.findall(r"^(?:\$ )?(nahtlos .*)$", block.replace("\\\n", " "), re.MULTILINE)
    yield from (spoken.replace("\n", " ") for spoken in SPOKEN.findall(FENCE.sub("", text)))


def words_of(call: str) -> list[str]:
    bare = re.split(r"\s(?:#|\||>|&&)", call.replace("…", " "))[0]
    return shlex.split(bare.replace("'", "") if bare.count("'") % 2 else bare)[1:]


def wrong_with(words: list[str]) -> str:
    while words and words[0].startswith("--"):  # the shared options before a command, or about it
        words = words[1:]
    if not words or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
        return ""
    depth = next((n for n in (3, 2, 1) if any(path == tuple(words[:n]) for path in COMMANDS)), 0)
    if not depth:
        group = [path for path in COMMANDS if path[0] == words[0]]
        names = {name for path in group for name in path[1:]}
        several = len(words) > 1 and any(name in names for name in re.split(r"[|, ]", words[1]))
        return "" if group and (len(words) == 1 or several) else "there is no such command"
    known = {
        option
        for parameter in COMMANDS[tuple(words[:depth])].params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    given = {
        part.strip("[](),.;").partition("=")[0]
        for word in words[depth:]
        for part in word.split("|")
        if part.lstrip("[(").startswith("--")
    }
    return ", ".join(sorted(given - known - {"--help", "--"}))


@pytest.mark.parametrize("page", FOR_OPERATORS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_a_page_shows_exist_with_their_options(page: Path) -> None:
    assert {call: wrong for call in told(page) if (wrong := wrong_with(words_of(call)))} == {}


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("nahtlos server create web --memory-mib 64", ""),
        ("nahtlos security-group rule add web --port 80 # and so on", ""),
        ("nahtlos server-group list | show web", ""),
        ("nahtlos server craete web", "there is no such command"),
        ("nahtlos servers list", "there is no such command"),
        ("nahtlos router gateway set wan --hots edge-1", "--hots"),
    ],
)
def test_a_call_that_is_wrong_is_found(call: str, wrong: str) -> None:
    assert wrong_with(words_of(call)) == wrong
