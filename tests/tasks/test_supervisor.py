"""Whole cells through a supervisor: the row's promises about time, reasons for nulls, evidence and outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tasks.device import DeviceInfo
from tasks.job import RunResult
from tasks.registry import workloads
from tasks.row import IDENTITY, Row, columns
from tasks.supervisor import TIME_COLUMNS, Supervisor

# One cell for each workload, with techniques that leave evidence.
CELLS = {
    "prefill": "bf16+sdpa-math",
    "decode": "fp32+static-cache",
    "forward": "fp32",
    "train_step": "fp16",
    "attention": "fp32+eager",
}
# Null here means "has no such thing" (kernels have no model, prefill no new tokens) or "nothing went wrong".
NULL_WHERE_MEANINGLESS = {column.name for column in IDENTITY} | {"reason", "error_type"}


def optional(name: str) -> bool:
    """Interval columns may be added by a metric, none has to."""
    base, _, end = name.rpartition("_")
    return end in ("lo", "hi", "n") and base in columns()


@pytest.fixture(scope="module")
def results(supervisor: Supervisor, bench: Any) -> dict[str, RunResult]:
    """Each workload measured once, isolated, in the profile quick."""
    return {
        kind: supervisor.measure(
            bench.job(bench.cell(kind, stack), ceilings={"fp32_flop_per_s": 1e15, "bf16_flop_per_s": 1e15})
        )
        for kind, stack in CELLS.items()
    }


def test_every_workload_is_measured_here() -> None:
    assert CELLS.keys() == workloads().keys()


@pytest.mark.parametrize("kind", CELLS)
class TestGoodRow:
    def test_is_ok(self, results: dict[str, RunResult], kind: str) -> None:
        row = results[kind].row
        assert row["outcome"] == "ok", row.get("reason")
        assert "reason" not in row
        assert row["invalid_reasons"] == []
        Row.from_dict(row)
        json.dumps(row, allow_nan=False)

    def test_times_add_up(self, results: dict[str, RunResult], kind: str) -> None:
        row = results[kind].row
        parts = [row.get(name) or 0.0 for name in (*TIME_COLUMNS, "overhead_s")]
        assert sum(parts) == pytest.approx(row["wall_s"], rel=0.02)
        assert all(part >= 0 for part in parts)
        assert row["overhead_s"] < 0.75 * row["wall_s"]

    def test_every_null_has_a_reason(self, results: dict[str, RunResult], kind: str) -> None:
        row = results[kind].row
        reasons = json.loads(row["null_reasons"])
        null = {name for name in columns() if row.get(name) is None}
        unexplained = {name for name in null - NULL_WHERE_MEANINGLESS - reasons.keys() if not optional(name)}
        assert unexplained == set()
        assert "*" not in reasons
        assert not reasons.keys() - null, "a reason only where there is null"
        assert all(reasons.values())

    def test_evidence_is_kept(self, results: dict[str, RunResult], kind: str) -> None:
        evidence = json.loads(results[kind].row["evidence"])
        assert list(evidence) == CELLS[kind].split("+")
        assert all(facts["ok"] and len(facts) > 1 for facts in evidence.values())

    def test_samples_are_raw(self, results: dict[str, RunResult], kind: str) -> None:
        result = results[kind]
        latency = next(
            series for series in result.samples
            if (series["measured_in"], series["label"]) == ("latency", "token" if kind == "decode" else "call")
        )  # fmt: skip
        assert len(latency["values_ms"]) == len(latency["ended_s"]) == result.row["samples"]
        assert min(latency["values_ms"]) == result.row["latency_ms_min"]
        assert max(latency["values_ms"]) == result.row["latency_ms_max"]
        assert latency["ended_s"] == sorted(latency["ended_s"])
        assert {series["measured_in"] for series in result.samples} == {"warmup", "latency"}
        assert {series["cell_id"] for series in result.samples} == {result.row["cell_id"]}


class TestRows:
    def test_identity(self, results: dict[str, RunResult], bench: Any) -> None:
        row = results["decode"].row
        cell = bench.cell("decode", CELLS["decode"])
        assert (row["cell_id"], row["group_id"], row["baseline_id"]) == (cell.cell_id, cell.group_id, cell.baseline_id)
        assert (row["batch_size"], row["sequence_length"], row["new_tokens"]) == (2, 32, 32)
        assert (row["weights"], row["model_source"]) == ("random", "random")
        kernel = results["attention"].row
        assert kernel["model"] == "none"
        assert "model_source" not in kernel

    def test_settings_are_read_back(self, results: dict[str, RunResult]) -> None:
        row = results["prefill"].row
        assert row["threads"] == 1
        assert row["process_kind"] == "fork"
        assert row["device_kind"] == "cpu"
        assert json.loads(row["environment"])["torch"]["matmul_precision"] == "highest"

    def test_flops_above_the_ceiling_are_invalid(self, supervisor: Supervisor, bench: Any) -> None:
        """A planted impossible figure: a device that multiplies a thousand numbers a second."""
        job = bench.job(bench.cell("attention", "fp32"), ceilings={"fp32_flop_per_s": 1e3})
        row = supervisor.measure(job).row
        assert row["outcome"] == "invalid"
        assert any("ceiling" in reason for reason in row["invalid_reasons"])
        assert row["latency_ms_p50"] > 0, "what was measured is kept"

    def test_wrong_label_is_invalid(self, supervisor: Supervisor, bench: Any) -> None:
        """A factory's module that ignores what was asked of its attention."""
        model, path = bench.factory(
            "import torch\n"
            "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
            "class Stubborn(torch.nn.Module):\n"
            "    def forward(self, x):\n"
            "        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):\n"
            "            return torch.nn.functional.scaled_dot_product_attention(x, x, x)\n"
            "def make():\n"
            "    return Stubborn(), lambda batch, device, seed: torch.ones(batch, 2, 8, 4, device=device)\n"
        )
        job = bench.job(bench.cell("forward", "sdpa-math", model), search_path=path)
        row = supervisor.measure(job).row
        assert (row["outcome"], row["invalid_reasons"]) == ("invalid", ["evidence_missing:sdpa-math"])
        assert row["reason"] == "evidence_missing:sdpa-math"
        assert row["throughput_per_s"] > 0

    @pytest.mark.parametrize("stack", ["fp32+eager", "fp32+sdpa-flash"])
    def test_attention_of_a_module_without_is_unsupported(self, supervisor: Supervisor, bench: Any, stack: str) -> None:
        model, path = bench.factory(
            "import torch\n"
            "def make():\n"
            "    return torch.nn.Linear(4, 4), lambda batch, device, seed: torch.ones(batch, 4, device=device)\n"
        )
        row = supervisor.measure(bench.job(bench.cell("forward", stack, model), search_path=path)).row
        assert row["outcome"] == "unsupported"
        assert f"the module of {model.id} does not" in row["reason"]
        assert row["invalid_reasons"] == []

    def test_weights_unchanged_is_invalid(self, supervisor: Supervisor, bench: Any) -> None:
        """Training whose loss does not depend on the weights."""
        model, path = bench.factory(
            "import torch\n"
            "class Stuck(torch.nn.Linear):\n"
            "    pass\n"
            "def make():\n"
            "    def inputs(batch, device, seed):\n"
            "        return torch.ones(batch, 4, device=device)\n"
            "    model = torch.nn.Linear(4, 4)\n"
            "    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)\n"
            "    return model, inputs, lambda model, x: (model(x) * 0).sum()\n"
        )
        row = supervisor.measure(bench.job(bench.cell("train_step", "fp32", model), search_path=path)).row
        assert row["outcome"] == "invalid"
        assert "weights_unchanged" in row["invalid_reasons"]

    def test_recompilation_while_measuring_is_invalid(self, supervisor: Supervisor, bench: Any) -> None:
        """Where calls are timed (Python collects no garbage then), the input changes its type: Dynamo traces again."""
        model, path = bench.factory(
            "import gc, time, torch\n"
            "class Changing(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.double = torch.compile(lambda x: x * 2, backend='eager')\n"
            "    def forward(self, x):\n"
            "        time.sleep(0.002)\n"
            "        return self.double(x if gc.isenabled() else x.double())\n"
            "def make():\n"
            "    return Changing(), lambda batch, device, seed: torch.ones(batch, 4, device=device)\n"
        )
        row = supervisor.measure(bench.job(bench.cell("forward", model=model), search_path=path)).row
        assert row["outcome"] == "invalid", row.get("reason")
        assert row["invalid_reasons"] == ["recompiled_in_window"]
        assert row["graphs_compiled"] == 1

    def test_quality_once_per_cell(self, supervisor: Supervisor, bench: Any) -> None:
        job = bench.job(
            bench.cell("prefill", "bf16", bench.POCKET), quality=True, quality_tokens=512, quality_choices=5
        )
        row = supervisor.measure(job).row
        assert row["outcome"] == "ok", row.get("reason")
        assert 5 < row["perplexity"] < 500
        assert 0 < row["kl_divergence"] < 0.05
        assert row["kl_divergence_floor"] < row["kl_divergence"]
        assert row["quality_s"] > 0
        assert row["quality_choices"] == 5
        parts = [row.get(name) or 0.0 for name in (*TIME_COLUMNS, "overhead_s")]
        assert sum(parts) == pytest.approx(row["wall_s"], rel=0.02)


