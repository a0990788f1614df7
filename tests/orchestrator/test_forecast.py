"""The forecast of time against what the committed sweeps took."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from analysis import load
from orchestrator.expand import expand
from orchestrator.forecast import run_seconds
from orchestrator.sweep import load_sweep
from tasks.cell import Cell
from tasks.job import PROFILES

RESULTS = Path(__file__).parents[2] / "docs" / "results"
# their models were trained for them and are not committed
NO_CHECKPOINT = ("systematic", "systematic-graphs", "systematic-packed", "onnx")
MEASURED = [
    folder
    for folder in sorted(RESULTS.glob("*/*"))
    if (folder / "rows").is_dir() and (folder.name not in NO_CHECKPOINT or folder.parent.name.startswith("cpu"))
]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["workload_point"], row["optimization"], row["hardware"]


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_of_the_committed_sweeps(folder: Path) -> None:
    """Within a factor of 2, mostly of 1.4; a forecast that knows no long requests is too low by up to 6."""
    frame = load(folder)
    rows = frame[frame["outcome"] == "ok"].to_dict("records")
    sweep = load_sweep(str(folder / "sweep.yaml"), [])
    cells = {
        (item.cell.model.id, str(item.cell.workload), str(item.cell.stack), tag): item.cell
        for tag in frame["hardware"].unique()
        for item in expand(sweep, tag)
    }
    first: Counter[Any] = Counter()
    seen = forecast = 0.0
    for row in sorted(rows, key=lambda row: row["round"]):
        first[key(row)] += 1
        device: Any = SimpleNamespace(kind=row["device_kind"])
        alone = first[key(row)] == 1
        forecast += run_seconds(
            cells[key(row)], device, sweep.measuring, judged=alone and sweep.quality.enabled, cold=alone
        )
        seen += row["wall_s"]
    assert seen / 2 < forecast < seen * 2


def test_there_are_sweeps_to_be_held_against() -> None:
    assert len(MEASURED) >= 15


def test_longer_prompts_take_longer_and_training_three_times_as_long(bench: Any) -> None:
    def seconds(kind: str, length: int) -> float:
        cell: Cell = bench.cell(kind, "fp32", bench.POCKET, batch_size=4, sequence_length=length)
        return run_seconds(cell, bench.device(), PROFILES["quick"], judged=False, cold=False)

    passes = seconds("prefill", 1)
    short, long = seconds("prefill", 2048) - passes, seconds("prefill", 32768) - passes
    assert long > 16 * short > 0, "attention grows with the square"
    assert seconds("train_step", 32768) - seconds("train_step", 1) == pytest.approx(3 * long, rel=0.01)


def test_longer_requests_larger_models_and_less_of_them_on_the_device_take_longer(bench: Any) -> None:
    def seconds(stack: str, *, cold: bool = False, **axes: int) -> float:
        cell: Cell = bench.cell("decode", stack, **axes)
        return run_seconds(cell, bench.device("cuda"), PROFILES["quick"], judged=False, cold=cold)

    assert (
        seconds("fp32", new_tokens=400) > seconds("fp32", new_tokens=100) > seconds("fp32+cuda-graph", new_tokens=100)
    )
    assert seconds("int8") > seconds("bf16")
    tuned = "bf16+static-cache+compile:coordinate_descent=true"
    assert seconds(tuned, cold=True) > seconds("bf16+static-cache+compile", cold=True) > seconds(tuned)
    assert seconds("offload:keep=0.25") > seconds("offload:keep=0.75") > seconds("baseline")
