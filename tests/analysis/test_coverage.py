"""The plan is the denominator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from analysis import coverage, load, load_plan


def test_every_planned_cell_counts_once(build: SimpleNamespace, tmp_path: Path) -> None:
    names = ("baseline", "bf16", "nf4", "int8", "fp16", "tf32")
    planned = [build.cell(name) for name in names]
    rows = [build.row(planned[0], i) for i in range(3)] + [build.row(planned[1], i) for i in range(2)]
    rows += [build.row(planned[2], i, outcome="oom") for i in range(3)]
    rows += [build.row(planned[3], 0, outcome="unsupported")]
    rows += [build.row(planned[4], i, outcome="timeout" if i else "ok") for i in range(3)]
    build.plan(tmp_path, planned, rounds=3)
    found = coverage(load(build.parts(tmp_path, rows)), load_plan(tmp_path))
    assert found.line() == "6 planned: 1 ok, 1 oom, 1 unsupported, 1 timeout, 1 incomplete, 1 missing"
    assert found.missing == (planned[5].cell_id,)
    assert sum(found.counts.values()) == found.planned


def test_share_of_time_spent_measuring(build: SimpleNamespace, tmp_path: Path) -> None:
    found = coverage(load(build.parts(tmp_path, build.sweep())))
    assert found.line() == "4 planned: 4 ok"
    assert found.measuring_share == 0.6 and found.measuring_share_after_load == 0.75
    assert found.wall_s == 200
    assert (
        found.time_line()
        == "3 min in cells, 60% of it warm-up and measuring (75% of what is left without load and compile)"
    )


def test_no_times_no_share(build: SimpleNamespace, tmp_path: Path) -> None:
    found = coverage(load(build.parts(tmp_path, [build.row(build.cell(), 0, outcome="oom")])))
    assert found.measuring_share is None and found.time_line() is None


def test_two_folders_with_the_same_cells_count_twice(build: SimpleNamespace, tmp_path: Path) -> None:
    folders = [build.parts(tmp_path / name, build.sweep()) for name in ("one", "two")]
    assert coverage(load(folders)).line() == "8 planned: 8 ok"
