"""What the two tables say, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import comparison_table, render, tradeoff_table
from analysis.render import to_text
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


def test_memory_of_a_runtime_that_allocates_for_itself(build: SimpleNamespace, loaded: Loaded) -> None:
    """Where only the process is known, its growth; where not even that, nothing, and never the host's."""
    rows = build.sweep(stacks=("baseline", "onnx", "onnx-int4"))
    grown = {"onnx": 700 * 2**20, "onnx-int4": None}
    rows = [
        row | {"peak_allocated_bytes": None, "runtime_bytes": grown[row["optimization"]], "device_kind": "cuda"}
        if row["optimization"] in grown
        else row | {"device_kind": "cuda"}
        for row in rows
    ]
    frame = comparison_table(loaded(rows)).frame.set_index("optimization")["memory_bytes"]
    assert (frame["baseline"], frame["onnx"]) == (300 * 2**20, 700 * 2**20)
    assert pd.isna(frame["onnx-int4"])
    rows = [row | {"flags": ["memory_of_process"] if row["optimization"] == "onnx" else []} for row in rows]
    wide = tradeoff_table(loaded(rows, "again")).frame.set_index("optimization")["notes"]
    assert any("growth of its process" in note for note in wide["onnx"])
    assert not any("growth of its process" in note for note in wide["baseline"])


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
        assert any("of the tokens after the first" in text for text in table.remarks()) == (kind == "decode")
        lines[kind] = table.frame.iloc[1]
    assert lines["prefill"]["verdict"] == "indistinguishable"
    assert lines["prefill"]["speedup"] == pytest.approx(1.0, rel=0.02)
    assert lines["decode"]["verdict"] == "faster"
    assert lines["decode"]["speedup"] == pytest.approx(1.25, rel=0.02)
    assert lines["decode"]["speedup_lo"] < 1.25 < lines["decode"]["speedup_hi"]


REQUESTS = {"request_ms_mean": 800.0, "request_ms_std": 12.5, "request_ms_min": 780.0, "request_ms_max": 835.0}
MEMORY = {"peak_reserved_bytes": 2 * 2**30, "fragmentation": 0.25}


def test_decoding_has_the_columns_of_the_second_article(build: SimpleNamespace, loaded: Loaded) -> None:
    """Mean, standard deviation, least and greatest of requests; allocated, reserved and what lies between."""
    table = comparison_table(loaded(build.sweep(**REQUESTS, **MEMORY, workload="decode", batch_size=4)))
    for format in ("csv", "json"):
        text = render(table, format)
        assert all(name in text for name in (*REQUESTS, *MEMORY, "peak_allocated_bytes")), format
    line = table.frame.iloc[0]
    assert {name: line[name] for name in (*REQUESTS, *MEMORY)} == REQUESTS | MEMORY
    markdown = render(table, "md")
    header = next(text for text in markdown.splitlines() if text.startswith("| optimization"))
    for name in ("request ms", "request std", "request min", "request max", "reserved", "fragmented", "memory"):
        assert f" {name} |" in header
    assert "| 800 | 12.5 | 780 | 835 |" in markdown and "| 2.00 GiB | 25 % |" in markdown
    text = render(table)
    assert max(map(len, text.splitlines())) <= 120
    left_out = text.split("Not shown for want of width:")[1]
    assert "request max" in left_out and "speed-up" not in left_out and "latency" not in left_out
    narrow = to_text(table, 80)
    assert "over the requests of a round" in markdown and "over the requests of a round" in text
    assert "request std" in narrow.split("Not shown for want of width:")[1]
    assert "over the requests of a round" not in narrow  # a legend goes with its columns


def test_columns_stay_out_where_they_mean_nothing(build: SimpleNamespace, loaded: Loaded) -> None:
    table = comparison_table(loaded(build.sweep(hardware=("cpu",))))
    shown = {field.header for field in table.fields}
    assert not shown & {"request std", "reserved", "fragmented", "skipped", "loss@8", "of ceiling", "MFU"}
    assert not any(text.startswith(("request ms", "of ceiling", "loss@8")) for text in table.remarks())


def test_training_shows_skipped_steps_and_losses_that_are_apart(build: SimpleNamespace, loaded: Loaded) -> None:
    losses = {"fp32": 2.0, "bf16": 2.03, "fp16": 2.05, "fp16+sgd": None}
    rows = build.sweep(stacks=tuple(losses), optimizer_steps=20, optimizer_steps_skipped=0)
    for row in rows:
        row["loss_at_step_8"] = losses[row["optimization"]]
        row["optimizer_steps_skipped"] = 2 if row["optimization"] == "fp16" else 0
    table = comparison_table(loaded(rows))
    lines = table.frame.set_index("optimization")
    apart = {stack: [note for note in notes if "loss_apart" in note] for stack, notes in lines["notes"].items()}
    assert apart == {"fp32": [], "bf16": [], "fp16": [LOSS_NOTE], "fp16+sgd": []}
    assert lines.loc["bf16", "loss_apart"] == pytest.approx(0.015)
    assert lines["optimizer_steps_skipped"].to_dict() == {"fp32": 0, "bf16": 0, "fp16": 2, "fp16+sgd": 0}
    text = render(table, "md")
    assert " loss@8 |" in text and " skipped |" in text
    alone = comparison_table(loaded([row for row in rows if row["optimization"] != "fp32"], "alone"))
    assert not any("loss_apart" in note for notes in alone.frame["notes"] for note in notes)


