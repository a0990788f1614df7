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

from analysis import comparison_table, load, tradeoff_table, verdicts
from analysis.compared import LEGEND_HOST
from analysis.host_clock import clocks
from analysis.inference import at_one_clock
from analysis.pair import pairs

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


def half_widths(frame: pd.DataFrame, metric: str, of: str = "clock_") -> list[float]:
    table = verdicts(frame, metric)
    return list(np.log(table[f"{of}hi"] / table[f"{of}lo"]) / 2)


def used(frame: pd.DataFrame, metric: str = LATENCY) -> list[bool]:
    return list(pairs(frame, metric)["host_clock"])


@pytest.mark.parametrize("metric", [LATENCY, RATE])
def test_its_clock_is_taken_out_of_ratios(build: SimpleNamespace, loaded: Loaded, metric: str) -> None:
    rows = build.sweep(rounds=3, speed={"bf16": 1.1})
    on_a_shared_host(rows)
    frame = loaded(rows)
    blind = frame.drop(columns=["host_loop_ms", "host_loop_throughput_ms"])
    table, without = verdicts(frame, metric), verdicts(blind, metric)
    assert table["clock_ratio"].notna().all() and without["clock_ratio"].isna().all()
    assert max(half_widths(frame, metric)) < 0.05 < 0.1 < min(half_widths(blind, metric, ""))
    found = table[table["cell_id"] == build.cell("bf16").cell_id].iloc[0]
    assert found["clock_ratio"] == pytest.approx(1.1 if metric == RATE else 1 / 1.1, rel=0.03)
    verdict = ["ratio", "lo", "hi", "p_holm", "verdict", "mde"]
    assert table[verdict].equals(without[verdict]), "no verdict rests on it"


@pytest.mark.parametrize("bound", [("baseline",), ("bf16", "nf4", "bf16+sdpa-flash")])
def test_one_side_that_waits_for_the_device(build: SimpleNamespace, loaded: Loaded, bound: tuple[str, ...]) -> None:
    """Only the other one is brought to the median clock, and so the ratio no longer follows the host."""
    stacks = {"baseline", "bf16", "nf4", "bf16+sdpa-flash"}
    rows = build.sweep(rounds=5, speed={"bf16": 3.0})
    on_a_shared_host(rows, moves=0.2, device_bound=tuple(stacks - set(bound)))
    frame = loaded(rows)
    assert ((clocks(frame, LATENCY) != 0) <= frame["optimization"].isin(bound)).all()
    assert all(used(frame))
    assert max(half_widths(frame, LATENCY)) < 0.03
    assert min(half_widths(frame.drop(columns="host_loop_ms"), LATENCY, "")) > 0.04


