"""What every metric promises: exactly its columns, of their types, or `Missing` with a reason; never a silent zero."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.metric import Metric, Missing, Phase
from tasks.metrics import memory
from tasks.registry import metric_classes, optimizations, workloads
from tasks.row import _PYTHON, Row, columns

NAMES = sorted(metric_classes())
# Columns in which zero is a count, a share or a difference that was measured as nothing.
MAY_BE_ZERO = {
    "parameters_trainable", "outliers_mild", "outliers_severe", "allocation_retries", "graph_pool_bytes",
    "fragmentation", "non_torch_bytes", "latency_ms_std", "latency_halfwidth", "perplexity_log_ratio",
    "perplexity_log_ratio_stderr", "kl_divergence", "kl_divergence_stderr", "kl_divergence_max",
    "kl_divergence_floor", "top1_agreement", "top1_agreement_stderr", "top5_agreement", "accuracy",
    "accuracy_stderr", "quality_choices", "accuracy_per_token", "accuracy_difference", "accuracy_difference_stderr",
    "accuracy_floor", "perplexity_log_ratio_floor", "top1_agreement_floor", "graph_breaks", "recompilations",
    "offload_bytes_per_pass", "offload_bytes_per_token", "device_fraction", "optimizer_steps_skipped",
    "optimizer_paged_bytes",
    "superfluous_steps", "kv_cache_host_bytes", "stop_check_ms", "stop_check_wait_ms", "stop_check_hidden_share",
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(workloads()))
def measured(request: pytest.FixtureRequest, bench: Any) -> Iterator[tuple[Any, dict[str, Metric]]]:
    """A session of each workload after all its passes."""
    with bench.measured(bench.job(bench.cell(request.param), profile=bench.INSTANT)) as found:
        yield found


@pytest.fixture(scope="module")
def unmeasured(bench: Any) -> Iterator[Any]:
    """A session that was not even loaded, as after an early failure."""
    import torch

    from tasks.session import Session

    yield Session(job=bench.job(bench.cell("prefill")), device=torch.device("cpu"), row=Row())


def allowed(metric: Metric) -> set[str]:
    ends = {f"{c.name}{end}" for c in metric.columns if c.interval for end in ("_lo", "_hi", "_n")}
    return {column.name for column in metric.columns} | ends


def check(metric: Metric, values: dict[str, Any]) -> None:
    declared = {column.name for column in metric.columns}
    assert declared <= values.keys() <= allowed(metric)
    table = columns()
    for name, value in values.items():
        if isinstance(value, Missing):
            assert value.reason, name
            assert "\n" not in value.reason
            continue
        assert value is not None, f"{name}: null needs a reason, use Missing"
        assert isinstance(value, _PYTHON[table[name].type]), name
        assert isinstance(value, bool) == (table[name].type == "bool"), name
        assert value != 0 or name in MAY_BE_ZERO, f"{name} is 0 where it means not measured"


@pytest.mark.parametrize("name", NAMES)
class TestMetric:
    def test_declaration(self, name: str) -> None:
        metric = metric_classes()[name]
        assert metric.name == name
        assert metric.columns
        for column in metric.columns:
            assert column.doc
            assert column.type in _PYTHON
            assert not column.interval or column.type == "float"

    def test_after_all_passes(self, measured: Any, name: str) -> None:
        session, metrics = measured
        check(metrics[name], metrics[name].collect(session))
        Row().set(**metrics[name].collect(session))

    def test_before_anything(self, unmeasured: Any, name: str) -> None:
        """After a failure at the very start everything is missing, nothing raises, and nothing is made up."""
        metric = metric_classes()[name]()
        values = metric.collect(unmeasured)
        check(metric, values)
        assert all(isinstance(value, Missing) for value in values.values()), values


class TestValues:
    """What the metrics must say about sessions whose truth is known."""

    def test_latency_and_throughput_agree(self, measured: Any) -> None:
        session, metrics = measured
        row = metrics["latency"].collect(session) | metrics["throughput"].collect(session)
        primary = session.timings.values("latency", session.step.primary)
        assert row["latency_ms_p50"] == pytest.approx(sorted(primary)[len(primary) // 2], rel=0.5)
        assert row["latency_ms_min"] <= row["latency_ms_p50"] <= row["latency_ms_max"]
        assert row["throughput_unit"] == session.step.unit

    def test_request_is_the_sum_of_its_parts(self, measured: Any) -> None:
        session, metrics = measured
        row = metrics["latency"].collect(session)
        if session.job.cell.workload.kind != "decode":
            assert isinstance(row["request_ms"], Missing)
            return
        first = session.timings.values("latency", "first_token")
        tokens = session.timings.values("latency", "token")
        assert len(tokens) == len(first) * (session.job.cell.workload["new_tokens"] - 1)
        assert row["request_ms"] * len(first) == pytest.approx(sum(first) + sum(tokens))

    def test_parameters(self, measured: Any) -> None:
        session, metrics = measured
        row = metrics["parameters"].collect(session)
        if session.model is None:
            assert isinstance(row["parameters_total"], Missing)
            return
        total = sum(parameter.numel() for parameter in session.model.parameters())
        assert row["parameters_total"] == total
        assert row["parameters_trainable"] == (total if session.workload.training else 0)
        assert row["model_bytes"] >= 4 * total

    def test_cache_bytes(self, measured: Any) -> None:
        session, metrics = measured
        row = metrics["memory"].collect(session)
        point = session.job.cell.workload
        if point.kind != "decode":
            assert isinstance(row["kv_cache_bytes"], Missing)
            return
        # keys and values x layers x heads x head size x 4 bytes; the last token is never fed back
        per_token = 2 * 2 * 2 * 16 * 4
        cached = point["prompt_tokens"] + point["new_tokens"] - 1
        assert row["kv_cache_bytes"] == point["batch_size"] * cached * per_token

    def test_host_memory_is_this_process(self, measured: Any) -> None:
        import psutil

        session, metrics = measured
        peak = metrics["memory"].collect(session)["peak_host_bytes"]
        assert isinstance(peak, int)
        assert 0.5 < peak / psutil.Process().memory_info().rss < 2

    def test_nothing_of_a_gpu_on_a_cpu(self, measured: Any) -> None:
        session, metrics = measured
        row = metrics["memory"].collect(session) | metrics["latency"].collect(session)
        for name in ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "fragmentation", "device_ms_p50"):
            assert isinstance(row[name], Missing)


@pytest.mark.parametrize(("before", "after"), [(600, 1300), (None, 1300), (600, None)])
def test_memory_of_a_runtime_that_allocates_for_itself(
    monkeypatch: pytest.MonkeyPatch, before: int | None, after: int | None
) -> None:
    """PyTorch's allocator sees its inputs and outputs only: their bytes are not the model's."""
    row = Row()
    session: Any = SimpleNamespace(
        on_cuda=True, loaded=object(), row=row, step=SimpleNamespace(waiting_bytes=50),
        techniques=[(optimizations()["onnx"], None)], gpu=SimpleNamespace(process_memory_bytes=lambda pid: after),
    )  # fmt: skip
    monkeypatch.setattr(memory, "_context_bytes", lambda session: before)
    metric = memory.Memory()
    for phase in (Phase.LOAD, Phase.FIRST_CALL, Phase.WARMUP, Phase.LATENCY, Phase.THROUGHPUT):
        metric.begin(phase, session)
        metric.end(phase, session)
    found = metric.collect(session)
    check(metric, found)
    if before and after:
        assert (found["runtime_bytes"], found["peak_process_bytes"]) == (650, 1300)
        assert row["flags"] == ["memory_of_process"]
    else:
        assert found["runtime_bytes"].reason == "pid_not_visible"
        assert after is None or found["peak_process_bytes"] == after
        assert row["flags"] == []
    for name in ("allocated_bytes", "peak_allocated_bytes", "peak_allocated_bytes_load", "reserved_bytes"):
        assert "onnxruntime allocates for itself" in found[name].reason
    assert found["peak_host_bytes"] > 0


def test_percentiles_need_samples(bench: Any) -> None:
    from tasks.metrics.latency import _percentile

    few, many = [1.0] * 129, [float(i) for i in range(662)]
    assert isinstance(_percentile(few, 95, 1), Missing)
    assert isinstance(_percentile(few, 99, 1), Missing)
    assert _percentile(many, 95, 1) == pytest.approx(0.95 * 661)
    assert _percentile(many, 99, 1) == pytest.approx(0.99 * 661)
    assert isinstance(_percentile(many, 95, 8), Missing), "block means have no tail"
