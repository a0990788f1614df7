"""Result folders into frames, from real Parquet."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import AnalysisError, load, load_plan, load_samples
from orchestrator.store import Store
from tasks.job import RunResult, SampleSeries


def test_types_and_rows(build: SimpleNamespace, tmp_path: Path) -> None:
    rows = build.sweep()
    frame = load(build.parts(tmp_path, rows, part=7))
    assert len(frame) == len(rows)
    assert frame["round"].dtype == "Int64" and frame["steady"].dtype == "boolean"
    assert frame["latency_ms_p50"].dtype == "float64" and frame["outcome"].dtype == "string"
    assert frame["flags"].map(type).eq(list).all()
    assert frame["threads"].isna().all()  # a core column that these parts lack
    assert (frame["result_dir"] == str(tmp_path)).all()


def test_parts_with_added_columns_and_other_types_unify(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    build.parts(tmp_path, [build.row(cell, 0, flags=None, batch_size=None)])
    build.parts(tmp_path, [build.row(cell, 1, energy_j=3.5, flags=["drift"], batch_size=8, parameters_total=5)])
    frame = load(tmp_path).set_index("round")
    assert pd.isna(frame.loc[0, "energy_j"]) and frame.loc[1, "energy_j"] == 3.5
    assert frame.loc[0, "flags"] == [] and frame.loc[1, "flags"] == ["drift"]
    assert frame["parameters_total"].dtype == "Int64" and frame["batch_size"].dtype == "Int64"


def test_the_newest_row_of_a_cell_and_round_wins(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    later = build.row(cell, 0, 5.0, started_at="2026-11-02T00:00:00+00:00")
    build.parts(tmp_path, [later, build.row(cell, 0, 9.0), build.row(cell, 1, 5.5)], part=1)
    assert load(tmp_path)["latency_ms_p50"].tolist() == [5.5, 5.0]
    again = tmp_path / "again"
    build.parts(again, [build.row(cell, 0, 9.0, attempt=1), build.row(cell, 0, 7.0, attempt=2)])
    assert load(again)["latency_ms_p50"].tolist() == [7.0]


def stale_rows(build: SimpleNamespace) -> list[dict[str, object]]:
    """Two rounds under old versions, then two under new ones, with new round numbers."""
    cell = build.cell()
    old = [build.row(cell, i, 9.0, result_key="same-old") for i in range(2)]
    return old + [build.row(cell, i, 5.0, result_key="same-new") for i in range(2, 4)]


def test_rows_of_other_versions_are_left_out(build: SimpleNamespace, tmp_path: Path) -> None:
    build.parts(tmp_path, stale_rows(build))
    assert load(tmp_path)["latency_ms_p50"].tolist() == [5.0, 5.0]
    assert len(load(tmp_path, reuse="versions")) == len(load(tmp_path, reuse="all")) == 4


def test_the_plan_says_which_versions_count(build: SimpleNamespace, tmp_path: Path) -> None:
    build.parts(tmp_path, stale_rows(build))
    build.plan(tmp_path, [build.cell()], rounds=2, result_key="same-old")
    frame = load(tmp_path)
    assert frame["latency_ms_p50"].tolist() == [9.0, 9.0]
    assert frame["planned_rounds"].tolist() == [2, 2]


def test_rows_from_two_machines_of_one_tag_are_both_kept(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    rows = [
        build.row(cell, 0, result_key="a-v", machine_key="a"),
        build.row(cell, 1, result_key="b-v", machine_key="b"),
        build.row(cell, 2, result_key="c-v", machine_key="b"),  # same machine, other checkpoint: replaces the former
    ]
    assert load(build.parts(tmp_path, rows))["round"].tolist() == [0, 2]


def test_a_row_that_was_never_run_gives_way_to_one_that_was(build: SimpleNamespace, tmp_path: Path) -> None:
    cell = build.cell()
    rows = [build.row(cell, 0, outcome="unplaced", result_key=None), build.row(cell, 1)]
    assert load(build.parts(tmp_path, rows))["outcome"].tolist() == ["ok"]
    rows = [build.row(build.cell("nf4"), 0, outcome="unsupported", result_key=None)]
    assert load(build.parts(tmp_path / "other", rows))["outcome"].tolist() == ["unsupported"]


def test_a_changed_baseline_is_taken_from_the_plan(build: SimpleNamespace, tmp_path: Path) -> None:
    old, new = build.cell(), build.cell("bf16")
    build.parts(tmp_path, [build.row(old, 0), build.row(new, 0)])
    lines = [{"cell_id": cell.cell_id, "baseline_id": new.cell_id, "rounds": 1} for cell in (old, new)]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "plan.parquet")
    assert load(tmp_path)["baseline_id"].tolist() == [new.cell_id] * 2


def test_cells_that_left_the_plan_are_left_out(build: SimpleNamespace, tmp_path: Path) -> None:
    kept, gone = build.cell(), build.cell("nf4")
    build.parts(tmp_path, [build.row(kept, 0), build.row(gone, 0), build.row(gone, 1)])
    build.plan(tmp_path, [kept], rounds=1)
    frame = load(tmp_path)
    assert frame["cell_id"].tolist() == [kept.cell_id] and frame.attrs["not_planned"] == 2
    everything = load(tmp_path, reuse="all")
    assert len(everything) == 3 and everything.attrs["not_planned"] == 0
    assert everything["baseline_id"].notna().all()
    build.plan(tmp_path, [build.cell("bf16")])
    with pytest.raises(AnalysisError, match="no row of its plan"):
        load(tmp_path)


def test_several_folders_join(build: SimpleNamespace, tmp_path: Path) -> None:
    folders = [build.parts(tmp_path / tag, build.sweep(hardware=(tag,))) for tag in ("h200", "cpu")]
    frame = load(folders)
    assert frame.groupby("result_dir")["hardware"].unique().map(list).tolist() == [["cpu"], ["h200"]]
    assert frame.index.is_unique


@pytest.mark.parametrize("made", ["nothing", "empty", "rows"])
def test_a_folder_without_results_is_said_clearly(tmp_path: Path, made: str) -> None:
    folder = tmp_path / "results"
    if made != "nothing":
        (folder / ("rows" if made == "rows" else ".")).mkdir(parents=True)
    with pytest.raises(AnalysisError, match="results"):
        load(folder)


def test_a_damaged_part_is_named(build: SimpleNamespace, tmp_path: Path) -> None:
    build.parts(tmp_path, build.sweep())
    (tmp_path / "rows" / "part-99999.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(AnalysisError, match="part-99999"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["rows/part-000000.parquet", "samples/part-000000.parquet", "plan.parquet"])
def test_a_flipped_byte_never_becomes_a_number(build: SimpleNamespace, tmp_path: Path, name: str) -> None:
    cell = build.cell()
    series = SampleSeries(cell_id=cell.cell_id, round=0, result_key="k", measured_in="latency", label="",
                          values_ms=[1.0 + number / 7 for number in range(50)], ended_s=[1.0, 2.0])  # fmt: skip
    with Store.open(tmp_path) as store:
        store.add(RunResult(row=build.row(cell, result_key="k"), samples=[asdict(series)]))
        store.write_plan([{"cell_id": cell.cell_id, "baseline_id": cell.baseline_id, "rounds": 1}])
    read = load_samples if name.startswith("samples") else load
    good = read(tmp_path)
    whole = (tmp_path / name).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")  # Parquet has no checksum for it
    refused = 0
    for position in range(4, len(whole) - 8 - footer, (len(whole) - footer) // 40):
        (tmp_path / name).write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            found = read(tmp_path)
        except AnalysisError as error:
            refused += name.rpartition("/")[2] in str(error)
        else:  # the statistics of a page, which nobody reads
            assert [column for column in good if str(found[column].tolist()) != str(good[column].tolist())] == []
    assert refused > 10


def test_unfinished_files_are_not_read(build: SimpleNamespace, tmp_path: Path) -> None:
    build.parts(tmp_path, build.sweep())
    (tmp_path / "rows" / ".part-99999.parquet").write_bytes(b"half")
    (tmp_path / "rows" / "part-99999.parquet.tmp").write_bytes(b"half")
    assert len(load(tmp_path)) == 20


def test_parts_in_the_stores_schema(build: SimpleNamespace, tmp_path: Path) -> None:
    """A declared schema with everything null reads like one that was inferred."""
    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    from tasks.row import CORE

    schema = pa.schema([pa.field(c.name, types.get(c.type, pa.list_(pa.string()))) for c in CORE])
    (tmp_path / "rows").mkdir()
    row = build.row(build.cell("nf4"), 0, outcome="unsupported")
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "rows" / "part-1.parquet")
    frame = load(tmp_path)
    assert frame["steady"].isna().all() and frame["flags"].tolist() == [[]]
    assert frame["wall_s"].dtype == "float64"


def test_samples_and_plan(build: SimpleNamespace, tmp_path: Path) -> None:
    build.parts(tmp_path, build.sweep())
    assert load_samples(tmp_path).empty and load_plan(tmp_path) is None
    build.samples(tmp_path, build.cell(), 3, lambda round_: [1.0, 2.0 + round_])
    build.plan(tmp_path, [build.cell()])
    samples, plan = load_samples(tmp_path), load_plan(tmp_path)
    assert list(samples["values_ms"].iloc[2]) == [1.0, 4.0]
    assert plan is not None and plan["rounds"].tolist() == [5]


def test_ten_thousand_rows_load_quickly(build: SimpleNamespace, tmp_path: Path) -> None:
    stacks = ("baseline", *(f"s{i}" for i in range(499)))
    build.parts(tmp_path, build.sweep(stacks=stacks, hardware=("a", "b", "c", "d")))
    load(build.parts(tmp_path / "imports", build.sweep()))
    best = 9.0
    for _ in range(3):
        began = time.process_time()
        assert len(load(tmp_path)) == 10_000
        best = min(best, time.process_time() - began)
    assert best < 8  # catches quadratic growth