@pytest.mark.parametrize(
    ("unit", "shown"),
    [
        ("token", "train_step[batch_size=8,sequence_length=512]"),
        ("image", "train_step[batch_size=8,image_size=224]"),
        ("sample", "train_step[batch_size=8]"),
        (None, "train_step[batch_size=8,image_size=224,sequence_length=512]"),
    ],
)
def test_headings_leave_out_the_axes_of_other_kinds_of_model(
    build: SimpleNamespace, loaded: Loaded, unit: str | None, shown: str
) -> None:
    """What failed and counted nothing has the heading that others of its model have."""
    point = "train_step[batch_size=8,image_size=224,sequence_length=512]"
    rows = [*build.sweep(stacks=("baseline", "bf16")), build.row(build.cell("nf4"), 0, outcome="oom")]
    changes: dict[str, Any] = {"workload": "train_step", "workload_point": point}
    rows = [row | changes | ({} if row["outcome"] == "oom" else {"throughput_unit": unit}) for row in rows]
    for table in (comparison_table(loaded(rows)), tradeoff_table(loaded(rows, "again"))):
        assert set(table.frame["workload_point"]) == {point}
        assert set(table.frame["workload_shown"]) == {shown}
        assert [line.split(" | ")[1] for line in render(table).splitlines() if "train_step" in line] == [shown]


def test_headings_tell_points_apart(build: SimpleNamespace, loaded: Loaded) -> None:
    """A list of lengths beside a model of images plans its step twice; what failed whole is shortened as well."""

    def step(batch: int, length: int, **more: Any) -> list[dict[str, Any]]:
        point = f"train_step[batch_size={batch},image_size=224,sequence_length={length}]"
        more = {"workload": "train_step", "workload_point": point, "throughput_unit": "image"} | more
        cells = [build.cell(stack, batch=batch * 10_000 + length) for stack in ("baseline", "bf16")]
        return [build.row(cell, round_) | more for cell in cells for round_ in range(3)]

    failed: dict[str, Any] = {"outcome": "oom", "reason": "full", "throughput_unit": None}
    rows = [*step(8, 512), *step(8, 1024), *step(16, 512), *step(64, 512, **failed)]
    for table in (comparison_table(loaded(rows)), tradeoff_table(loaded(rows, "again"))):
        headings = [line.split(" | ")[1] for line in render(table).splitlines() if "train_step" in line]
        assert headings == [
            "train_step[batch_size=8,image_size=224,sequence_length=512]",
            "train_step[batch_size=8,image_size=224,sequence_length=1024]",
            "train_step[batch_size=16,image_size=224]",
            "train_step[batch_size=64,image_size=224]",
        ]


def test_flags_are_explained_below(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = [row | {"flags": ["launch_bound", "metric_failed:energy"]} for row in build.sweep()]
    (legend,) = (text for text in comparison_table(loaded(rows)).remarks() if text.startswith("launch_bound: "))
    assert "; metric_failed: this metric's columns are null" in legend and "steal" not in legend
    assert not any("launch_bound" in text for text in comparison_table(loaded(build.sweep(), "clean")).remarks())


LOSS_NOTE = "loss_apart: 2.5% from the loss of fp32 in the eighth step, having skipped 2 steps"


def kernels(build: SimpleNamespace, causal: str, **more: Any) -> list[dict[str, Any]]:
    point = f"attention[batch_size=4,causal={causal},sequence_length=4096]"
    rows = build.sweep(stacks=("fp16+eager", "fp16+sdpa-flash"), model="none", workload="attention")
    return [row | {"workload_point": point} | more for row in rows]


def test_causal_kernels_show_what_they_execute(build: SimpleNamespace, loaded: Loaded) -> None:
    """Counted as full, a kernel that skips the masked half would seem to run above the ceiling."""
    rows = kernels(build, "true", mfu=1.3, flops=2e12, flops_least=1e12)
    table = comparison_table(loaded(rows))
    assert table.frame["ceiling_share"].tolist() == pytest.approx([0.65, 0.65])
    assert table.frame["mfu"].isna().all()
    for format in ("text", "md"):
        text = render(table, format)
        assert "of ceiling" in text and " 65 %" in text and "130 %" not in text and "MFU" not in text
    assert any("of causal attention only the half" in text for text in table.remarks())


@pytest.mark.parametrize(("causal", "share"), [("false", 0.6), ("true", None)])
def test_kernels_without_a_count_of_what_they_execute(
    build: SimpleNamespace, loaded: Loaded, causal: str, share: float | None
) -> None:
    """Older rows: without a mask it is everything, with one nobody knows."""
    line = comparison_table(loaded(kernels(build, causal, mfu=0.6))).frame.iloc[0]
    assert pd.isna(line["mfu"])
    assert pd.isna(line["ceiling_share"]) if share is None else line["ceiling_share"] == share


def test_a_model_above_the_ceiling_is_corrected_too(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(stacks=("baseline", "bf16"), flops=2e12, flops_least=1.5e12)
    rows = [row | {"mfu": 1.2 if row["optimization"] == "bf16" else 0.6} for row in rows]
    table = comparison_table(loaded(rows))
    lines = table.frame.set_index("optimization")
    assert lines.loc["baseline", "mfu"] == 0.6 and pd.isna(lines.loc["baseline", "ceiling_share"])
    assert pd.isna(lines.loc["bf16", "mfu"]) and lines.loc["bf16", "ceiling_share"] == pytest.approx(0.9)
    assert any("by what must be executed" in note for note in lines.loc["bf16", "notes"])
    assert "120 %" not in render(table, "md")


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
