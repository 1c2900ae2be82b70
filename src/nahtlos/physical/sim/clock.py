"""Virtual time: an asyncio event loop whose clock jumps to the next timer as soon as nothing is ready.

Owns the loop, its clock and the determinism of a run: the same coroutine under the same seed does the same
things in the same order. Never sleeps, except inside `real_io`, where it waits for real descriptors; work
given to `run_in_executor` (hence `asyncio.to_thread`) is done at once in the loop's own thread.

What is left to chance outside: the order of sets of strings (PYTHONHASHSEED). Sets of tasks are ordered
here, by giving tasks a hash of their number.
"""

import asyncio
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

REAL_IO_SECONDS = 30.0
"""Real seconds that one wait for real descriptors may take."""
CLEANUP_SECONDS = 600.0
"""Virtual seconds granted to cancelled tasks after a run was ended for taking too long."""
EPOCH = 1_700_000_000.0
"""Wall clock at virtual time 0. Any moment will do; a plausible one is easier to read in a trace."""


class Deadlock(AssertionError):
    """Nothing is ready, no timer is set: whoever still waits would wait for ever."""


class TooLong(AssertionError):
    """The run did not end within its virtual time."""


class _Clock(selectors.BaseSelector):
    """Stands where the loop would wait for descriptors, and lets time pass instead."""

    def __init__(self, limit: float, waiting: Callable[[], str]) -> None:
        self.now = 0.0
        self._waiting = waiting
        self.limit = limit
        self.real_io = 0
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.real_io:
            return self._real.select(0) if timeout == 0 else self._wait_for_descriptors()
        if timeout is None:
            ready = self._real.select(0)
            if not ready:
                raise Deadlock(
                    f"at {self.now:.6f} s nothing can ever happen again; waiting: {self._waiting()}"
                )
            return ready
        if timeout > 0:
            self._pass(timeout)
        return []

    def _wait_for_descriptors(self) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(REAL_IO_SECONDS)
        if not ready:
            raise Deadlock(
                f"no real descriptor became ready in {REAL_IO_SECONDS:g} s; waiting: {self._waiting()}"
            )
        return ready

    def _pass(self, seconds: float) -> None:
        if self.now + seconds > self.limit:
            limit, self.limit = self.limit, self.now + CLEANUP_SECONDS
            raise TooLong(f"not over after {limit:g} virtual seconds; waiting: {self._waiting()}")
        self.now += seconds

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class _NumberedTask(asyncio.Task[T]):
    """A task that hashes by its number, so that sets of tasks iterate in the same order in every run."""

    def __init__(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], number: int, **rest: Any
    ) -> None:
        self.number = number
        super().__init__(coro, **rest)

    def __hash__(self) -> int:
        return self.number


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self, limit_seconds: float) -> None:
        self._clock = _Clock(limit_seconds, self._waiting)
        super().__init__(self._clock)
        self._task_numbers = itertools.count(1)
        self.set_task_factory(self._numbered)

    def time(self) -> float:
        return self._clock.now

    def wall(self) -> float:
        """The simulated wall clock, seconds."""
        return EPOCH + self._clock.now

    @contextmanager
    def real_io(self) -> Generator[None]:
        """While inside, virtual time stands still, and the loop waits for real descriptors (a thread's
        wake-up, a socket) when nothing is ready. For what cannot be done in the loop's own thread; the
        order against other ready tasks is then up to the machine."""
        self._clock.real_io += 1
        try:
            yield
        finally:
            self._clock.real_io -= 1

    def run_in_executor(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _waiting(self) -> str:
        tasks = (t for t in asyncio.all_tasks(self) if not t.done())
        return "; ".join(sorted(_where(t) for t in tasks)) or "no task"

    def _numbered(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        **rest: Any,
    ) -> asyncio.Task[T]:
        return _NumberedTask(coro, next(self._task_numbers), loop=loop, **rest)


def run_virtual(main: Coroutine[Any, Any, T], *, seed: int, limit_seconds: float) -> T:
    """Run `main` to its end in virtual time, `random` seeded. Raises Deadlock or TooLong, which name the
    tasks that wait, or whatever `main` raises."""
    random.seed(seed)
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(limit_seconds)) as runner:
        return runner.run(main)


def virtual_loop() -> VirtualTimeLoop:
    """The running loop, which must be a virtual one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop), "the simulated world lives in virtual time only"
    return loop


def _where(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=4)
    if not stack:
        return task.get_name()
    frame = stack[-1]
    return f"{task.get_name()} in {frame.f_code.co_qualname} line {frame.f_lineno}"
