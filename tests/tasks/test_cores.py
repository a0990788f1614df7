from __future__ import annotations

import itertools
import os
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cores import SLOWER, FastCore, bind
from tasks.statistics import median


class Host:
    """CPUs that are slow now and then: state per CPU, changing at random times; time is what the work takes."""

    def __init__(self, cpus: int, slow_share: float, factor: float, seed: int, call_ms: float = 10.0) -> None:
        self.random = random.Random(seed)
        self.slow_share, self.factor, self.call_ms = slow_share, factor, call_ms
        self.at, self.now = 0, 0.0
        self.until = [0.0] * cpus
        self.slow = [False] * cpus

    def call(self) -> float:
        if self.now >= self.until[self.at]:
            self.slow[self.at] = self.random.random() < self.slow_share
            self.until[self.at] = self.now + self.random.uniform(100, 3000)
        taken = self.call_ms * self.random.gauss(1, 0.01) * (self.factor if self.slow[self.at] else 1)
        self.now += taken
        return taken

    def move(self, cpu: int) -> None:
        self.at = cpu


@pytest.mark.parametrize("factor", [1.3, 1.8])
def test_medians_of_processes_agree_where_staying_put_differs(factor: float) -> None:
    """One second of calls after half a second of warm-up, 40 processes, every third CPU slow at any time."""

    def process(seed: int, watched: bool) -> float:
        host = Host(16, 0.33, factor, seed)
        core = FastCore(allowed=range(16), move_to=host.move, seed=seed)
        samples: list[float] = []
        while host.now < 1500:
            taken = host.call()
            if watched:
                core.observe(taken)
            if host.now > 500:
                samples.append(taken)
        return median(samples)

    watched = [process(seed, True) for seed in range(40)]
    unwatched = [process(seed, False) for seed in range(40)]
    assert max(watched) / min(watched) < 1.03
    assert max(unwatched) / min(unwatched) > 1.2


def test_a_call_that_really_became_slower_is_not_chased_for_ever() -> None:
    core = FastCore(allowed=range(8), move_to=lambda cpu: None)
    for _ in range(30):
        core.observe(10.0)
    moves = []
    for number in range(4000):
        if core.observe(13.0):
            moves.append(number)
    assert moves
    assert max(moves) < 3000
    assert core.best_ms is not None
    assert core.best_ms * SLOWER >= 13.0


@given(st.lists(st.floats(0.01, 1e3), max_size=300), st.integers(1, 8))
def test_moves_only_among_allowed(times: list[float], cpus: int) -> None:
    visited: list[int] = []
    core = FastCore(allowed=range(cpus), move_to=visited.append)
    moved = sum(core.observe(each) for each in times)
    assert set(visited) <= set(range(cpus))
    assert len(visited) == core.moves <= moved
    assert all(a != b for a, b in itertools.pairwise(visited))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU leaves no choice")
def test_only_the_launching_thread_is_bound() -> None:
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    stop = threading.Event()
    other = threading.Thread(target=lambda: (stop.wait(), seen.append(os.sched_getaffinity(0))))
    other.start()
    try:
        bind(max(before))
        assert os.sched_getaffinity(0) == {max(before)}
    finally:
        os.sched_setaffinity(0, before)
        stop.set()
        other.join()
    assert seen == [before]
