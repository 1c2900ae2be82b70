"""A few seeded rounds of `benchmarks.storage_torture`: daemons and agents are killed at steps of whatever is
done to a volume, and at moments between them; its writer loses nothing, and its copies are the same at the
end."""

import os
import random
import shutil

import pytest
from benchmarks import storage_torture as torture
from benchmarks.storage_site import Site

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="its writer is compiled"),
]


async def test_whoever_is_killed_no_acknowledged_write_is_lost_and_copies_are_the_same() -> None:
    seed = int(os.environ.get("NAHTLOS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"NAHTLOS_SEED={seed}")
    total = torture.Total()
    async with Site(torture.HOSTS) as site:
        for number in (seed, seed + 1):  # of either kind
            await torture.one_round(site, number, total)
    assert (total.lost, total.failed, total.differ) == (0, 0, 0)
    assert total.written > 0
    assert total.kills > 0
