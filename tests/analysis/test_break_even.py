"""After how many calls compilation pays: the arithmetic, the partner, and null where it never does."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import comparison_table, render
from analysis.break_even import break_even_calls, uncompiled, with_break_even
from analysis.compared import with_compared_time

Loaded = Callable[..., pd.DataFrame]


def test_seconds_over_saving() -> None:
    assert break_even_calls(30.0, 12.0, 2.0) == pytest.approx(3000)
    assert break_even_calls(0.0, 12.0, 2.0) == 0


@pytest.mark.parametrize(
    ("compile_s", "partner_ms", "compiled_ms"),
    [(30.0, 2.0, 2.0), (30.0, 2.0, 3.0), (30.0, math.nan, 2.0), (math.nan, 3.0, 2.0), (30.0, 3.0, math.nan)],
)
def test_never_is_null(compile_s: float, partner_ms: float, compiled_ms: float) -> None:
    assert break_even_calls(compile_s, partner_ms, compiled_ms) is None


@pytest.mark.parametrize(
    ("stack", "partner"),
    [
        ("compile", "baseline"),
        ("bf16+static-cache+compile:mode=max-autotune,coordinate_descent=true", "bf16+static-cache"),
        ("bf16+compile+again", "bf16+again"),
        ("bf16", None),
        ("baseline", None),
    ],
)
def test_partner(stack: str, partner: str | None) -> None:
    assert uncompiled(stack) == partner


def rows(build: SimpleNamespace, seconds: list[float], compiled_ms: float = 4.0) -> list[dict[str, Any]]:
    """An eager bf16 of 10 ms, and a compiled one whose later rounds find the first one's compiler cache."""
    eager = [build.row(build.cell("bf16"), n, 10.0, graphs_compiled=0, compile_s=0.0) for n in range(len(seconds))]
    cell = build.cell("bf16+compile")
    return eager + [
        build.row(cell, n, compiled_ms, graphs_compiled=1, compile_s=s, graph_breaks=0, recompilations=1)
        | {"compile_cache": "warm" if n else "cold"}
        for n, s in enumerate(seconds)
    ]


def test_table_uses_the_cold_compilation(build: SimpleNamespace, loaded: Loaded) -> None:
    table = comparison_table(loaded(rows(build, [30.0, 3.0, 3.0])))
    lines = table.frame.set_index("optimization")
    assert lines.loc["bf16+compile", "break_even_calls"] == pytest.approx(5000)
    assert lines.loc["bf16+compile", "cold_compile_s"] == 30.0
    assert math.isnan(lines.loc["bf16", "cold_compile_s"]), "zero seconds of an eager stack are no measurement"
    shown = render(table)
    assert "break-even" in shown
    assert "5,000" in shown
    assert "1 recompilation before measuring" in lines.loc["bf16+compile", "notes"]


@pytest.mark.parametrize("first", ["failed", "warm", "unknown"])
def test_warm_seconds_are_never_taken_for_cold_ones(build: SimpleNamespace, loaded: Loaded, first: str) -> None:
    """A failed first round leaves its cache behind: what later rounds take says nothing of a first user's wait."""
    given = rows(build, [30.0, 3.0, 3.0])
    cold = next(row for row in given if row.get("compile_cache") == "cold")
    cold |= {"outcome": "timeout", "reason": "slow"} if first == "failed" else {}
    cold |= {"warm": {"compile_cache": "warm"}, "unknown": {"compile_cache": None}}.get(first, {})
    table = comparison_table(loaded(given))
    line = table.frame.set_index("optimization").loc["bf16+compile"]
    assert math.isnan(line["cold_compile_s"]) and math.isnan(line["break_even_calls"])
    assert any("no measured round began with an empty compiler cache" in note for note in line["notes"])
    assert line["latency_ms_p50"] == 4.0
    eager = table.frame.set_index("optimization").loc["bf16"]
    assert not any("compiler cache" in note for note in eager["notes"])


