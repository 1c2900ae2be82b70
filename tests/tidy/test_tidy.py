"""What reviews should not have to look for."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "nahtlos").rglob("*.py"))
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}
ADDRESS = re.compile(r"https?://")
LOCKS = ("packaging/requirements.lock", "packaging/bootstrap-requirements.txt")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_every_module_says_what_it_owns():
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_no_module_is_named_for_nothing():
    assert [str(p.relative_to(ROOT)) for p in SOURCES if p.stem in VAGUE or p.parent.name in VAGUE] == []


@pytest.mark.parametrize("name", LOCKS)
def test_locks_hold_hashes_and_no_addresses(name):
    text = (ROOT / name).read_text()
    assert "--hash=sha256:" in text
    assert not ADDRESS.search(text)


def test_no_mirror_is_written_down():
    mirror = re.compile(r"^\s*(deb|URIs:)\s.*https?://", re.MULTILINE)
    texts = {p: p.read_text(errors="replace") for p in tracked() if p.suffix not in (".png", ".ico")}
    allowed = ROOT / "tests"  # tests of the parser of apt's own files use made-up hosts
    assert [str(p) for p, text in texts.items() if mirror.search(text) and allowed not in p.parents] == []


def test_decisions_are_listed():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    assert [p.name for p in sorted(folder.glob("0*.md")) if p.name not in index] == []


def test_every_target_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    explained = set(re.findall(r"^([a-z%-]+):[^#\n]*## ", makefile, re.MULTILINE))
    assert phony - explained == set()


def test_functions_can_be_read_at_a_glance():
    """Not a limit for each, but for the whole: a code base drifts when nobody looks."""
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 34
    assert sum(n > 70 for n in lengths) / len(lengths) < 0.02


def test_the_command_line_begins_without_what_only_the_orchestrator_needs():
    """Every call of `nahtlos` pays for what it imports."""
    ask = (
        "import sys, nahtlos.entry.cli; print(*{'sqlalchemy', 'cryptography', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
