"""Which CPU launches the work of a GPU: a fast one, as the work itself shows.

On a shared host a virtual CPU may run at half its speed for tenths of a second to minutes, when its physical core is
shared with somebody else's work; no counter inside the machine tells. Seen on such a host: eager steps of a small model
took 9.5 ms or 16 ms, by the CPU they were launched from, so that one process's median differed from the next one's by
up to 1.9 times. A device that waits for its host is therefore launched from a CPU on which the same calls have not been
seen to run faster elsewhere. No sample is dropped: the thread moves, and what was slow stays in the record.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.statistics import median

SLOWER = 1.08  # than the best seen: move
FORGET = 1.02  # the best is doubted this much after every CPU was tried in vain
WINDOW_MS, WINDOW_SAMPLES = 10.0, 3
EXPLORED = 6  # CPUs tried at first; where each third is slow, the chance that all are is a thousandth


def bind(cpu: int) -> None:
    """Put the calling thread, and autograd's, on one CPU; other threads stay where they are."""
    for thread in (0, *_autograd_threads()):
        with suppress(OSError):  # an autograd thread may have ended
            os.sched_setaffinity(thread, {cpu})


def _autograd_threads() -> list[int]:
    """Threads of this process that run backward passes, and so launch their kernels."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            if (task / "comm").read_text().startswith("pt_autograd"):
                found.append(int(task.name))
    return found


@dataclass(kw_only=True)
class FastCore:
    """Watches how long equal pieces of work take, and moves the launching thread when its CPU has become slow.

    `best_ms` is the least median of a window on any CPU. `seen` maps a CPU to the median of its last window.
    """

    allowed: Collection[int]
    move_to: Callable[[int], None] = bind
    seed: int = 0
    best_ms: float | None = None
    moves: int = 0
    seen: dict[int, float] = field(default_factory=dict)
    _cpu: int = -1  # wherever the scheduler has put it
    _window: list[float] = field(default_factory=list)
    _in_vain: int = 0

    def __post_init__(self) -> None:
        # neighbours often share a physical core, so the next one to try is any one
        self._order = sorted(self.allowed)
        random.Random(self.seed).shuffle(self._order)

    def observe(self, milliseconds: float) -> bool:
        """One piece of work took so long; True when the thread has moved because of it."""
        self._window.append(milliseconds)
        if len(self._window) < WINDOW_SAMPLES or sum(self._window) < WINDOW_MS:
            return False
        typical = median(self._window)
        self._window.clear()
        self.seen[self._cpu] = typical
        self.best_ms = typical if self.best_ms is None else min(typical, self.best_ms)
        if len(self.seen) < min(EXPLORED, len(self._order)):
            return self._move()
        if typical <= SLOWER * self.best_ms:
            self._in_vain = 0
            return False
        self._in_vain += 1
        if self._in_vain % len(self._order) == 0:
            self.best_ms *= FORGET
        return self._move()

    def _move(self) -> bool:
        """To the CPU that was as fast as the best when it was left, else to one not tried, else to the fastest."""
        others = [cpu for cpu in self._order if cpu != self._cpu]
        if not others:
            return False
        fresh = [cpu for cpu in others if cpu not in self.seen]
        known = min((cpu for cpu in others if cpu in self.seen), key=self.seen.__getitem__, default=None)
        exploring = len(self.seen) < min(EXPLORED, len(self._order))
        good = known is not None and self.best_ms is not None and self.seen[known] <= SLOWER * self.best_ms
        if known is None or (fresh and (exploring or not good)):
            known = fresh[0]
        self.seen.pop(known, None)  # what it was then is not what it is now
        self._cpu = known
        self.moves += 1
        self.move_to(known)
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"moves": self.moves, "best_ms": self.best_ms, "cpus": len(self._order)}
