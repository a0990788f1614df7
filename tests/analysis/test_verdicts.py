"""Verdicts of frames: pairs, pools, reasons why there is none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import verdicts
from analysis.pair import BARRING_FLAGS

Loaded = Callable[..., pd.DataFrame]


def of(frame: pd.DataFrame, optimization: str, build: SimpleNamespace, hardware: str = "h200", **more: Any) -> Any:
    table = verdicts(frame, **more)
    return table[table["cell_id"] == build.cell(optimization, hardware).cell_id].iloc[0]


def test_faster_slower_and_indistinguishable(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed={"bf16": 1.5, "nf4": 0.6}))
    fast, slow, same = (of(frame, name, build) for name in ("bf16", "nf4", "bf16+sdpa-flash"))
    assert (fast["verdict"], slow["verdict"], same["verdict"]) == ("faster", "slower", "indistinguishable")
    assert fast["lo"] < 1 / 1.5 < fast["hi"] and fast["ratio"] == pytest.approx(1 / 1.5, rel=0.02)
    assert 0.005 < same["mde"] < 0.06 and fast["rounds"] == 5 and not fast["barred"]
    assert same["p_holm"] > 0.05 > fast["p_holm"]


def test_throughput_judges_the_other_way_round(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed={"bf16": 1.5}))
    fast = of(frame, "bf16", build, metric="throughput_per_s")
    assert fast["verdict"] == "faster" and fast["ratio"] == pytest.approx(1.5, rel=0.02)


def test_the_baseline_is_not_compared_with_itself(build: SimpleNamespace, loaded: Loaded) -> None:
    assert len(verdicts(loaded(build.sweep()))) == 3


def test_one_round_has_a_ratio_but_no_interval(build: SimpleNamespace, loaded: Loaded) -> None:
    line = of(loaded(build.sweep(rounds=1)), "bf16", build)
    assert pd.isna(line["verdict"]) and pd.isna(line["lo"]) and line["ratio"] > 0
    assert line["barred"] == ["1 round: no interval"]


def test_pairs_form_only_inside_a_block(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(stacks=("baseline", "bf16"))
    for row in rows:
        if row["optimization"] == "bf16":
            row["block_id"] += "-elsewhere"
    line = of(loaded(rows), "bf16", build)
    assert line["rounds"] == 0 and pd.isna(line["verdict"])
    assert "no pair" in line["barred"][0]


def test_a_shared_drift_cancels_in_the_block(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(speed={"bf16": 1.1}, noise=0.002)
    for row in rows:
        row["latency_ms_p50"] *= 1 + 0.2 * row["round"]
    line = of(loaded(rows), "bf16", build)
    assert line["verdict"] == "faster" and line["hi"] / line["lo"] < 1.02


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hardware_simulated": True}, "simulated hardware"),
        ({"flags": ["steal"]}, "steal"),
        ({"steady": False}, "not steady"),
    ],
)
def test_what_bars_a_verdict(build: SimpleNamespace, loaded: Loaded, change: dict[str, Any], reason: str) -> None:
    line = of(loaded(build.sweep(speed={"bf16": 2.0}, **change)), "bf16", build)
    assert pd.isna(line["verdict"]) and reason in line["barred"]
    assert line["ratio"] == pytest.approx(0.5, rel=0.02) and pd.notna(line["lo"])


def test_a_single_flagged_round_is_left_out(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(speed={"bf16": 2.0})
    broken = next(row for row in rows if row["optimization"] == "bf16" and row["round"] == 2)
    broken |= {"flags": ["steal"], "latency_ms_p50": 500.0}
    line = of(loaded(rows), "bf16", build)
    assert line["verdict"] == "faster" and line["rounds"] == 4 and line["left_out"] == 1


@pytest.mark.parametrize("outcome", ["oom", "invalid", "timeout", "crashed"])
def test_an_outcome_other_than_ok_bars(build: SimpleNamespace, loaded: Loaded, outcome: str) -> None:
    rows = build.sweep(stacks=("baseline", "bf16"), speed={"bf16": 2.0})
    rows[-1] = build.row(build.cell("bf16"), 4, outcome=outcome)
    line = of(loaded(rows), "bf16", build)
    assert pd.isna(line["verdict"]) and line["barred"] == [f"{outcome} in 1 of 5 rounds"]


def test_an_invalid_row_is_never_paired_although_it_has_numbers(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(stacks=("baseline", "bf16"))
    rows = [row | {"outcome": "invalid"} if row["optimization"] == "bf16" else row for row in rows]
    line = of(loaded(rows), "bf16", build)
    assert line["rounds"] == 0 and line["barred"] == ["invalid"]


def test_without_a_baseline_row_the_reason_is_said(build: SimpleNamespace, loaded: Loaded) -> None:
    assert of(loaded(build.sweep(stacks=("bf16", "nf4"))), "bf16", build)["barred"] == ["the baseline has no row"]


def test_a_floor_raises_the_margin_and_interference_widens(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed={"bf16": 1.05}, noise=0.003))
    assert of(frame, "bf16", build)["verdict"] == "faster"
    assert of(frame, "bf16", build, floor={"h200": 0.06})["verdict"] == "indistinguishable"
    noisy = loaded(build.sweep(speed={"bf16": 1.05}, noise=0.003, flags=["interference"]), "noisy")
    line = of(noisy, "bf16", build, floor=0.02)
    assert np.log(line["hi"] / line["lo"]) / 2 >= np.log(1.02) * 0.999


def test_variance_is_pooled_per_hardware(build: SimpleNamespace, loaded: Loaded) -> None:
    stacks = ("baseline", *(f"bf{i}" for i in range(8)))
    quiet = build.sweep(rounds=3, stacks=stacks, noise=0.002)
    loud = build.sweep(rounds=3, stacks=stacks, noise=0.05, hardware=("cpu",), seed=1)
    table = verdicts(loaded(quiet + loud))
    width = np.log(table["hi"] / table["lo"]) / 2
    cpu = table["cell_id"].isin([build.cell(name, "cpu").cell_id for name in stacks])
    assert width[~cpu].max() < 0.02 and width[cpu].median() > 0.04


def test_identical_numbers_do_not_divide_by_zero(build: SimpleNamespace, loaded: Loaded) -> None:
    table = verdicts(loaded(build.sweep(noise=0.0)))
    assert (table["verdict"] == "indistinguishable").all() and table["equivalent"].all()


def test_nothing_measured(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded([build.row(build.cell(name), 0, outcome="oom") for name in ("baseline", "bf16")])
    line = of(frame, "bf16", build)
    assert pd.isna(line["verdict"]) and line["barred"] == ["oom", "baseline oom"]


def test_every_finding_that_bars_a_run_bars_its_pairs() -> None:
    from tasks.interference import BARRING

    assert BARRING <= BARRING_FLAGS
