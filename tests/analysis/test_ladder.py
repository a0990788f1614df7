"""Rungs against the rung before, and what rows say of one that is slower."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import FORMATS, ladder_table, load, render
from analysis.ladder import ladder

Loaded = Callable[..., pd.DataFrame]
RUNGS = ("fp32+no-cache", "fp32", "fp32+static-cache", "fp32+static-cache+compile")
STEP_MS = dict(zip(RUNGS, (40.0, 8.0, 8.0, 2.0), strict=True))
BATCH = 4


def rows(
    build: SimpleNamespace, step_ms: dict[str, float], rounds: int = 5, noise: float = 0.01
) -> list[dict[str, Any]]:
    """A decode ladder, its step's time by the throughput of requests; a latency that would say something else."""
    rng, found = np.random.default_rng(1), []
    for stack, milliseconds in step_ms.items():
        for round_ in range(rounds):
            took = milliseconds * float(np.exp(noise * rng.standard_normal()))
            row = build.row(build.cell(stack), round_, 50.0)
            row |= {"workload": "decode", "batch_size": BATCH, "throughput_per_s": 1e3 * BATCH / took}
            found.append(row | {"peak_reserved_bytes": 2**30, "baseline_id": build.cell("fp32").cell_id})
    return found


def changed(given: list[dict[str, Any]], stack: str, **values: Any) -> list[dict[str, Any]]:
    return [row | (values if row["optimization"] == stack else {}) for row in given]


def planned(
    tmp_path: Path, build: SimpleNamespace, given: list[dict[str, Any]], rungs: tuple[str, ...]
) -> pd.DataFrame:
    """Rows beside a plan that has the baseline first, as plans do, and says which rung each is."""
    order = ["fp32", *(stack for stack in rungs if stack != "fp32")]
    lines = [
        {"cell_id": build.cell(stack).cell_id, "baseline_id": build.cell("fp32").cell_id, "rounds": 5}
        | {"rung": rungs.index(stack)}
        for stack in order
    ]
    folder = build.parts(tmp_path / "planned", given)
    pd.DataFrame(lines).to_parquet(folder / "plan.parquet")
    return load(folder)


def test_each_rung_is_compared_with_the_one_before(build: SimpleNamespace, tmp_path: Path) -> None:
    table = ladder(planned(tmp_path, build, rows(build, STEP_MS)[::-1], RUNGS)).set_index("optimization")
    assert table.index.tolist() == list(RUNGS)
    assert pd.isna(table["before"].iloc[0]) and table["before"].tolist()[1:] == list(RUNGS[:-1])
    assert table["is_first"].tolist() == [True, False, False, False]
    assert table["call_ms"].tolist() == pytest.approx(list(STEP_MS.values()), rel=0.02)
    assert table["speedup"].tolist()[1:] == pytest.approx([5.0, 1.0, 4.0], rel=0.02)
    for name in RUNGS[1:]:
        assert table.loc[name, "ratio_lo"] < table.loc[name, "ratio"] < table.loc[name, "ratio_hi"]
    assert table["memory_change"].tolist()[1:] == [0, 0, 0]


