"""Builders of rows as runs leave them, written as real Parquet parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.cell import Cell, ModelSpec, Stack, Technique, WorkloadPoint

STACKS = ("baseline", "bf16", "bf16+sdpa-flash", "nf4")
Row = dict[str, Any]


def make_cell(optimization: str = "baseline", hardware: str = "h200", model: str = "pocket", batch: int = 1) -> Cell:
    names = () if optimization == "baseline" else tuple(optimization.split("+"))
    return Cell(
        model=ModelSpec(id=model, source="pocket"),
        workload=WorkloadPoint(kind="prefill", parameters=(("batch_size", batch), ("sequence_length", 512))),
        stack=Stack(techniques=tuple(Technique(name=name) for name in names)),
        hardware=hardware,
    )


def make_row(cell: Cell, round_: int = 0, latency_ms: float = 10.0, outcome: str = "ok", **more: Any) -> Row:
    """One row; everything but identity and bookkeeping is null unless the outcome is `ok`."""
    row: Row = {
        "schema_version": 1,
        "sweep": "test",
        "cell_id": cell.cell_id,
        "baseline_id": cell.baseline_id,
        "group_id": cell.group_id,
        "result_key": f"{cell.cell_id}-torch213",
        "round": round_,
        "order_in_round": 0,
        "block_id": f"{cell.group_id}-{round_}",
        "model": cell.model.id,
        "optimization": str(cell.stack),
        "workload": cell.workload.kind,
        "workload_point": str(cell.workload),
        "hardware": cell.hardware,
        "hardware_simulated": False,
        "profile": "standard",
        "machine_key": "machine",
        "device_kind": "cpu" if cell.hardware == "cpu" else "cuda",
        "outcome": outcome,
        "flags": [],
        "invalid_reasons": [],
        "null_reasons": "{}",
        "run_id": "run-1",
        "started_at": f"2026-11-01T10:{round_:02}:00+00:00",
        "attempt": 1,
    }
    if outcome == "ok":
        row |= {
            "steady": True,
            "latency_ms_p50": latency_ms,
            "throughput_per_s": 512e3 / latency_ms,
            "throughput_unit": "token",
            "peak_allocated_bytes": None if cell.hardware == "cpu" else 300 * 2**20,
            "peak_host_bytes": 900 * 2**20,
            "model_bytes": 24 * 2**20,
            "load_s": 1.0,
            "compile_s": 1.0,
            "warmup_s": 2.0,
            "measure_s": 4.0,
            "wall_s": 10.0,
        }
    else:
        row |= {"reason": f"it ended in {outcome}"}
    return row | more


def make_sweep(
    rounds: int = 5,
    stacks: Sequence[str] = STACKS,
    hardware: Sequence[str] = ("h200",),
    speed: dict[str, float] | None = None,
    noise: float = 0.01,
    seed: int = 0,
    **more: Any,
) -> list[Row]:
    """Rows of a whole sweep: `speed` is how many times faster than the baseline a stack truly is."""
    rng = np.random.default_rng(seed)
    rows = []
    for tag in hardware:
        for stack in stacks:
            for round_ in range(rounds):
                latency = 10.0 / (speed or {}).get(stack, 1.0) * np.exp(noise * rng.standard_normal())
                rows.append(make_row(make_cell(stack, tag), round_, float(latency), **more))
    return rows


def write_parts(directory: Path, rows: Sequence[Row], part: int = 50) -> Path:
    (directory / "rows").mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), part):
        names = dict.fromkeys(name for row in rows[start : start + part] for name in row)
        table = pa.table({name: pa.array([row.get(name) for row in rows[start : start + part]]) for name in names})
        number = len(list((directory / "rows").iterdir()))
        pq.write_table(table, directory / "rows" / f"part-{number:05}.parquet")
    return directory


def write_plan(directory: Path, cells: Sequence[Cell], rounds: int = 5, **more: Any) -> None:
    lines = [{"cell_id": cell.cell_id, "baseline_id": cell.baseline_id, "rounds": rounds, **more} for cell in cells]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), directory / "plan.parquet")


def write_samples(directory: Path, cell: Cell, rounds: int, values: Callable[[int], Sequence[float]]) -> None:
    lines = [
        {
            "cell_id": cell.cell_id,
            "round": round_,
            "result_key": f"{cell.cell_id}-torch213",
            "measured_in": "latency",
            "label": "call",
            "values_ms": list(values(round_)),
        }
        for round_ in range(rounds)
    ]
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), directory / "samples" / "part-00000.parquet")


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Rows -> the frame that `load` makes of them after a way through Parquet."""
    from analysis import load

    def through_parquet(rows: Sequence[Row], name: str = "results") -> pd.DataFrame:
        return load(write_parts(tmp_path / name, rows))

    return through_parquet


@pytest.fixture
def build() -> SimpleNamespace:
    """The builders above: tests are not a package, so they cannot import each other."""
    return SimpleNamespace(
        cell=make_cell, row=make_row, sweep=make_sweep, parts=write_parts, plan=write_plan, samples=write_samples
    )
