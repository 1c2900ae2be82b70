"""The program that switches a host off: what counts as done, and what is said of it otherwise."""

import sys

import pytest

from nahtlos.runtime.controllers.power_fence import run_command


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit(0)", ""),
        ("raise SystemExit(3)", "returned 3"),
        ("raise SystemExit('first\\nno such outlet')", "returned 1: no such outlet"),
    ],
)
async def test_only_a_program_that_returns_0_has_switched_a_host_off(script: str, said: str) -> None:
    failed = await run_command((sys.executable, "-c", script))
    assert failed.endswith(said) and bool(failed) == bool(said)


async def test_a_program_that_is_not_there_or_does_not_end_has_not() -> None:
    assert "No such file" in await run_command(("/no/such/program",))
    script = "import time; time.sleep(600)"
    assert "did not end within 0.2 s" in await run_command((sys.executable, "-c", script), 0.2)