class TestFacts:
    @pytest.fixture(scope="class")
    @classmethod
    def facts(cls, supervisor: Supervisor) -> dict[str, Any]:
        return supervisor.facts()

    def test_ceilings_are_plausible(self, facts: dict[str, Any]) -> None:
        ceilings = facts["ceilings"]
        assert {"copy_bytes_per_s", "read_bytes_per_s", "fp32_flop_per_s"} <= ceilings.keys()
        assert ceilings["read_bytes_per_s"] >= ceilings["copy_bytes_per_s"] > 1e8
        assert 1e9 < ceilings["fp32_flop_per_s"] < 1e14

    def test_a_cpu_has_no_idle_power(self, facts: dict[str, Any]) -> None:
        assert facts["idle_power_w"] is None
        assert "a GPU" in facts["idle_power_missing"]


def test_device_decides_what_the_process_sees(bench: Any, tmp_path: Any) -> None:
    def visible(device: DeviceInfo) -> str | None:
        slot = Supervisor(device, cpus=(), log_path=tmp_path / "log", work_dir=tmp_path / "work")
        seen = slot._isolation._base_environment.get("CUDA_VISIBLE_DEVICES")
        slot.close()
        return seen

    assert visible(bench.device("cpu")) == ""
    assert visible(bench.device("cuda", uuid="GPU-42")) == "GPU-42"


@pytest.fixture(autouse=True)
def _no_leftovers(supervisor: Supervisor) -> Iterator[None]:
    """After every cell the slot's work folder is empty again."""
    yield
    assert list(supervisor._isolation._work.iterdir()) == []
