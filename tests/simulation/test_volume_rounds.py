"""Seeds of `volume_rounds`: 12, or 30 with NAHTLOS_THOROUGH. NAHTLOS_SEEDS asks for another number of them,
NAHTLOS_FIRST_SEED for others."""

import os

from volume_rounds import Rounds

SEEDS = int(os.environ.get("NAHTLOS_SEEDS", "30" if os.environ.get("NAHTLOS_THOROUGH") else "12"))
FROM = int(os.environ.get("NAHTLOS_FIRST_SEED", "0"))


def test_seeded_rounds_lose_nothing() -> None:
    found: list[str] = []
    relocated = moved = 0
    for seed in range(FROM, FROM + SEEDS):
        run = Rounds(seed).play()
        relocated, moved = relocated + run.relocated, moved + run.moved
        if run.problems:
            found.append(f"seed {seed}: {'; '.join(run.problems)}")
    assert not found, "\n".join(found)
    assert relocated > SEEDS, "most of them have their volumes relocated"
    assert moved > SEEDS // 2, "and their servers moved"
