"""Faults of the infrastructure, provoked for real under the real command: rows kept, none twice, nothing left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

SWEEP = """
name: faults
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: [16, 32]}]
optimizations: [baseline, bf16]
hardware: [%s]
quality: false
rounds: 1
"""


def rows(out: Path, tools: Any) -> list[dict[str, Any]]:
    return [record["row"] for record in tools.journal(out, "row")]


def assert_complete(out: Path, tools: Any, cells: int) -> None:
    found = rows(out, tools)
    per_run = Counter((row["cell_id"], row["round"]) for row in found)
    assert max(per_run.values()) == 1
    assert len({row["cell_id"] for row in found if row["outcome"] == "ok"}) == cells


def measuring(out: Path, tools: Any) -> bool:
    """A block has begun and its runs are not all there."""
    return len(tools.journal(out, "block")) > 0 and len(rows(out, tools)) > 0


class TestDriver:
    @pytest.mark.slow
    def test_killed_then_the_same_command(
        self, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        out, sweep = tmp_path / "out", sweep_file(SWEEP % "local")
        first = command("run", sweep, "--out", out)
        tools.wait_for(lambda: len(rows(out, tools)) >= 3, 300, "the middle of the second block", first)
        family = tools.descendants(first.pid)
        assert len(family) > 3
        first.kill()
        first.wait()
        tools.wait_for(lambda: not [p for p in family if alive(p)], 60, "the end of every process of the killed driver")
        kept = rows(out, tools)
        again = command("run", sweep, "--out", out, "--json")
        stdout, stderr = again.communicate(timeout=400)
        assert again.returncode == 0, stderr
        document = json.loads(stdout.splitlines()[-1])
        found = rows(out, tools)
        assert found[: len(kept)] == kept
        # the block that was cut is finished as a new block with a fresh baseline; the whole one is left alone
        assert not [row for row in found[len(kept) :] if row["group_id"] == kept[0]["group_id"]]
        assert document["outcomes"] == {"ok": 4}
        assert_complete(out, tools, 4)
        assert not list(out.glob(".lock"))

    @pytest.mark.slow
    def test_first_signal_finishes_the_running_cell(
        self, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        out = tmp_path / "out"
        process = command("run", sweep_file(SWEEP % "local"), "--out", out)
        tools.wait_for(lambda: measuring(out, tools), 300, "the first row", process)
        before = len(rows(out, tools))
        family = tools.descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the whole group
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 130, stderr
        assert "finishing the running cells" in stderr
        found = rows(out, tools)
        assert before <= len(found) < 4
        assert all(row["outcome"] == "ok" for row in found), [row.get("reason") for row in found]
        assert len(list((out / "rows").glob("*.parquet"))) == 1
        tools.wait_for(lambda: not [p for p in family if alive(p)], 60, "the end of every process")

    @pytest.mark.slow
    def test_second_signal_stops_now(
        self, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        out = tmp_path / "out"
        process = command("run", sweep_file(SWEEP % "local"), "--out", out)
        tools.wait_for(lambda: tools.journal(out, "block"), 300, "the first block", process)
        family = tools.descendants(process.pid)
        for _ in range(20):  # two are enough, but two that come before the first is looked at are one
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            if process.poll() is not None:
                break
        process.communicate(timeout=120)
        assert process.returncode == 130
        assert not tools.journal(out, "end"), "it did not wait for the running cell"
        tools.wait_for(lambda: not [p for p in family if alive(p)], 60, "the end of every process")

    def test_two_drivers_on_one_folder(
        self, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        from orchestrator.store import Store

        with Store.open(tmp_path / "out"):
            second = command("run", sweep_file(SWEEP % "local"), "--out", tmp_path / "out")
            _, stderr = second.communicate(timeout=120)
        assert second.returncode == 2
        assert "is being written by" in stderr


@pytest.mark.slow
def test_two_drivers_on_one_cluster_measure_in_turn(
    cluster: Any, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
) -> None:
    sweep, outs = sweep_file(SWEEP % "cpu"), [tmp_path / "one", tmp_path / "two"]
    drivers = [command("run", sweep, "--address", cluster.address, "--out", out) for out in outs]
    output = [driver.communicate(timeout=400) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], output
    assert sum("another run measures on this CPU" in stderr for _, stderr in output) == 1, output
    spans = []
    for out in outs:
        assert_complete(out, tools, 4)
        began = [datetime.fromisoformat(row["started_at"]).timestamp() for row in rows(out, tools)]
        spans.append(
            (min(began), max(start + row["wall_s"] for start, row in zip(began, rows(out, tools), strict=True)))
        )
    (_, first_end), (second_start, _) = sorted(spans)
    assert first_end <= second_start + 1.0, spans


class TestCluster:
    @pytest.mark.slow
    def test_runner_is_killed(
        self, cluster: Any, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        cluster.add("a100")
        out = tmp_path / "out"
        process = command("run", sweep_file(SWEEP % "a100"), "--out", out, "--address", cluster.address)
        tools.wait_for(lambda: measuring(out, tools), 300, "the first row", process)
        runner = tools.wait_for(lambda: runners(tools), 60, "a runner")[0]
        below = tools.descendants(runner.pid)
        runner.kill()
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        assert_complete(out, tools, 4)
        faults = tools.journal(out, "fault")
        assert len(faults) == 1 and "the runner was lost" in faults[0]["reason"]
        assert [row["attempt"] for row in rows(out, tools)].count(2) == 1
        tools.wait_for(lambda: not [p for p in below if alive(p)], 60, "the end of what the runner had started")

    @pytest.mark.slow
    def test_node_is_lost_and_another_takes_over(
        self, cluster: Any, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        doomed = cluster.add("rtx3090")
        out = tmp_path / "out"
        process = command(
            "run", sweep_file(SWEEP % "rtx3090"), "--out", out, "--address", cluster.address, "--wait-nodes", "5m"
        )
        tools.wait_for(lambda: measuring(out, tools), 300, "the first row", process)
        cluster.kill(doomed)
        cluster.add("rtx3090")
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        assert_complete(out, tools, 4)
        assert any("its node is gone" in record["reason"] for record in tools.journal(out, "fault"))
        assert len({record["slot"] for record in tools.journal(out, "block")}) == 2

    @pytest.mark.slow
    def test_a_node_that_joins_late_is_waited_for(
        self, cluster: Any, command: Callable[..., Any], sweep_file: Callable[[str], Path], tmp_path: Path, tools: Any
    ) -> None:
        out = tmp_path / "out"
        process = command(
            "run", sweep_file(SWEEP % "rtx4060"), "--out", out, "--address", cluster.address, "--wait-nodes", "5m",
            "--only", "sequence_length=16",
        )  # fmt: skip
        tools.wait_for(lambda: (out / "plan.parquet").exists(), 300, "the plan", process)
        cluster.add("rtx4060")
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        assert "no device is tagged 'rtx4060'" in stderr
        assert_complete(out, tools, 2)


def runners(tools: Any) -> list[psutil.Process]:
    """Those of this test's own raylets: other clusters on this machine are left alone."""
    found = []
    for process in tools.descendants(os.getpid()):
        with suppress(psutil.NoSuchProcess):
            if (process.cmdline() or [""])[0].startswith("ray::Runner"):
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


pytestmark = pytest.mark.timeout(1200)