def test_without_rungs_the_plans_order_counts(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(rows(build, STEP_MS))
    order = ("fp32", "fp32+no-cache", *RUNGS[2:])
    frame["plan_order"] = [order.index(stack) for stack in frame["optimization"]]
    assert ladder(frame)["optimization"].tolist() == list(order)


def test_sections_are_ladders_of_their_own(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded([row for tag in ("h200", "cpu") for row in build.sweep(hardware=(tag,), stacks=("fp32", "bf16"))])
    table = ladder(frame)
    assert table["before"].isna().tolist() == [True, False, True, False]
    assert table.groupby("hardware", sort=False)["optimization"].agg(list).tolist() == [["fp32", "bf16"]] * 2


def why(build: SimpleNamespace, loaded: Loaded, given: list[dict[str, Any]]) -> tuple[str, str]:
    line = ladder(loaded(given)).set_index("optimization").loc["fp32+static-cache"]
    assert line["inversion"]
    return line["why"], line["reason"]


SLOWER = {"fp32": 8.0, "fp32+static-cache": 10.0}


class TestReasons:
    def test_none_where_it_is_faster(self, build: SimpleNamespace, loaded: Loaded) -> None:
        table = ladder(loaded(rows(build, {"fp32": 8.0, "fp32+static-cache": 4.0})))
        assert not table["inversion"].any() and (table["why"] == "").all() and (table["reason"] == "").all()

    def test_noise(self, build: SimpleNamespace, loaded: Loaded) -> None:
        given = rows(build, {"fp32": 8.0, "fp32+static-cache": 8.3}, noise=0.2)
        line = ladder(loaded(given)).iloc[1]
        if not line["inversion"]:  # the other way round, then
            given = rows(build, {"fp32+static-cache": 8.3, "fp32": 8.0}, noise=0.2)
            line = ladder(loaded(given)).iloc[1]
        assert line["inversion"] and line["ratio_lo"] <= 1 <= line["ratio_hi"]
        assert (line["why"], line["reason"]) == ("noise", "within noise: the interval covers 1")

    def test_too_little_to_matter(self, build: SimpleNamespace, loaded: Loaded) -> None:
        given = rows(build, {"fp32": 8.0, "fp32+static-cache": 8.04}, noise=0.0003)
        assert why(build, loaded, given)[0] == "margin"

    def test_flagged(self, build: SimpleNamespace, loaded: Loaded) -> None:
        given = changed(rows(build, SLOWER), "fp32+static-cache", flags=["passes_contradict"])
        assert why(build, loaded, given) == ("doubtful", "doubtful: passes_contradict")
        given = changed(rows(build, SLOWER), "fp32", flags=["steal"])
        code, reason = ladder(loaded(given, "before")).loc[1, ["why", "reason"]]
        assert (code, reason) == ("doubtful", "doubtful: rung before steal")

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ({"peak_allocated_bytes": 150 * 2**20}, "peak -50%"),
            ({"peak_reserved_bytes": 2**29}, "reserved -50%"),
            ({"peak_allocated_bytes": 240 * 2**20, "peak_reserved_bytes": 2**29}, "peak -20%, reserved -50%"),
        ],
    )
    def test_memory(self, build: SimpleNamespace, loaded: Loaded, values: dict[str, int], text: str) -> None:
        given = changed(rows(build, SLOWER), "fp32+static-cache", **values)
        assert why(build, loaded, given) == ("memory", f"trades speed for memory: {text}")

    def test_growth_of_a_process_is_no_saving(self, build: SimpleNamespace, loaded: Loaded) -> None:
        """Another measure than the peak of tensors: neither a change, nor a reason."""
        values = {"peak_allocated_bytes": None, "runtime_bytes": 150 * 2**20, "device_kind": "cuda"}
        given = changed(rows(build, SLOWER), "fp32+static-cache", **values, flags=["memory_of_process"])
        line = ladder(loaded(given)).iloc[1]
        assert line["why"] == "unexplained" and pd.isna(line["memory_change"])
        assert line["memory_bytes"] == 150 * 2**20
        assert "growth of its process" in render(ladder_table(loaded(given, "again")))

    def test_what_it_saves_on_one_side_it_may_not_take_on_the_other(
        self, build: SimpleNamespace, loaded: Loaded
    ) -> None:
        """As decoding without a cache: 10 % less allocated, 13 times as much reserved."""
        values = {"peak_allocated_bytes": 270 * 2**20, "peak_reserved_bytes": 13 * 2**30}
        assert why(build, loaded, changed(rows(build, SLOWER), "fp32+static-cache", **values))[0] == "unexplained"

    @pytest.mark.parametrize(("before", "text"), [(True, "both wait for the host"), (False, "which the rung before")])
    def test_host(self, build: SimpleNamespace, loaded: Loaded, before: bool, text: str) -> None:
        given = changed(rows(build, SLOWER), "fp32+static-cache", flags=["launch_bound"])
        given = changed(given, "fp32", flags=["launch_bound"] if before else [])
        code, reason = why(build, loaded, given)
        assert code == "host" and text in reason

    def test_a_few_rounds_that_wait_are_no_reason(self, build: SimpleNamespace, loaded: Loaded) -> None:
        given = rows(build, SLOWER)
        for row in given:
            row["flags"] = ["launch_bound"] if row["round"] < 2 else []
        assert why(build, loaded, given)[0] == "unexplained"

    def test_several(self, build: SimpleNamespace, loaded: Loaded) -> None:
        values = {"flags": ["launch_bound", "cpu_starved"], "peak_reserved_bytes": 2**29}
        code, reason = why(build, loaded, changed(rows(build, SLOWER), "fp32+static-cache", **values))
        assert code == "doubtful, memory, host"
        assert reason.startswith("doubtful: cpu_starved; trades speed for memory: reserved -50%; waits for the host")

    def test_unexplained(self, build: SimpleNamespace, loaded: Loaded) -> None:
        assert why(build, loaded, rows(build, SLOWER)) == (
            "unexplained", "unexplained: nothing in its rows says why",
        )  # fmt: skip

    def test_one_round_says_that_it_has_no_interval(self, build: SimpleNamespace, loaded: Loaded) -> None:
        code, reason = why(build, loaded, rows(build, SLOWER, rounds=1))
        assert code == "unexplained" and reason.endswith("(1 round has no interval: it may be noise)")