def test_a_second_cold_round_counts(build: SimpleNamespace, loaded: Loaded) -> None:
    given = rows(build, [30.0, 3.0, 24.0])
    given[3]["outcome"], given[5]["compile_cache"] = "error", "cold"
    line = comparison_table(loaded(given)).frame.set_index("optimization").loc["bf16+compile"]
    assert line["cold_compile_s"] == 24.0 and line["break_even_calls"] == pytest.approx(4000)


def test_decoding_counts_steps_by_the_time_that_the_speed_up_compares(build: SimpleNamespace, loaded: Loaded) -> None:
    """A step that is waited for takes 10 against 4 ms, in requests that run through it takes 8 against 6."""
    given = rows(build, [30.0, 3.0, 3.0])
    for row in given:
        step_ms = 6.0 if row["optimization"] == "bf16+compile" else 8.0
        row |= {"workload": "decode", "batch_size": 32, "throughput_per_s": 32 / (step_ms / 1e3)}
    given += [row | {"optimization": "baseline", "cell_id": row["baseline_id"]} for row in given[:3]]
    table = comparison_table(loaded(given))
    line = table.frame.set_index("optimization").loc["bf16+compile"]
    assert line["speedup"] == pytest.approx(8 / 6)
    assert line["call_ms"] == pytest.approx(6.0)
    assert line["break_even_calls"] == pytest.approx(30 / 0.002)
    assert any("a step of the batch, one token for each of its sequences" in text for text in table.remarks())


def test_no_saving_is_empty(build: SimpleNamespace, loaded: Loaded) -> None:
    lines = comparison_table(loaded(rows(build, [30.0], compiled_ms=11.0))).frame.set_index("optimization")
    assert math.isnan(lines.loc["bf16+compile", "break_even_calls"])


@pytest.mark.parametrize(("against_baseline", "partner", "won"), [(0.5, 0.6, True), (0.6, 0.5, False)])
def test_nothing_is_won_back_where_the_ratios_say_so(
    build: SimpleNamespace, loaded: Loaded, against_baseline: float, partner: float, won: bool
) -> None:
    """Ratios are at one clock of the host, medians are not: the table must not say both."""
    frame = loaded(rows(build, [30.0, 3.0, 3.0]))
    table = comparison_table(frame).frame
    table["ratio"] = table["optimization"].map({"bf16+compile": against_baseline, "bf16": partner})
    found = with_break_even(table, frame).set_index("optimization")
    assert math.isfinite(found.loc["bf16+compile", "break_even_calls"]) == won


def test_without_the_partner_there_is_none(build: SimpleNamespace, loaded: Loaded) -> None:
    compiled = [row for row in rows(build, [30.0]) if row["optimization"] == "bf16+compile"]
    other = [build.row(build.cell("baseline"), 0, 20.0)]
    lines = comparison_table(loaded(other + compiled)).frame.set_index("optimization")
    assert math.isnan(lines.loc["bf16+compile", "break_even_calls"])


def test_tables_without_compilation_do_not_speak_of_it(build: SimpleNamespace, loaded: Loaded) -> None:
    assert "break-even" not in render(comparison_table(loaded(build.sweep())))


def test_a_step_of_ragged_sequences_is_a_requests_time_over_its_steps(build: SimpleNamespace, loaded: Loaded) -> None:
    """The rate counts the tokens that the sequences need: by it a step of half-empty batches would look too long."""
    rows = build.sweep(stacks=("fp32",), rounds=1)
    for row in rows:
        row |= {"workload": "decode", "decode_steps": 31, "request_ms_mean": 175.0, "time_to_first_token_ms": 20.0}
        row |= {"batch_size": 4, "throughput_per_s": 400.0}
    steady = with_compared_time(loaded(rows, "steady"))
    for row in rows:
        row["workload_point"] = "decode[batch_size=4,new_tokens=32,prompt_tokens=16,stop=eos]"
    ragged = with_compared_time(loaded(rows, "ragged"))
    assert ragged["call_ms"].tolist() == pytest.approx([5.0] * len(rows))
    assert steady["call_ms"].tolist() == pytest.approx([10.0] * len(rows))
