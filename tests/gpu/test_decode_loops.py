"""Decode loops, captured steps, caches and allocator settings on a real card: same tokens, and evidence that holds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.optimization import Evidence
from tasks.optimizations.mapped_flag import device_view
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

AXES = {"batch_size": 4, "prompt_tokens": 16, "new_tokens": 24}
STOP = {"stop": "eos", "shortest": 0.25, "longest": 0.75}
CHECKS = ["sync-check", "sync-check:every=4", "interleaved", "mapped-flag"]
GPT2 = ModelSpec(id="random:gpt2", source="random", reference="gpt2", kind="language")


@pytest.fixture(scope="module")
def slot(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    folder = tmp_path_factory.mktemp("slot")
    supervisor = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    supervisor.start()
    yield supervisor
    supervisor.close()


@pytest.fixture(scope="module")
def measure(slot: Supervisor, card: DeviceInfo, bench: Any) -> Callable[..., dict[str, Any]]:
    def run(stack: str, model: ModelSpec | None = None, **axes: Any) -> dict[str, Any]:
        cell = replace(bench.cell("decode", stack, model or bench.POCKET, **{**AXES, **axes}), hardware=card.tag)
        refusal = unsupported(cell, card)
        if refusal:
            pytest.skip(refusal)
        row = slot.measure(bench.job(cell, device=card, timeout_s=240.0)).row
        assert row["outcome"] == "ok", (row.get("reason"), row["evidence"])
        return row

    return run


def live(bench: Any, card: DeviceInfo, stack: str, *, applied: str | None = None, calls: int = 2, **axes: Any) -> Any:
    job = bench.job(bench.cell("decode", stack, bench.POCKET, **{**AXES, **axes}), device=card)
    return bench.live(job, applied=applied, calls=calls)


def tokens_of(bench: Any, card: DeviceInfo, stack: str, **axes: Any) -> list[Any]:
    """Tokens of three requests, the first one again at the end."""
    found = []
    with live(bench, card, stack, **axes) as session:
        for index in (0, 1, 0):
            session.step.run(index, lambda _label: None)
            torch.cuda.synchronize()
            assert session.step.problems() == []
            found.append(session.step.ledger.result().cpu())
    assert found[0].equal(found[2])
    return found


def proof(name: str, session: Any) -> Evidence:
    chosen = parse_stack(name).techniques[-1]
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.mark.usefixtures("torch_settings")
class TestSameTokens:
    @pytest.mark.parametrize("sampling", ["greedy", "multinomial"])
    @pytest.mark.parametrize("stop", [{}, STOP])
    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("graph", ["", "+cuda-graph"])
    def test_as_the_plain_loop(
        self, bench: Any, card: DeviceInfo, graph: str, check: str, stop: dict[str, Any], sampling: str
    ) -> None:
        axes = {**stop, "sampling": sampling}
        plain = tokens_of(bench, card, "fp32+static-cache", **axes)
        looking = tokens_of(bench, card, f"fp32+static-cache{graph}+{check}", **axes)
        assert all(a.equal(b) for a, b in zip(plain, looking, strict=True))

    @pytest.mark.parametrize(
        "stack",
        [
            "static-cache+compile+cuda-graph",
            "static-cache+compile+cuda-graph+mapped-flag",
            "static-cache+compile:mode=reduce-overhead+interleaved",
            "dynamic-cache+interleaved",
            "no-cache+sync-check",
            "offloaded-cache",
        ],
    )
    def test_greedy_whatever_computes_it(self, bench: Any, card: DeviceInfo, stack: str) -> None:
        plain = tokens_of(bench, card, "fp32+dynamic-cache", **STOP)
        assert all(a.equal(b) for a, b in zip(plain, tokens_of(bench, card, f"fp32+{stack}", **STOP), strict=True))

    @pytest.mark.parametrize("stack", ["offloaded-cache", "dynamic-cache+interleaved"])
    def test_on_a_device_that_is_behind(self, bench: Any, card: DeviceInfo, stack: str) -> None:
        """Where the host is far ahead, nothing may be read before it is there."""
        found = []
        for item in ("dynamic-cache", stack):
            with live(bench, card, f"fp32+{item}", **STOP) as session:
                session.model.register_forward_pre_hook(lambda *_: torch.cuda._sleep(40_000_000))
                session.step.run(0, lambda _label: None)
                found.append(session.step.ledger.result().cpu())
        assert found[0].equal(found[1])


@pytest.mark.usefixtures("torch_settings")
class TestEvidence:
    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("graph", ["", "+cuda-graph"])
    def test_of_checks(self, bench: Any, card: DeviceInfo, graph: str, check: str) -> None:
        stack = f"static-cache{graph}+{check}"
        with live(bench, card, stack, **STOP) as session:
            evidence = proof(check, session)
            assert evidence.ok, evidence.facts
            if graph:
                evidence = proof("cuda-graph", session)
                assert evidence.ok, evidence.facts

    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            ("interleaved", "static-cache+sync-check"),
            ("interleaved", "static-cache+mapped-flag"),
            ("interleaved", "static-cache"),
            ("mapped-flag", "static-cache+interleaved"),
            ("mapped-flag", "static-cache+sync-check"),
            ("mapped-flag", "static-cache"),
            ("cuda-graph", "static-cache"),
            ("cuda-graph", "static-cache+sync-check"),
            ("offloaded-cache", "dynamic-cache"),
            ("dynamic-cache", "offloaded-cache"),
            ("static-cache", "offloaded-cache"),
            ("expandable-segments", "static-cache"),
        ],
    )
    def test_pretenders_are_caught(self, bench: Any, card: DeviceInfo, name: str, applied: str) -> None:
        stack = name if name.endswith("-cache") else f"static-cache+{name}"
        with live(bench, card, stack, applied=applied, **STOP) as session:
            evidence = proof(name, session)
        assert not evidence.ok, evidence.facts
        assert evidence.facts

    def test_attention_is_heard_beside_a_graph(self, bench: Any, card: DeviceInfo) -> None:
        """Listeners hear nothing from inside a graph: the step itself is run for them."""
        with live(bench, card, "fp32+sdpa-math+static-cache+cuda-graph") as session:
            evidence = proof("sdpa-math", session)
            assert evidence.ok, evidence.facts
            assert proof("cuda-graph", session).ok, "the graph is still there"


@pytest.mark.usefixtures("torch_settings")
class TestNoSynchronisation:
    @pytest.mark.parametrize("sampling", ["greedy", "multinomial"])
    @pytest.mark.parametrize("stack", ["static-cache+cuda-graph", "static-cache+cuda-graph+mapped-flag"])
    def test_between_steps(self, bench: Any, card: DeviceInfo, stack: str, sampling: str) -> None:
        """Torch raises at any operation of its own that waits for the device; polling a mapped flag is none."""
        with live(bench, card, stack, sampling=sampling, **STOP) as session:
            step = session.step
            step.run(0, lambda _label: None)
            torch.cuda.synchronize()

            def mark(label: str) -> None:
                # the prompt may ask: a step may not
                torch.cuda.set_sync_debug_mode("error" if label in ("first_token", "token") else "default")

            try:
                step.run(0, mark)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert step.problems() == []

    def test_naive_check_does_wait(self, bench: Any, card: DeviceInfo) -> None:
        with live(bench, card, "static-cache+cuda-graph+sync-check", **STOP) as session:
            try:
                torch.cuda.set_sync_debug_mode("error")
                with pytest.raises(RuntimeError, match="synchroniz"):
                    session.step.check.issued(0)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_mapped_memory_is_seen_without_a_synchronisation(card: DeviceInfo) -> None:
    host = torch.zeros(4, dtype=torch.long, pin_memory=True)
    view = device_view(host)
    assert view.is_cuda
    view.index_fill_(0, torch.tensor([2], device="cuda"), 7)
    deadline = time.monotonic() + 2
    while int(host.numpy()[2]) != 7 and time.monotonic() < deadline:
        pass
    assert host.tolist() == [0, 0, 7, 0]


class TestRows:
    @pytest.mark.parametrize("check", CHECKS)
    def test_what_a_check_costs(self, measure: Callable[..., dict[str, Any]], check: str) -> None:
        row = measure(f"bf16+static-cache+cuda-graph+{check}", **STOP)
        needed = 18 - 1  # the longest sequence has three quarters of 24 tokens; its first one is the prompt's
        superfluous = {"sync-check": 0, "sync-check:every=4": 3}.get(check, 1)
        assert (row["decode_steps"], row["superfluous_steps"]) == (needed + superfluous, superfluous)
        assert row["stop_check_ms"] is not None
        assert row["stop_check_wait_ms"] > 0
        reasons = json.loads(row["null_reasons"])
        if row.get("stop_check_hidden_share") is None:
            assert "the naive check costs" in reasons["stop_check_hidden_share"]
        elif check == "sync-check":
            assert abs(row["stop_check_hidden_share"]) < 0.5, "the naive check hides nothing from itself"
        assert row["request_ms_min"] <= row["request_ms_mean"] <= row["request_ms_max"]

    def test_expandable_segments(self, measure: Callable[..., dict[str, Any]]) -> None:
        row = measure("bf16+dynamic-cache+expandable-segments")
        facts = json.loads(row["evidence"])["expandable-segments"]
        assert facts["expandable"] == facts["segments"] > 0

    def test_expandable_segments_with_a_graph(self, measure: Callable[..., dict[str, Any]]) -> None:
        measure("bf16+static-cache+expandable-segments+compile+cuda-graph+mapped-flag", **STOP)

    def test_offloaded_cache_is_on_the_host(self, measure: Callable[..., dict[str, Any]], bench: Any) -> None:
        axes = {"batch_size": 8, "prompt_tokens": 900, "new_tokens": 8}
        rows = {s: measure(f"bf16+{s}", GPT2, **axes) for s in ("dynamic-cache", "offloaded-cache")}
        for row in rows.values():
            # keys and values x layers x width x 2 bytes
            assert row["kv_cache_bytes"] == 2 * 12 * 768 * 2 * 8 * 907
            assert row["kv_cache_bytes_per_token"] == pytest.approx(2 * 12 * 768 * 2)
        assert rows["dynamic-cache"]["kv_cache_host_bytes"] == 0
        assert rows["offloaded-cache"]["kv_cache_host_bytes"] >= 10 / 12 * rows["offloaded-cache"]["kv_cache_bytes"]
        assert rows["offloaded-cache"]["peak_allocated_bytes"] < rows["dynamic-cache"]["peak_allocated_bytes"]

    @pytest.mark.parametrize("options", ["", ":bits=2", ":backend=hqq", ":backend=hqq,bits=8"])
    def test_quantized_cache(self, measure: Callable[..., dict[str, Any]], options: str) -> None:
        row = measure(f"bf16+quantized-cache{options}", prompt_tokens=200)
        plain = measure("bf16+dynamic-cache", prompt_tokens=200)
        assert row["kv_cache_bytes"] < 0.75 * plain["kv_cache_bytes"]

    def test_graph_of_the_whole_step_is_faster(self, measure: Callable[..., dict[str, Any]]) -> None:
        """GPT-2 at batch 32 waits for the host when every kernel is launched by itself."""
        axes = {"batch_size": 32, "new_tokens": 64}
        eager, graph = (measure(f"bf16+static-cache{graph}", GPT2, **axes) for graph in ("", "+compile+cuda-graph"))
        assert graph["throughput_per_s"] > 2 * eager["throughput_per_s"]
        assert graph["issue_share"] < eager["issue_share"]
