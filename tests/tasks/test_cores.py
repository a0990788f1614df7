from __future__ import annotations

import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cores import evenly, fastest, stay_on_fast_cores

SECONDS = st.dictionaries(st.integers(0, 500), st.floats(1e-4, 1.0), min_size=2, max_size=64)


@given(SECONDS)
def test_the_fastest_is_chosen_and_nothing_slower_than_what_is_left_out(seconds: dict[int, float]) -> None:
    chosen = fastest(seconds)
    assert min(seconds, key=lambda cpu: seconds[cpu]) in chosen or min(seconds.values()) in map(seconds.get, chosen)
    assert len(chosen) >= 2
    rest = set(seconds) - set(chosen)
    assert all(seconds[cpu] >= max(seconds[one] for one in chosen) for cpu in rest)


def test_a_slow_one_is_left_out() -> None:
    assert fastest({0: 1.8e-3, 1: 1.00e-3, 2: 1.01e-3, 3: 1.5e-3}) == [1, 2]


@given(st.integers(1, 200), st.integers(1, 40))
def test_spread_evenly(length: int, count: int) -> None:
    picked = evenly(range(length), count)
    assert len(picked) == min(length, count)
    assert picked == sorted(set(picked))
    assert picked[0] == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU leaves no choice")
def test_only_the_launching_threads_are_bound() -> None:
    before = os.sched_getaffinity(0)
    slow = max(before)

    def canary(_: int) -> float:
        return 2e-3 if os.sched_getaffinity(0) == {slow} else 1e-3

    seen: list[set[int]] = []
    stop = threading.Event()
    other = threading.Thread(target=lambda: (stop.wait(), seen.append(os.sched_getaffinity(0))))
    other.start()
    try:
        choice = stay_on_fast_cores(canary)
        assert choice is not None
        assert choice.cpus == tuple(sorted(os.sched_getaffinity(0)))
        assert choice.slowest_ms == pytest.approx(2.0)
        assert choice.canary_ms == pytest.approx(1.0)
        if len(before) > 2:
            assert slow not in choice.cpus
    finally:
        os.sched_setaffinity(0, before)
        stop.set()
        other.join()
    assert seen == [before]
