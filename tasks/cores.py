"""The CPU from which a GPU is fed.

A virtual CPU of a shared host runs at half its speed for seconds at a time, while a neighbour uses the other thread of
its core, and a call that waits for its launches then takes twice as long: on one host medians of equal processes
differed by up to 44 %, and processes at different clocks cannot be compared. So the thread that launches sits on the
CPU that is fastest now, as a fixed integer loop finds, and looks again between calls.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.interference import canary_s
from tasks.statistics import median

CANDIDATES = 16  # of more CPUs, as many by chance
LOOK_EVERY_S = 0.05  # slow spells last tenths of a second
SELDOM_S = 0.25  # where a look leaves the device idle
AGAIN_S, SELDOM_AGAIN_S = 0.5, 8.0  # after one, after many choices in a row among slow CPUs only
SLOWER = 1.25  # than the fastest seen: a neighbour, not the clock; time to choose again
# PyTorch's threads that launch the backward pass, while the main thread waits for them
_LAUNCHING = "pt_autograd"

_beside: frozenset[int] = frozenset()
_thread = threading.local()


class Feeder:
    """Chooses among the CPUs of this process. One look costs half a millisecond, a choice as much for each candidate.

    The first choice looks at all candidates, later ones take the first that is about as fast as the fastest ever seen,
    or the best of them.
    """

    def __init__(
        self,
        *,
        speed: Callable[[], float] = lambda: canary_s(2, rounds=5_000),
        move: Callable[[set[int]], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._speed, self._clock = speed, clock
        self._try, self._move, self._leave = move or _move_this_thread, move or move_launching_threads, move or release
        self._allowed: set[int] = set()
        self._looked = 0.0
        self._choose_at, self._again_s = 0.0, AGAIN_S
        self._seen: list[float] = []
        self.cpu: int | None = None
        self.choices = 0
        self.fastest_s, self.slowest_s = math.inf, 0.0

    @property
    def seconds(self) -> float:
        """Of the loop on the CPUs that it sat on: the median over all looks."""
        return median(self._seen)

    @property
    def looks(self) -> int:
        """Taken so far."""
        return len(self._seen)

    def seconds_since(self, looks: int) -> float | None:
        """The same over the looks after the first `looks`; None where there was none."""
        return median(self._seen[looks:]) if len(self._seen) > looks else None

    @contextmanager
    def seated(self) -> Iterator[None]:
        """On the fastest CPU while this is open; afterwards wherever the process may run."""
        global _beside
        self._allowed = os.sched_getaffinity(0)
        try:
            self._choose()
            yield
        finally:
            self._leave(self._allowed)
            self._allowed, _beside = set(), frozenset()

    def look(self, every_s: float = LOOK_EVERY_S) -> None:
        """Between calls: choose again if this CPU is not about as fast as the fastest seen."""
        if not self.due(every_s):
            return
        self._looked = self._clock()
        self._note(self._speed())
        if self._seen[-1] > SLOWER * self.fastest_s and self._looked >= self._choose_at:
            self._choose()

    def due(self, every_s: float = LOOK_EVERY_S) -> bool:
        """Whether the last look is long enough ago for another one."""
        return bool(self._allowed) and self._clock() - self._looked >= every_s

    def to_dict(self) -> dict[str, float | int | None]:
        """For the row's environment; milliseconds of the loop on the fastest and slowest CPU seen."""
        return {
            "cpu": self.cpu,
            "choices": self.choices,
            "fastest_ms": 1e3 * self.fastest_s,
            "slowest_ms": 1e3 * self.slowest_s,
        }

    def _note(self, seconds: float) -> None:
        self._seen.append(seconds)
        self.fastest_s, self.slowest_s = min(self.fastest_s, seconds), max(self.slowest_s, seconds)

    def _choose(self) -> None:
        global _beside
        found: list[tuple[float, int]] = []
        for cpu in random.sample(sorted(self._allowed), min(len(self._allowed), CANDIDATES)):
            self._try({cpu})
            found.append((self._speed(), cpu))
            self.slowest_s = max(self.slowest_s, found[-1][0])
            if found[-1][0] <= SLOWER * self.fastest_s and self.choices:
                break
        seconds, self.cpu = min(found)
        self._move({self.cpu})
        self._note(seconds)
        _beside = frozenset(self._allowed - {self.cpu}) or frozenset(self._allowed)
        self.choices += 1
        self._looked = self._clock()
        if seconds > SLOWER * self.fastest_s:
            self._choose_at, self._again_s = self._looked + self._again_s, min(2 * self._again_s, SELDOM_AGAIN_S)
        else:
            self._choose_at, self._again_s = 0.0, AGAIN_S


def step_aside() -> None:
    """Called again and again by a thread that helps measuring: not on the CPU of the one that launches."""
    beside = _beside  # it may change meanwhile
    if beside and getattr(_thread, "beside", None) != beside:
        os.sched_setaffinity(0, beside)
        _thread.beside = beside


def release(cpus: set[int]) -> None:
    """Let every thread that was kept on one of these CPUs, or started by one that was, run on all of them."""
    os.sched_setaffinity(0, cpus)
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            own = os.sched_getaffinity(int(task.name))
            if len(own) == 1 and own < cpus:
                os.sched_setaffinity(int(task.name), cpus)


def _move_this_thread(cpus: set[int]) -> None:
    os.sched_setaffinity(0, cpus)


def move_launching_threads(cpus: set[int]) -> None:
    """Let this thread, and those that launch a backward pass, run on `cpus` only."""
    os.sched_setaffinity(0, cpus)
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            if (task / "comm").read_text().startswith(_LAUNCHING):
                os.sched_setaffinity(int(task.name), cpus)
