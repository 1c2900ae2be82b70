"""Virtual time: it jumps, it is the same every time, and it says who waits when nothing can happen."""

import asyncio
import random
import threading
import time

import pytest

from nahtlos.physical.sim.clock import EPOCH, Deadlock, TooLong, run_virtual, virtual_loop


def test_a_day_passes_at_once() -> None:
    async def main() -> float:
        await asyncio.gather(asyncio.sleep(86_400), asyncio.sleep(3_600))
        assert virtual_loop().wall() == EPOCH + virtual_loop().time()
        return virtual_loop().time()

    began = time.monotonic()
    assert run_virtual(main(), seed=1, limit_seconds=1e6) == pytest.approx(86_400)
    assert time.monotonic() - began < 5


def test_deadlines_pass_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return virtual_loop().time()

    assert run_virtual(main(), seed=1, limit_seconds=60) == pytest.approx(30)


def test_a_deadlock_names_who_waits() -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.Event().wait(), name="the one who waits")

    with pytest.raises(Deadlock, match="the one who waits"):
        run_virtual(main(), seed=1, limit_seconds=60)


def test_a_run_that_does_not_end_is_ended() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(TooLong, match="100 virtual seconds"):
        run_virtual(main(), seed=1, limit_seconds=100)


def test_the_same_seed_draws_and_orders_the_same() -> None:
    async def main() -> list[float]:
        drawn: list[float] = []

        async def draw(number: int) -> None:
            await asyncio.sleep(random.random())
            drawn.append(number + virtual_loop().time())

        done, _ = await asyncio.wait([asyncio.ensure_future(draw(n)) for n in range(20)])
        return drawn + [float(t.get_name().removeprefix("Task-")) % 1 for t in done]

    assert run_virtual(main(), seed=5, limit_seconds=60) == run_virtual(main(), seed=5, limit_seconds=60)
    assert run_virtual(main(), seed=5, limit_seconds=60) != run_virtual(main(), seed=6, limit_seconds=60)


def test_threads_are_waited_for_and_time_stands_still_meanwhile() -> None:
    async def main() -> float:
        loop = virtual_loop()
        assert await asyncio.to_thread(threading.current_thread) is threading.current_thread()
        event = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.sleep(100))
            with loop.real_io():
                timer = threading.Timer(0.05, loop.call_soon_threadsafe, (event.set,))
                timer.start()
                await event.wait()
                at = loop.time()
            timer.join()
        return at

    assert run_virtual(main(), seed=1, limit_seconds=200) == 0.0
