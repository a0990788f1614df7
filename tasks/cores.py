"""The CPU from which a GPU is fed.

A virtual CPU of a shared host runs at half its speed for seconds at a time, while a neighbour uses the other thread of
its core, and a call that waits for its launches then takes twice as long: on one host medians of equal processes
differed by up to 44 %, and processes at different clocks cannot be compared. So the thread that launches sits on the
CPU that is fastest now, as a fixed integer loop finds, and looks again between calls.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.interference import canary_s

CANDIDATES = 16  # of more CPUs, as many by chance
LOOK_EVERY_S = 0.5
SLOWER = 1.1  # than the fastest at the last choice: time to choose again
# PyTorch's threads that launch the backward pass, while the main thread waits for them
_LAUNCHING = "pt_autograd"

_beside: frozenset[int] = frozenset()


class Feeder:
    """Chooses among the CPUs of this process. One look costs a millisecond, a choice one for each candidate."""

    def __init__(
        self,
        *,
        speed: Callable[[], float] = lambda: canary_s(4, rounds=5_000),
        move: Callable[[set[int]], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._speed, self._move, self._clock = speed, move or move_launching_threads, clock
        self._allowed: set[int] = set()
        self._looked = 0.0
        self.cpu: int | None = None
        self.choices = 0
        self.fastest_s = self.slowest_s = 0.0

    @contextmanager
    def seated(self) -> Iterator[None]:
        """On the fastest CPU while this is open; afterwards wherever the process may run."""
        global _beside
        self._allowed = os.sched_getaffinity(0)
        try:
            self._choose()
            yield
        finally:
            self._move(self._allowed)
            self._allowed, _beside = set(), frozenset()

    def look(self) -> None:
        """Between calls: choose again if this CPU is no longer as fast as the fastest was."""
        if not self._allowed or self._clock() - self._looked < LOOK_EVERY_S:
            return
        self._looked = self._clock()
        if self._speed() > SLOWER * self.fastest_s:
            self._choose()

    def to_dict(self) -> dict[str, float | int | None]:
        """For the row's environment; milliseconds of the loop on the fastest and slowest CPU at the last choice."""
        return {
            "cpu": self.cpu,
            "choices": self.choices,
            "fastest_ms": 1e3 * self.fastest_s,
            "slowest_ms": 1e3 * self.slowest_s,
        }

    def _choose(self) -> None:
        global _beside
        candidates = sorted(self._allowed)
        if len(candidates) > CANDIDATES:
            candidates = random.sample(candidates, CANDIDATES)
        found = []
        for cpu in candidates:
            self._move({cpu})
            found.append((self._speed(), cpu))
        (self.fastest_s, self.cpu), (self.slowest_s, _) = min(found), max(found)
        self._move({self.cpu})
        _beside = frozenset(self._allowed - {self.cpu}) or frozenset(self._allowed)
        self.choices += 1
        self._looked = self._clock()


def step_aside() -> None:
    """Called first by a thread that helps measuring: it inherited the CPU of the one that launches."""
    if _beside:
        os.sched_setaffinity(0, _beside)


def move_launching_threads(cpus: set[int]) -> None:
    """Let this thread, and those that launch a backward pass, run on `cpus` only."""
    os.sched_setaffinity(0, cpus)
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            if (task / "comm").read_text().startswith(_LAUNCHING):
                os.sched_setaffinity(int(task.name), cpus)