@pytest.mark.parametrize("outcome", ["oom", "unsupported"])
def test_a_rung_that_did_not_run_is_no_step_to_stand_on(build: SimpleNamespace, loaded: Loaded, outcome: str) -> None:
    given = [row for row in rows(build, STEP_MS) if row["optimization"] != "fp32+static-cache"]
    failed = build.row(build.cell("fp32+static-cache"), 0, outcome=outcome) | {"workload": "decode"}
    frame = loaded([*given, failed])
    frame["plan_order"] = [RUNGS.index(stack) for stack in frame["optimization"]]
    table = ladder_table(frame)
    lines = table.frame.set_index("optimization")
    assert lines.loc["fp32+static-cache+compile", "before"] == "fp32"
    assert lines.loc["fp32+static-cache+compile", "speedup"] == pytest.approx(4.0, rel=0.02)
    assert not lines.loc["fp32+static-cache", "inversion"] and pd.isna(lines.loc["fp32+static-cache", "ratio"])
    reason = failed.get("reason") or "no reason given"
    assert f"{outcome} in 1 of 1 rounds: {reason}" in lines.loc["fp32+static-cache", "notes"]
    measured = len(lines) - 2  # without the first rung, and without the one that did not run
    assert table.footnotes[0] == f"None of {measured} rungs is slower than the one before it."
    assert f" {outcome} " in render(table)


def test_doubt_about_a_faster_rung_is_said(build: SimpleNamespace, loaded: Loaded) -> None:
    """A speed-up that may not be called one has no mark of its own: the notes say why."""
    given = rows(build, STEP_MS)
    for row in given:
        row["flags"] = ["passes_contradict"] if row["optimization"] == "fp32+static-cache" else []
    lines = ladder_table(loaded(given)).frame.set_index("optimization")
    barred = [any("no verdict: " in note for note in notes) for notes in lines["notes"]]
    assert dict(zip(lines.index, barred, strict=True)) == {
        stack: stack in ("fp32+static-cache", "fp32+static-cache+compile") for stack in lines.index
    }
    assert "no verdict: passes_contradict" in lines.loc["fp32+static-cache", "notes"]


def test_rungs_of_different_blocks_have_medians_only(build: SimpleNamespace, loaded: Loaded) -> None:
    given = rows(build, SLOWER)
    for row in given:
        row["block_id"] += row["optimization"]
    line = ladder(loaded(given)).iloc[1]
    assert line["ratio"] == pytest.approx(1.25, rel=0.02) and pd.isna(line["ratio_lo"])
    assert line["reason"] == "doubtful: never measured in one block with the rung before"


def test_an_empty_step_makes_no_ladder(build: SimpleNamespace, loaded: Loaded) -> None:
    table = ladder_table(loaded(build.sweep(stacks=("fp32",))))
    assert table.footnotes[0] == "None of 0 rungs is slower than the one before it."


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_why(build: SimpleNamespace, loaded: Loaded, format: str) -> None:
    given = changed(rows(build, SLOWER), "fp32+static-cache", peak_reserved_bytes=2**29)
    text = render(ladder_table(loaded(given)), format)
    assert text.isascii() and "trades speed for memory: reserved -50" in text
    if format == "json":
        document = json.loads(text)
        assert document["records"][1]["inversion"] is True and document["records"][1]["why"] == "memory"
        assert document["footnotes"][0] == "1 of 1 rungs are slower than the one before: 1 memory."
    if format == "text":
        assert max(map(len, text.splitlines())) <= 120
        assert "0.80x" in text and " base " in text
