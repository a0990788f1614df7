"""Four unlike nodes under the real command: cells go where their tag is, and share no slot."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TAGS = ("a100", "rtx3090", "rtx4060", "cpu")
SWEEP = """
name: heterogeneous
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: 16}]
optimizations: [baseline, bf16]
hardware: [a100, rtx3090, rtx4060, cpu, h100]
quality: false
rounds: 1
"""


@pytest.fixture(scope="module")
def finished(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import subprocess
    import sys
    from types import SimpleNamespace

    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("heterogeneous")
    (folder / "sweep.yaml").write_text(SWEEP)
    for tag in TAGS[:3]:
        cluster.add(tag)

    def benchmatrix(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *map(str, arguments)],
            cwd=root, text=True, capture_output=True, timeout=500, check=False,
        )  # fmt: skip

    nodes = benchmatrix("nodes", "--address", cluster.address, "--json")
    run = benchmatrix("run", folder / "sweep.yaml", "--address", cluster.address, "--out", folder / "out")
    records = [json.loads(line) for line in (folder / "out" / "journal.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        nodes=json.loads(nodes.stdout), run=run, out=folder / "out", benchmatrix=benchmatrix,
        blocks={record["block_id"]: record for record in records if record["kind"] == "block"},
        rows=[record["row"] for record in records if record["kind"] == "row"],
    )  # fmt: skip


def measured(finished: Any) -> list[dict[str, Any]]:
    return [row for row in finished.rows if row["outcome"] != "unplaced"]


def test_nodes_shows_what_is_pretended(finished: Any) -> None:
    tags = {device["tag"] for node in finished.nodes for device in node["devices"] if device["simulated"]}
    assert tags == set(TAGS[:3])
    assert any("simulated" in text for node in finished.nodes for text in node["disagreements"])


def test_every_cell_ran_on_a_node_with_its_tag(finished: Any) -> None:
    assert {row["hardware"] for row in measured(finished)} == set(TAGS)
    tags_of = {
        node["node"]: {device["tag"] for device in node["devices"] if device["simulated"]} or {"cpu"}
        for node in finished.nodes
    }
    for row in measured(finished):
        assert row["outcome"] == "ok", row["reason"]
        short_id = finished.blocks[row["block_id"]]["slot"].split("/")[0].rsplit("-", 1)[1]
        assert row["hardware"] in tags_of[short_id]


def test_no_two_runs_share_a_slot(finished: Any) -> None:
    intervals = defaultdict(list)
    for row in measured(finished):
        begin = datetime.fromisoformat(row["started_at"])
        # from when the isolated process began: starting and ending it, which wall_s holds too, take time beside others
        end = begin + timedelta(seconds=row["wall_s"] - row["overhead_s"])
        intervals[finished.blocks[row["block_id"]]["slot"]].append((begin, end))
    assert len(intervals) == len(TAGS)
    for slot, spans in intervals.items():
        spans.sort()
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin + timedelta(seconds=0.01), slot


def test_simulated_rows_say_so(finished: Any) -> None:
    for row in measured(finished):
        assert row["hardware_simulated"] == (row["hardware"] != "cpu")


def test_a_tag_that_nobody_has_is_said_and_recorded(finished: Any) -> None:
    assert "no device is tagged 'h100'; tags here: a100, cpu, rtx3090, rtx4060" in finished.run.stderr
    assert sum(row["outcome"] == "unplaced" for row in finished.rows) == 2
    assert finished.run.returncode == 1


def test_rows_and_plan_agree(finished: Any) -> None:
    plan, rows = pd.read_parquet(finished.out / "plan.parquet"), pd.read_parquet(finished.out / "rows")
    assert set(plan.cell_id) == set(rows.cell_id)
    assert len(plan) == 10


def test_trade_off_table_has_a_column_for_each_hardware(finished: Any) -> None:
    table = finished.benchmatrix("table", finished.out, "--kind", "tradeoff", "--format", "csv")
    assert table.returncode == 0, table.stderr
    header = table.stdout.splitlines()[0]
    assert all(tag in header for tag in TAGS)
    assert "a100" in finished.run.stdout


def test_runners_leave_nothing_in_the_result_folder(finished: Any) -> None:
    """Nodes need not share a file system with the driver: rows and samples come through Ray to the one writer."""
    names = {str(path.relative_to(finished.out)) for path in finished.out.rglob("*") if path.is_file()}
    parts = {"rows/part-000000.parquet", "samples/part-000000.parquet"}
    assert names == {"journal.jsonl", "plan.parquet", "sweep.yaml", "log/driver.log", *parts}
    assert len(pd.read_parquet(finished.out / "samples")) > 0


def test_running_it_again_measures_nothing(finished: Any) -> None:
    again = finished.benchmatrix("run", finished.out / "sweep.yaml", "--out", finished.out, "--json", "--address",
                                 finished.nodes and finished_address(finished))  # fmt: skip
    assert json.loads(again.stdout.splitlines()[-1])["runs"] == 0


def test_what_a_local_sweep_leaves_unused_is_said(finished: Any, tmp_path: Path) -> None:
    local = finished.benchmatrix("run", finished.out / "sweep.yaml", "--set", "hardware=[local]", "--out", tmp_path,
                                 "--address", finished_address(finished))  # fmt: skip
    assert "leaves a100, rtx3090, rtx4060 unused" in " ".join(local.stderr.split())


def finished_address(finished: Any) -> str:
    records = [json.loads(line) for line in (finished.out / "journal.jsonl").read_text().splitlines()]
    return str(next(record["address"] for record in records if record["kind"] == "run"))
