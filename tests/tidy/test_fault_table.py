"""docs/faults.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORD = re.compile(r"\btest_[a-z0-9_]+")


def test_every_test_of_the_table_exists() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    known = {path.stem for path in files}
    for path in files:
        known.update(WORD.findall(path.read_text(encoding="utf-8")))
    named = set(WORD.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8")))
    assert len(named) > 30
    cut_short = {name for name in named if name.endswith("_") and any(k.startswith(name) for k in known)}
    assert sorted(named - known - cut_short) == []
