"""The command as a person calls it: exit status, what stands on which stream, and how fast bad input is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
name: tiny
models: [pocket]
workloads: [{kind: prefill, batch_size: 1, sequence_length: 16}]
optimizations: [baseline, bf16, sdpa-cudnn]
rounds: 2
"""


def benchmatrix(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        cwd=ROOT, text=True, capture_output=True, timeout=120, check=False, **options,
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SWEEP)
    return path


def test_help_loads_nothing_heavy() -> None:
    modules = ", ".join(f"orchestrator.{name}" for name in ("cli", "execute", "planning", "work", "show", "machine"))
    heavy = ("torch", "ray", "pandas", "pyarrow", "scipy", "transformers")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout.strip() == "[]"
    assert "comparison table" in benchmatrix("table", "--help").stdout


class TestPlan:
    def test_json_is_one_document(self, sweep: Path) -> None:
        result = benchmatrix("plan", sweep, "--json", "--set", "hardware=[cpu, rtx3090]")
        assert result.returncode == 0 and len(result.stdout.splitlines()) == 1
        document = json.loads(result.stdout)
        assert set(document) == {"sweep", "cells", "estimated_s", "not_counted"}
        assert set(document["cells"][0]) == {
            "cell_id", "baseline_id", "model", "workload", "optimization", "hardware", "rounds", "decision", "reason",
        }  # fmt: skip
        decisions = {(cell["optimization"], cell["hardware"]): cell["decision"] for cell in document["cells"]}
        assert decisions["bf16", "cpu"] == "run"
        assert decisions["sdpa-cudnn", "cpu"] == "unsupported"
        assert decisions["baseline", "rtx3090"] == "unplaced"
        assert document["estimated_s"] > 0 and document["not_counted"] == []

    def test_rounds_that_all_compile_take_longer(self, sweep: Path) -> None:
        shared, each = (
            json.loads(benchmatrix("plan", sweep, "--json", "--set", "optimizations=[compile]", *more).stdout)
            for more in ((), ("--set", "compile_each_round=true"))
        )
        assert each["estimated_s"] > shared["estimated_s"]

    def test_for_the_nodes_of_a_cluster_file(self, sweep: Path, tmp_path: Path) -> None:
        tags = ["a100-80gb", "rtx3090", "rtx4060", "cpu"]
        named = f"hardware=[{','.join(tags)}]"
        result = benchmatrix("plan", sweep, "--cluster", "cluster.yaml", "--json", "--set", named)
        assert result.returncode == 0, result.stderr
        cells = json.loads(result.stdout)["cells"]
        decisions = {(cell["optimization"], cell["hardware"]): cell["decision"] for cell in cells}
        assert {decisions["bf16", tag] for tag in tags} == {"run"}
        assert decisions["sdpa-cudnn", "cpu"] == "unsupported" and decisions["sdpa-cudnn", "rtx3090"] == "run"
        local = benchmatrix("plan", sweep, "--cluster", "cluster.yaml")
        assert "the sweep's hardware is local, which is " in local.stdout.replace("\n", " ")
        assert "rtx3090,rtx4060]'" in local.stdout
        assert "hardware is local" not in benchmatrix("plan", sweep).stdout
        missing = benchmatrix("plan", sweep, "--cluster", tmp_path / "none.yaml")
        assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1 and "No such file" in missing.stderr
        both = benchmatrix("plan", sweep, "--cluster", "cluster.yaml", "--address", "127.0.0.1:1")
        assert both.returncode == 2 and "not both" in both.stderr

    def test_says_what_the_forecast_leaves_out(self, sweep: Path) -> None:
        made = "optimizations=[baseline, prune, prune:ratio=0.5, distill, sdpa-cudnn]"
        result = benchmatrix("plan", sweep, "--set", made, "--set", "hardware=[cpu]")
        assert "\nnot counted: making what distill, prune need, once, unless it is stored already" in result.stdout
        assert "not counted" not in benchmatrix("plan", sweep).stdout

    def test_for_people(self, sweep: Path) -> None:
        result = benchmatrix("plan", sweep, "--only", "optimization=bf16", "--set", "hardware=[cpu]")
        assert "prefill[batch_size=1,sequence_length=16]" in result.stdout
        assert "2 cells (2 run), 4 runs" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "no-such-sweep"), "no such file"),
        (("run", "SWEEP", "--set", "optimizations=[bf61]"), "did you mean 'bf16'"),
        (("run", "SWEEP", "--only", "optimisation=bf16"), "did you mean 'optimization'"),
        (("run", "SWEEP", "--only", "model=absent"), "no cell of the sweep has model 'absent'"),
        (("run", "SWEEP", "--only", "hardware=nowhere"), "no cell of the sweep has hardware 'nowhere'"),
        (("run", "SWEEP", "--retry", "eror"), "did you mean 'error'"),
        (("run", "SWEEP", "--wait-nodes", "soon"), "not a time"),
        (("plan", "SWEEP", "--set", "profile=quik"), "did you mean 'quick'"),
        (("run", "SWEEP", "--set", "quality.choices_file=none.jsonl"), "none.jsonl cannot be read"),
        (("submit", "SWEEP", "--address", "http://127.0.0.1:1", "--out", "x", "--set", "seed=-1"), "seed"),
        (("table", "no-such-folder"), "no-such-folder"),
        (("status", "no-such-folder"), "no result folder"),
        (("status",), "give a result folder, or --address"),
        (("submit", "SWEEP", "--address", "http://127.0.0.1:1", "--out", "results/x"), "absolute path"),
        (("submit", "SWEEP", "--address", "http://127.0.0.1:1", "--out", "s3://a:b@c/d"), "no credentials"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[str, ...], message: str, sweep: Path, tmp_path: Path) -> None:
    words = [str(sweep) if word == "SWEEP" else word for word in arguments]
    words += ["--out", str(tmp_path / "out")] if words[0] == "run" else []
    begin = time.monotonic()
    result = benchmatrix(*words)
    assert time.monotonic() - begin < 6.0  # two seconds on an idle machine
    assert result.returncode == 2 and not result.stdout
    assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_uri_is_checked_before_anything_starts(sweep: Path) -> None:
    for uri, message in (("ftp://host/x", "begins with s3://"), ("s3://me:secret@bucket/x", "no credentials")):
        result = benchmatrix("run", sweep, "--out", uri)
        assert result.returncode == 2 and not result.stdout
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
        assert "me:secret" not in result.stderr
    assert not (ROOT / "ftp:").exists() and not (ROOT / "s3:").exists()


