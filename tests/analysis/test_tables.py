"""What the two tables say, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis import comparison_table, render, tradeoff_table
from tasks.row import CORE

Loaded = Callable[..., pd.DataFrame]


def test_comparison_has_a_line_per_cell_with_the_baseline_first(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(hardware=("h200", "cpu"), speed={"bf16": 1.5}, energy_j_per_unit=0.5)
    frame = comparison_table(loaded(rows[::-1])).frame
    assert len(frame) == 8
    for _, group in frame.groupby("hardware"):
        assert group["optimization"].iloc[0] == "baseline" and group["is_baseline"].sum() == 1
    fast = frame[(frame["optimization"] == "bf16") & (frame["hardware"] == "h200")].iloc[0]
    assert fast["speedup"] == pytest.approx(1.5, rel=0.02) and fast["verdict"] == "faster"
    assert fast["speedup_lo"] < fast["speedup"] < fast["speedup_hi"]
    assert frame.set_index("hardware")["memory_bytes"].groupby(level=0).first().to_dict() == {
        "cpu": 900 * 2**20,
        "h200": 300 * 2**20,
    }


@pytest.mark.parametrize("outcome", ["oom", "unsupported", "invalid", "unplaced", "timeout"])
def test_a_cell_without_numbers_says_why(build: SimpleNamespace, loaded: Loaded, outcome: str) -> None:
    rows = [*build.sweep(stacks=("baseline",)), build.row(build.cell("nf4"), 0, outcome=outcome)]
    table = comparison_table(loaded(rows))
    line = table.frame[table.frame["optimization"] == "nf4"].iloc[0]
    assert line["outcome"] == outcome and pd.isna(line["latency_ms_p50"]) and pd.isna(line["memory_bytes"])
    assert line["notes"] == [f"{outcome}: it ended in {outcome}"]
    assert f" {outcome}\n" in render(table)


def test_invalid_rows_show_the_word_and_never_their_numbers(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(stacks=("baseline", "nf4"), speed={"nf4": 40.0})
    rows = [
        row | {"outcome": "invalid", "reason": "above the ceiling"} if row["optimization"] == "nf4" else row
        for row in rows
    ]
    table = comparison_table(loaded(rows))
    line = table.frame[table.frame["optimization"] == "nf4"].iloc[0]
    assert pd.isna(line["speedup"]) and pd.isna(line["throughput_per_s"])
    assert "40.0x" not in render(table) and "invalid: above the ceiling" in render(table)


def test_rows_with_only_the_core_columns(build: SimpleNamespace, loaded: Loaded) -> None:
    names = {column.name for column in CORE}
    rows = [{name: value for name, value in row.items() if name in names} for row in build.sweep()]
    frame = loaded(rows)
    for table in (comparison_table(frame), tradeoff_table(frame)):
        assert len(table.frame) == 4
        assert render(table)


def test_tradeoff_is_against_each_hardwares_own_baseline(build: SimpleNamespace, loaded: Loaded) -> None:
    quick = build.sweep(hardware=("h200",), speed={"bf16": 2.0, "nf4": 0.5}, kl_divergence=0.01)
    slow = build.sweep(hardware=("cpu",), speed={"bf16": 0.8}, kl_divergence=0.01)
    for row in slow:
        row |= {"latency_ms_p50": row["latency_ms_p50"] * 50, "throughput_per_s": row["throughput_per_s"] / 50}
    table = tradeoff_table(loaded(quick + slow))
    frame = table.frame.set_index("optimization")
    assert frame.loc["bf16", "h200.ratio"] == pytest.approx(2.0, rel=0.02)
    assert frame.loc["bf16", "cpu.ratio"] == pytest.approx(0.8, rel=0.02)
    assert frame.loc["bf16", ["h200.verdict", "cpu.verdict"]].tolist() == ["faster", "slower"]
    text = render(table)
    assert "-- h200 --" in text and "-- cpu --" in text
    line = next(line for line in text.splitlines() if line.startswith("bf16 "))
    assert "x +" in line and "x -" in line
    assert [field.group for field in table.fields if field.header == "KL"] == ["h200", "cpu"]


def test_decoding_is_compared_by_whole_requests(build: SimpleNamespace, loaded: Loaded) -> None:
    """Work that is hidden behind the next step shows in requests that run through, not while each token is awaited."""
    rows = build.sweep(stacks=("baseline", "bf16"))
    for row in rows:
        row |= {"throughput_per_s": 512e3 / row["latency_ms_p50"] * (1.25 if row["optimization"] == "bf16" else 1.0)}
    lines = {}
    for kind in ("prefill", "decode"):
        table = comparison_table(loaded([row | {"workload": kind} for row in rows]))
        assert any("whole requests" in text for text in table.footnotes) == (kind == "decode")
        lines[kind] = table.frame.iloc[1]
    assert lines["prefill"]["verdict"] == "indistinguishable"
    assert lines["prefill"]["speedup"] == pytest.approx(1.0, rel=0.02)
    assert lines["decode"]["verdict"] == "faster"
    assert lines["decode"]["speedup"] == pytest.approx(1.25, rel=0.02)
    assert lines["decode"]["speedup_lo"] < 1.25 < lines["decode"]["speedup_hi"]


def test_simulated_hardware_says_so_and_is_not_ranked(build: SimpleNamespace, loaded: Loaded) -> None:
    table = tradeoff_table(loaded(build.sweep(speed={"bf16": 2.0}, hardware_simulated=True)))
    assert {field.group for field in table.fields} == {"", "h200 (simulated)"}
    assert table.frame["h200 (simulated).verdict"].isna().all()
    assert "2.0" in render(table) and "x ?" in render(table) and "x +" not in render(table)


def test_one_tag_on_two_machines_makes_two_columns(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = pd.concat([loaded(build.sweep(seed=i), f"machine-{i}") for i in range(2)], ignore_index=True)
    groups = {field.group for field in tradeoff_table(frame).fields}
    assert groups == {"", "h200 (machine-0)", "h200 (machine-1)"}
    assert len(comparison_table(frame).frame) == 8


def test_a_partly_failed_cell_keeps_its_numbers_and_says_so(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(stacks=("baseline", "bf16"))
    rows[-1] = build.row(build.cell("bf16"), 4, outcome="timeout")
    line = comparison_table(loaded(rows)).frame.iloc[1]
    assert line["latency_ms_p50"] > 0 and pd.isna(line["verdict"])
    assert line["notes"][0] == "timeout in 1 of 5 rounds: it ended in timeout"


def test_rows_as_wide_as_real_ones_raise_no_warning(build: SimpleNamespace, loaded: Loaded) -> None:
    kinds = (float, int, str, bool, lambda number: [str(number)])
    extra = {f"metric_{number}": kinds[number % 5](number) for number in range(600)}
    frame = loaded(build.sweep(hardware=("h200", "cpu"), **extra))
    assert len(comparison_table(frame).frame) == 8
    assert len(tradeoff_table(frame).frame) == 4
