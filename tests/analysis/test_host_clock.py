"""Ratios of steps that waited for a host whose clock moved."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import comparison_table, tradeoff_table, verdicts
from analysis.host_clock import with_one_host_clock
from analysis.inference import at_one_clock
from analysis.tables import LEGEND_HOST

Loaded = Callable[..., pd.DataFrame]
LATENCY, RATE = "latency_ms_p50", "throughput_per_s"


def on_a_shared_host(rows: list[dict[str, Any]], moves: float = 0.1, device_bound: tuple[str, ...] = ()) -> None:
    """Every run at a clock of its own; what is launched from there follows it, and the loop beside it says so."""
    rng = np.random.default_rng(7)
    for row in rows:
        clock = float(np.exp(moves * rng.standard_normal()))
        row["hostname"], row["host_loop_ms"] = "shared", 0.2 * clock * float(np.exp(0.003 * rng.standard_normal()))
        row["host_loop_throughput_ms"] = row["host_loop_ms"]
        if row["optimization"] not in device_bound:
            row["flags"] = ["launch_bound"]
            row[LATENCY] *= clock
            row[RATE] /= clock


def half_widths(frame: pd.DataFrame, metric: str) -> list[float]:
    table = verdicts(frame, metric)
    return list(np.log(table["hi"] / table["lo"]) / 2)


@pytest.mark.parametrize("metric", [LATENCY, RATE])
def test_its_clock_is_taken_out_of_ratios(build: SimpleNamespace, loaded: Loaded, metric: str) -> None:
    rows = build.sweep(rounds=3, speed={"bf16": 1.1})
    on_a_shared_host(rows)
    frame = loaded(rows)
    blind = frame.drop(columns=["host_loop_ms", "host_loop_throughput_ms"])
    table = verdicts(frame, metric)
    assert table["host_clock"].all() and not verdicts(blind, metric)["host_clock"].any()
    assert max(half_widths(frame, metric)) < 0.05 < 0.1 < min(half_widths(blind, metric))
    found = table[table["cell_id"] == build.cell("bf16").cell_id].iloc[0]
    assert found["ratio"] == pytest.approx(1.1 if metric == RATE else 1 / 1.1, rel=0.03)
    assert found["verdict"] == "faster"


def test_what_waits_for_the_device_stays(build: SimpleNamespace, loaded: Loaded) -> None:
    """Only the baseline is brought to the median clock, and so the ratio no longer follows the host."""
    rows = build.sweep(rounds=5, stacks=("baseline", "bf16"), speed={"bf16": 3.0})
    on_a_shared_host(rows, device_bound=("bf16",))
    frame = loaded(rows)
    brought = with_one_host_clock(frame, LATENCY)
    bound = frame["optimization"] == "baseline"
    assert brought["host_clock"].tolist() == bound.tolist()
    assert brought.loc[~bound, LATENCY].equals(frame.loc[~bound, LATENCY])
    assert brought.loc[bound, LATENCY].std() < 0.3 * frame.loc[bound, LATENCY].std()
    assert verdicts(frame).iloc[0]["host_clock"]


def test_a_clock_that_nothing_follows_is_left_alone(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(noise=0.02)
    on_a_shared_host(rows, device_bound=("baseline", "bf16", "bf16+sdpa-flash", "nf4"))
    for row in rows:
        row["flags"] = ["launch_bound"]
    frame = loaded(rows)
    brought = with_one_host_clock(frame, LATENCY)
    assert not brought["host_clock"].any()
    assert brought[LATENCY].equals(frame[LATENCY])


def test_without_the_loop_nothing_changes(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(hardware=("cpu",), flags=["launch_bound"]))
    assert not with_one_host_clock(frame, LATENCY)["host_clock"].any()
    assert not with_one_host_clock(frame[:0], LATENCY)["host_clock"].any()


def test_two_rounds_of_two_are_too_few_to_know(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(rounds=2, stacks=("baseline", "bf16"))
    on_a_shared_host(rows)
    assert not with_one_host_clock(loaded(rows), LATENCY)["host_clock"].any()


def test_rates_have_the_loop_of_their_own_pass(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep()
    on_a_shared_host(rows)
    for row in rows:
        row["host_loop_ms"] = 0.2
    frame = loaded(rows)
    assert with_one_host_clock(frame, RATE)["host_clock"].all()
    assert not with_one_host_clock(frame, LATENCY)["host_clock"].any()
    older = frame.assign(host_loop_ms=frame["host_loop_throughput_ms"], host_loop_throughput_ms=float("nan"))
    assert with_one_host_clock(older, RATE)["host_clock"].all()


def test_tables_say_so(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep()
    quiet = loaded(rows, "quiet")
    on_a_shared_host(rows)
    for make in (comparison_table, tradeoff_table):
        assert LEGEND_HOST in make(loaded(rows)).footnotes
        assert LEGEND_HOST not in make(quiet).footnotes


@given(
    logs=st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    clocks=st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    shift=st.floats(-3, 3),
)
def test_at_one_clock(logs: list[float], clocks: list[float], shift: float) -> None:
    times, known, cells = np.array(logs), np.array(clocks), np.repeat([0, 1, 2], 4)
    brought, used = at_one_clock(times, known, cells)

    def within(values: Any) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in values.reshape(3, 4)))

    assert within(brought) <= within(times)
    if used:
        assert brought == pytest.approx(times - known + np.median(known))
    else:
        assert (brought == times).all()
    if abs(within(times - known) - 0.5 * within(times)) > 1e-9:  # no tie that rounding decides
        moved, as_before = at_one_clock(times, known + shift, cells)
        assert as_before == used
        assert moved == pytest.approx(brought)
    many, both = at_one_clock(np.stack([times, times]), np.stack([known, 0 * known]), cells)
    assert both[0] == used and many[0] == pytest.approx(brought) and (many[1] == times).all()