def test_status_before_the_first_row(tmp_path: Path) -> None:
    from orchestrator.store import Store

    with Store.open(tmp_path) as store:
        store.note("run", run_id="r1")
        store.note("block", block_id="b1", round=0, slot="host/cpu", cells=3, group="pocket prefill")
        result = benchmatrix("status", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("no rows yet\nrun r1: under way\n")
    assert "host/cpu: round 0 of pocket prefill, 0 of 3 cells" in result.stdout


def test_no_cluster_there_is_one_sentence(sweep: Path, tmp_path: Path) -> None:
    result = benchmatrix("nodes", "--address", "127.0.0.1:1")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "no Ray cluster can be reached at 127.0.0.1:1" in result.stderr
    result = benchmatrix("run", sweep, "--address", "127.0.0.1:1", "--out", tmp_path / "out")
    assert result.returncode == 2 and "no Ray cluster can be reached at 127.0.0.1:1" in result.stderr
    assert not (tmp_path / "out").exists()


def test_catalogue_tag_and_nodes() -> None:
    assert "sdpa-flash" in (listed := benchmatrix("list").stdout) and "prefill" in listed
    tag = benchmatrix("tag").stdout.strip()
    (node,) = json.loads(benchmatrix("nodes", "--json").stdout)
    assert tag == node["devices"][0]["tag"]


@pytest.mark.slow
def test_doctor_measures_and_gives_reasons() -> None:
    result = benchmatrix("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "yes bf16" in result.stdout
    assert "no  " in result.stdout
    assert "quality.tasks (lm-evaluation-harness)" in result.stdout


def test_run_from_python(sweep: Path, tmp_path: Path) -> None:
    import orchestrator

    overrides = ("rounds=1", "quality=false", "optimizations=[baseline, sdpa-cudnn]")
    finished = orchestrator.run(sweep, out=tmp_path / "out", overrides=overrides)
    assert finished.status == 0
    assert finished.outcomes == {"ok": 1, "unsupported": 1}
    again = orchestrator.run(sweep, out=tmp_path / "out", overrides=overrides)
    assert again.runs == 0 and again.outcomes == finished.outcomes


@pytest.mark.slow
@pytest.mark.parametrize("each", ["false", "true"])
def test_rounds_share_what_was_compiled_or_do_not(sweep: Path, tmp_path: Path, each: str) -> None:
    import orchestrator
    from analysis import load

    overrides = ("quality=false", "optimizations=[compile]", "baseline=compile", f"compile_each_round={each}")
    finished = orchestrator.run(sweep, out=tmp_path / "out", overrides=overrides)
    assert finished.outcomes == {"ok": 1}
    caches = load(tmp_path / "out").sort_values("round")["compile_cache"].tolist()
    assert caches == ["cold", "cold" if each == "true" else "warm"]


@pytest.mark.slow
def test_only_limits_what_is_measured_and_not_the_plan(sweep: Path, tmp_path: Path) -> None:
    import yaml

    import orchestrator
    from analysis import load_plan
    from orchestrator.execute import Options, execute
    from orchestrator.planning import local_tag
    from tasks.probe import probe

    overrides = ("rounds=1", "quality=false", "optimizations=[baseline, bf16, sdpa-cudnn]")
    only = f"hardware={local_tag(probe())},optimization=baseline"
    options = Options(out=tmp_path / "out", overrides=overrides, only=only)
    document = yaml.safe_load(sweep.read_text())
    finished = execute(document, options)
    assert (finished.status, finished.planned, finished.outcomes) == (0, 1, {"ok": 1})
    plan = load_plan(tmp_path / "out")
    assert plan is not None and plan["optimization"].tolist() == ["baseline", "bf16", "sdpa-cudnn"]
    assert "1 ok, 2 missing" in benchmatrix("status", tmp_path / "out").stdout
    with pytest.raises(orchestrator.sweep.SweepError, match="not to a Sweep"):
        orchestrator.run(orchestrator.sweep.make_sweep(document), out=tmp_path / "out", overrides=overrides)


@pytest.fixture
def decoded(tmp_path: Path) -> Path:
    """Rows of two stacks at two lengths of the prompt, as far as the tables need them."""
    import pandas as pd

    rows = [
        {
            "schema_version": 1, "sweep": "tiny", "cell_id": f"{stack}-{tokens}", "baseline_id": f"bf16-{tokens}",
            "group_id": str(tokens), "block_id": f"{tokens}-{number}", "round": number, "result_key": "key-versions",
            "model": "pocket", "optimization": stack, "workload": "decode", "hardware": "cpu", "device_kind": "cpu",
            "workload_point": f"decode[batch_size=1,new_tokens=8,prompt_tokens={tokens}]", "batch_size": 1,
            "sequence_length": tokens, "outcome": "ok", "steady": True, "latency_ms_p50": 1.0, "profile": "quick",
            "throughput_per_s": rate - tokens / 10 + number / 10, "kv_cache_bytes": 1024 * tokens,
            "started_at": f"2026-11-29T10:0{number}:00+00:00", "attempt": 1,
        }
        for stack, rate in (("bf16", 400.0), ("bf16+static-cache", 300.0))
        for tokens in (128, 512)
        for number in range(3)
    ]  # fmt: skip
    (tmp_path / "results" / "rows").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(tmp_path / "results" / "rows" / "part-000000.parquet")
    return tmp_path / "results"


@pytest.mark.parametrize("format_", ["terminal", "md", "csv", "latex", "json"])
@pytest.mark.parametrize(("kind", "text"), [("ladder", "unexplained"), ("growth", "KV B/token|kv_bytes_per_token")])
def test_table_kinds(decoded: Path, kind: str, text: str, format_: str) -> None:
    result = benchmatrix("table", decoded, "--kind", kind, "--format", format_)
    assert (result.returncode, result.stderr) == (0, "")
    assert any(part in result.stdout for part in text.split("|"))


def test_table_against_another_stack(decoded: Path) -> None:
    result = benchmatrix("table", decoded, "--baseline", "bf16+static-cache", "--format", "csv")
    assert (result.returncode, result.stderr) == (0, "")
    lines = list(csv.DictReader(result.stdout.splitlines()))
    assert [line["optimization"] for line in lines] == ["bf16+static-cache", "bf16"] * 2
    assert [line["is_baseline"] for line in lines] == ["True", "False"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--baseline", "bf16+static-cash"), "no cell here has the stack 'bf16+static-cash'; did you mean"),
        (("--baseline", "bf16", "--kind", "ladder"), "the ladder table has no baseline"),
        (("--baseline", "bf16", "--kind", "growth"), "the growth table has no baseline"),
    ],
)
def test_table_against_what_is_not_there(decoded: Path, arguments: tuple[str, ...], message: str) -> None:
    result = benchmatrix("table", decoded, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_table_growth_needs_two_lengths(decoded: Path) -> None:
    import pandas as pd

    part = decoded / "rows" / "part-000000.parquet"
    frame = pd.read_parquet(part)
    frame[frame["sequence_length"] == 128].to_parquet(part)
    result = benchmatrix("table", decoded, "--kind", "growth")
    assert result.returncode == 2 and result.stdout == ""
    assert "two or more prompt_tokens" in result.stderr