def test_cells_are_host_bound_in_all_rounds_or_in_none(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(rounds=5, stacks=("baseline", "bf16"))
    on_a_shared_host(rows)
    for row in rows:
        row["flags"] = ["launch_bound"] if row["round"] < (3 if row["optimization"] == "bf16" else 2) else []
    frame = loaded(rows)
    assert ((clocks(frame, LATENCY) != 0) <= (frame["optimization"] == "bf16")).all()


def test_a_clock_that_a_block_shares_is_left_alone(build: SimpleNamespace, loaded: Loaded) -> None:
    """The pairs do not hold it, and would only take the noise with which it is known."""
    rows = build.sweep(noise=0.003)
    rng = np.random.default_rng(3)
    clock = np.exp(0.1 * rng.standard_normal(5))
    for row in rows:
        row["flags"], row["hostname"] = ["launch_bound"], "shared"
        row["host_loop_ms"] = 0.2 * float(clock[row["round"]] * np.exp(0.01 * rng.standard_normal()))
        row[LATENCY] *= float(clock[row["round"]])
    assert not any(used(loaded(rows)))


def test_a_clock_that_nothing_follows_is_left_alone(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(noise=0.02)
    on_a_shared_host(rows, device_bound=("baseline", "bf16", "bf16+sdpa-flash", "nf4"))
    for row in rows:
        row["flags"] = ["launch_bound"]
    frame = loaded(rows)
    assert not any(used(frame))
    assert verdicts(frame).equals(verdicts(frame.drop(columns="host_loop_ms")))


def test_the_one_that_does_not_follow_is_left_alone(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(rounds=10, noise=0.003)
    on_a_shared_host(rows, device_bound=("nf4", "baseline"))
    for row in rows:
        row["flags"] = ["launch_bound"] if row["optimization"] != "baseline" else []
    table = verdicts(loaded(rows))
    alone = table["cell_id"] == build.cell("nf4").cell_id
    assert table["clock_ratio"].notna().tolist() == (~alone).tolist()


def test_a_pair_that_may_not_decide_does_not_choose(build: SimpleNamespace, loaded: Loaded) -> None:
    """A foreign process slows one run of three: the others are brought to one clock as they were."""
    rows = build.sweep(rounds=5)
    on_a_shared_host(rows)
    slowed = next(row for row in rows if row["optimization"] == "nf4")
    slowed[LATENCY] *= 1.6
    assert not any(used(loaded(rows, "unseen"))), "it spoils the variance"
    slowed["flags"] = [*slowed["flags"], "foreign_gpu_process"]
    assert all(used(loaded(rows, "flagged")))


def test_a_loop_that_is_slow_beside_one_stack_decides_nothing(build: SimpleNamespace, loaded: Loaded) -> None:
    """The same time beside a loop that is always 4 % slower: at one clock that looks like a difference."""
    rows = build.sweep(rounds=5)
    on_a_shared_host(rows, moves=0.05)
    for row in rows:
        row["host_loop_ms"] *= 1.04 if row["optimization"] == "bf16" else 1.0
    table = verdicts(loaded(rows))
    found = table[table["cell_id"] == build.cell("bf16").cell_id].iloc[0]
    assert found["clock_hi"] < 0.99
    assert found["verdict"] == "indistinguishable"


def test_every_host_has_its_own_clock(build: SimpleNamespace, loaded: Loaded) -> None:
    """Two folders, on a fast and a slow host: nothing is brought from one to the other, also in joined folders."""
    frames = []
    for name, pace in (("slow", 2.0), ("fast", 1.0)):
        rows = build.sweep(rounds=4)
        on_a_shared_host(rows)
        for row in rows:
            row["hostname"], row["host_loop_ms"] = name, row["host_loop_ms"] * pace
        frames.append(loaded(rows, name))
    for joined in (load(sorted({folder for frame in frames for folder in frame["result_dir"]})), pd.concat(frames)):
        assert abs(clocks(joined, LATENCY)).max() < 0.5
        assert all(used(joined))
    one = loaded(build.sweep(rounds=4), "one")  # both hosts in one folder, a block on each
    one["hostname"] = ["slow" if number % 2 else "fast" for number in one["round"]]
    one["host_loop_ms"] = [0.4 if number % 2 else 0.2 for number in one["round"]]
    one["flags"] = [["launch_bound"]] * len(one)
    assert (clocks(one, LATENCY) == 0).all()


def test_without_the_loop_nothing_changes(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(hardware=("cpu",), flags=["launch_bound"]))
    assert not any(used(frame)) and not any(used(frame[:0]))
    frame["flags"] = [np.array(["launch_bound", "clock_drift"])] * len(frame)
    assert not any(used(frame))


def test_two_comparisons_of_three_rounds_are_too_few_to_know(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(rounds=3, stacks=("baseline", "bf16", "nf4"))
    on_a_shared_host(rows)
    assert not any(used(loaded(rows)))


def test_rates_have_the_loop_of_their_own_pass(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep()
    on_a_shared_host(rows)
    for row in rows:
        row["host_loop_ms"] = 0.2
    frame = loaded(rows)
    assert all(used(frame, RATE)) and not any(used(frame, LATENCY))
    older = frame.assign(host_loop_ms=frame["host_loop_throughput_ms"], host_loop_throughput_ms=float("nan"))
    assert all(used(older, RATE))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_tables_say_so(build: SimpleNamespace, loaded: Loaded, kind: str) -> None:
    """Speed-ups of decoding are of the throughput pass, those of anything else of the latency pass."""
    rows = build.sweep()
    for row in rows:
        row["workload"] = kind
    quiet = loaded(rows, "quiet")
    on_a_shared_host(rows)
    for row in rows:
        row["host_loop_ms" if kind == "decode" else "host_loop_throughput_ms"] = 0.2
    table = comparison_table(loaded(rows))
    assert LEGEND_HOST in table.remarks()
    assert sum(any("at one host clock 1.0" in note for note in notes) for notes in table.frame["notes"]) == 3
    assert (LEGEND_HOST in tradeoff_table(loaded(rows)).remarks()) == (kind == "decode")
    for make in (comparison_table, tradeoff_table):
        assert LEGEND_HOST not in make(quiet).remarks()


@given(
    logs=st.lists(st.floats(-1, 1), min_size=12, max_size=12),
    clocks=st.lists(st.floats(-1, 1), min_size=12, max_size=12),
)
def test_at_one_clock(logs: list[float], clocks: list[float]) -> None:
    raw, comparisons = np.array(logs), np.repeat([0, 1, 2], 4)
    brought = raw - np.array(clocks)
    found, chosen = at_one_clock(raw, brought, comparisons)

    def within(values: Any) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in values.reshape(3, 4)))

    assert (found == np.where(chosen, brought, raw)).all()
    assert all(len(set(part)) == 1 for part in chosen.reshape(3, 4).tolist()), "a comparison is one or the other"
    if chosen.any():
        assert within(brought) <= 0.5 * within(raw)
    many, both = at_one_clock(np.stack([raw, raw]), np.stack([brought, raw]), comparisons)
    assert (both[0] == chosen).all() and (many[0] == found).all() and (many[1] == raw).all()
