"""Pairs inside blocks, and one line per cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis import cells, load, load_samples, pairs

Loaded = Callable[..., pd.DataFrame]


def test_every_row_is_paired_with_its_own_baseline(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(rounds=3, hardware=("h200", "cpu"), noise=0.1)
    paired = pairs(loaded(rows))
    assert len(paired) == 2 * 3 * 3
    truth = {(row["cell_id"], row["round"]): row["latency_ms_p50"] for row in rows}
    for row in paired.itertuples():
        assert row.value == truth[row.cell_id, row.round]
        assert row.baseline_value == truth[row.baseline_id, row.round]
        assert row.log_ratio == pytest.approx(np.log(row.value / row.baseline_value))


def test_a_missing_metric_makes_no_pairs(build: SimpleNamespace, loaded: Loaded) -> None:
    assert pairs(loaded(build.sweep()), "energy_j_per_unit").empty
    zero = loaded(build.sweep(energy_j_per_unit=0.0), "zero")
    assert pairs(zero, "energy_j_per_unit").empty


def test_medians_and_intervals_over_rounds(build: SimpleNamespace, loaded: Loaded) -> None:
    cell = build.cell()
    line = cells(loaded([build.row(cell, i, value) for i, value in enumerate((10.0, 11.0, 30.0))])).iloc[0]
    assert line["latency_ms_p50"] == 11.0 and line["rounds"] == line["rounds_ok"] == 3
    assert line["latency_ms_p50_lo"] < 10 and line["latency_ms_p50_hi"] > 30
    assert line["latency_ms_p50_lo"] * line["latency_ms_p50_hi"] == pytest.approx((10 * 11 * 30) ** (2 / 3))


def test_the_most_severe_outcome_stands_with_its_reason(build: SimpleNamespace, loaded: Loaded) -> None:
    cell = build.cell()
    rows = [build.row(cell, 0), build.row(cell, 1, outcome="oom"), build.row(cell, 2, outcome="timeout")]
    line = cells(loaded(rows)).iloc[0]
    assert line["outcome"] == "timeout" and line["reason"] == "it ended in timeout"
    assert line["outcomes"] == {"ok": 1, "oom": 1, "timeout": 1}
    assert line["latency_ms_p50"] == 10.0 and line["rounds_ok"] == 1


def test_a_failure_that_was_measured_again_is_no_failure(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    rows = [build.row(cell, i, outcome="timeout" if i == 1 else "ok") for i in range(4)]
    build.plan(tmp_path, [cell], rounds=3)
    line = cells(load(build.parts(tmp_path, rows))).iloc[0]
    assert line["outcome"] == "ok" and pd.isna(line["reason"])


def test_flags_are_counted(build: SimpleNamespace, loaded: Loaded) -> None:
    cell = build.cell()
    rows = [build.row(cell, i, flags=["drift", "x"] if i == 0 else ["drift"]) for i in range(3)]
    assert cells(loaded(rows)).iloc[0]["flags"] == {"drift": 3, "x": 1}


def test_percentiles_are_pooled_over_rounds(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    rng = np.random.default_rng(0)
    values = rng.normal(10, 1, (5, 60))
    build.parts(tmp_path, [build.row(cell, i) for i in range(5)])
    build.samples(tmp_path, cell, 5, lambda round_: values[round_])
    line = cells(load(tmp_path), load_samples(tmp_path)).iloc[0]
    assert line["latency_ms_p95"] == pytest.approx(np.quantile(values, 0.95))  # 60 are too few, 300 are enough
    assert pd.isna(line["latency_ms_p99"])
    few = cells(load(tmp_path)[lambda frame: frame["round"] < 2], load_samples(tmp_path)).iloc[0]
    assert pd.isna(few["latency_ms_p95"])


def test_block_means_have_no_percentiles(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    build.parts(tmp_path, [build.row(cell, 0, sample_kind="block_mean", latency_ms_p95=9.0)])
    build.samples(tmp_path, cell, 1, lambda _: list(np.linspace(9, 11, 500)))
    assert pd.isna(cells(load(tmp_path), load_samples(tmp_path)).iloc[0]["latency_ms_p95"])


def test_order_of_rows_does_not_matter(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(noise=0.05)
    one, other = cells(loaded(rows, "one")), cells(loaded(rows[::-1], "other"))
    columns = ["cell_id", "latency_ms_p50", "latency_ms_p50_lo", "throughput_per_s"]
    one, other = (frame[columns].sort_values("cell_id", ignore_index=True) for frame in (one, other))
    pd.testing.assert_frame_equal(one, other)
