"""On a real card: every technique's evidence, out of memory and after, memory of compressed weights, NVML, ceilings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.optimization import Evidence
from tasks.registry import optimizations
from tasks.row import IDENTITY, columns
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import TIME_COLUMNS, Supervisor

# Warnings are shown and no errors here: drivers, cards and versions differ from those that the other tests run on.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30

# Large enough that weights dominate the allocator's rounding: 67 million parameters in the blocks.
MEDIUM_LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def slot(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """One supervisor for the whole module: what one cell does must not harm the next."""
    folder = tmp_path_factory.mktemp("slot")
    supervisor = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    supervisor.start()
    yield supervisor
    supervisor.close()


@pytest.fixture(scope="module")
def measure(slot: Supervisor, card: DeviceInfo, bench: Any) -> Callable[..., dict[str, Any]]:
    """The row of one cell on the card."""

    def run(kind: str, stack: str = "baseline", model: ModelSpec | None = None, *, job: Any = None, **axes: Any) -> Any:
        # the tag must be the card's: a row whose tag disagrees with its device is invalid
        cell = replace(bench.cell(kind, stack, model, **axes), hardware=card.tag)
        return slot.measure(bench.job(cell, device=card, timeout_s=240.0, **(job or {}))).row

    return run


@pytest.fixture(scope="module")
def medium(bench: Any) -> ModelSpec:
    return bench.random_model("medium-llama", MEDIUM_LLAMA, "language")  # type: ignore[no-any-return]


def used_bytes(card: DeviceInfo) -> int:
    from tasks.nvml import open_gpu

    used = open_gpu(card.uuid).memory_used_bytes()
    assert used is not None
    return used


def settles_at(card: DeviceInfo, before: int, within_s: float = 10.0) -> int:
    """Bytes in use above `before`, once the driver has had time to take them back."""
    deadline = time.monotonic() + within_s
    while abs(used_bytes(card) - before) > 64 * MIB and time.monotonic() < deadline:
        time.sleep(0.2)
    return used_bytes(card) - before


# ---- techniques -----------------------------------------------------------------------------------------------------

HALF = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "ao-int4", "ao-fp8", "sparse-2-4")


def stacks() -> list[tuple[str, str]]:
    """(workload, stack) in which each technique must prove itself; attention in training too."""
    found = []
    for name, technique in optimizations().items():
        kind = technique.needs.workloads[0] if technique.needs.workloads else "prefill"
        if kind == "train_step":
            continue  # in test_training.py, on a model that has something to save
        prefix = "bf16+" if name in HALF else ""
        options = [f":{key}={value}" for key, values in technique.choices.items() for value in values]
        found += [(kind, f"{prefix}{name}{option}") for option in options or [""]]
        if technique.family in ("attention", "precision"):
            found += [("train_step", f"{prefix}{name}"), ("attention", f"{prefix}{name}")]
    return found


@pytest.mark.parametrize(("kind", "stack"), stacks())
def test_technique_takes_effect(
    measure: Callable[..., dict[str, Any]], bench: Any, card: DeviceInfo, kind: str, stack: str
) -> None:
    refusal = unsupported(bench.cell(kind, stack), card)
    if refusal:
        pytest.skip(refusal)
    row = measure(kind, stack, batch_size=2)
    assert row["outcome"] == "ok", row.get("reason")
    evidence = json.loads(row["evidence"])
    assert len(evidence) == len(parse_stack(stack).techniques)
    assert all(facts["ok"] for facts in evidence.values()), evidence
    if "compile" in stack:
        assert row["graphs_compiled"] > 0
    if stack.endswith(("reduce-overhead", "max-autotune")):
        assert evidence[stack]["cuda_graph_launches"] > 0


def proof(name: str, session: Any) -> Evidence:
    stack = parse_stack(name)
    return optimizations()[stack.names()[0]].evidence(stack.techniques[0], session)


@pytest.mark.usefixtures("torch_settings")
class TestPretenders:
    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            ("tf32", "fp32"),
            ("fp32", "tf32"),
            ("tf32", "bf16"),
            ("bf16", "fp16"),
            ("sdpa-flash", "bf16+sdpa-math"),
            ("sdpa-flash", "bf16+sdpa-efficient"),
            ("sdpa-efficient", "bf16+sdpa-flash"),
            ("sdpa-math", "bf16+sdpa-flash"),
            ("sdpa-math", "bf16+eager"),
            ("eager", "bf16+sdpa-math"),
            ("compile:mode=reduce-overhead", "compile"),
            ("compile", "baseline"),
            ("static-cache", "dynamic-cache"),
        ],
    )
    def test_is_caught(self, bench: Any, card: DeviceInfo, name: str, applied: str) -> None:
        kind = "decode" if "cache" in name else "prefill"
        with bench.live(bench.job(bench.cell(kind, name), device=card), applied=applied, calls=4) as session:
            evidence = proof(name, session)
        assert not evidence.ok, evidence.facts


@pytest.mark.usefixtures("torch_settings")
class TestDecode:
    @pytest.mark.parametrize(
        "stack",
        [
            "fp32+dynamic-cache",
            "fp32+static-cache",
            "fp32+no-cache",
            "fp32+static-cache+compile",
            "fp32+static-cache+compile:mode=reduce-overhead",
        ],
    )
    def test_same_tokens_as_eager(self, bench: Any, card: DeviceInfo, stack: str) -> None:
        tokens = []
        for variant in ("fp32+eager", stack):
            job = bench.job(bench.cell("decode", variant, bench.POCKET, new_tokens=16), device=card)
            with bench.live(job, calls=4) as session:
                assert session.step.problems() == []
                tokens.append(session.step.tokens.cpu().clone())
        assert tokens[0].equal(tokens[1])

    def test_graphs_are_launched(self, measure: Callable[..., dict[str, Any]], bench: Any) -> None:
        row = measure("decode", "bf16+static-cache+compile:mode=reduce-overhead", bench.POCKET)
        assert row["outcome"] == "ok", row.get("reason")
        evidence = json.loads(row["evidence"])["compile:mode=reduce-overhead"]
        assert evidence["cuda_graph_launches"] >= 2, "one for each further token of the short request"
        assert row["graph_pool_bytes"] > 0


# ---- memory ---------------------------------------------------------------------------------------------------------

GREEDY = """
import os, torch
class Net(torch.nn.Linear):
    def forward(self, x):
        {body}
        return super().forward(x)
def make():
    return Net(4, 4), lambda batch, device, seed: torch.ones(batch, 4, device=device)
"""


class TestOutOfMemory:
    def fault(self, bench: Any, body: str) -> tuple[ModelSpec, dict[str, Any]]:
        model, path = bench.factory(GREEDY.format(body=body))
        return model, {"search_path": path}

    def healthy(self, measure: Callable[..., dict[str, Any]]) -> None:
        row = measure("prefill", "bf16")
        assert row["outcome"] == "ok", row.get("reason")

    def test_ten_times_the_device(self, measure: Callable[..., dict[str, Any]], bench: Any, card: DeviceInfo) -> None:
        before = used_bytes(card)
        model, job = self.fault(bench, f"torch.empty({10 * card.memory_bytes}, dtype=torch.uint8, device='cuda')")
        row = measure("forward", model=model, job=job)
        assert row["outcome"] == "oom", row.get("reason")
        assert row["error_type"] == "OutOfMemoryError"
        assert "Tried to allocate" in row["reason"]
        assert row["peak_allocated_bytes"] > 0, "how far it came"
        assert settles_at(card, before) <= 64 * MIB
        self.healthy(measure)
        assert settles_at(card, before) <= 64 * MIB

    def test_beyond_its_budget(self, measure: Callable[..., dict[str, Any]], bench: Any, card: DeviceInfo) -> None:
        before = used_bytes(card)
        model, job = self.fault(bench, f"torch.empty({2 * GIB}, dtype=torch.uint8, device='cuda')")
        row = measure("forward", model=model, job={**job, "memory_budget_bytes": GIB})
        assert row["outcome"] == "oom", row.get("reason")
        assert "2.00 GiB" in row["reason"]
        assert settles_at(card, before) <= 64 * MIB
        self.healthy(measure)

    @pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)"])
    def test_memory_of_the_dead_is_gone(
        self, measure: Callable[..., dict[str, Any]], bench: Any, card: DeviceInfo, end: str
    ) -> None:
        before = used_bytes(card)
        body = f"held = torch.ones({4 * GIB}, dtype=torch.uint8, device='cuda'); torch.cuda.synchronize(); {end}"
        model, job = self.fault(bench, body)
        row = measure("forward", model=model, job=job)
        assert row["outcome"] == "crashed", row.get("reason")
        assert settles_at(card, before) <= 64 * MIB
        self.healthy(measure)


class TestCompressedMemory:
    def test_sizes(self, measure: Callable[..., dict[str, Any]], bench: Any) -> None:
        """Bytes of weights per stack, and that loading never held them all in bf16."""
        layers = 16  # half a GiB, beside which workspaces of libraries are small
        deep = bench.random_model("deep-llama", {**MEDIUM_LLAMA, "num_hidden_layers": layers}, "language")
        rows = {
            stack: measure("decode", stack, deep, prompt_tokens=32, new_tokens=32)
            for stack in ("bf16", "bf16+int8", "bf16+nf4")
        }
        for stack, row in rows.items():
            assert row["outcome"] == "ok", (stack, row.get("reason"))
        blocks = layers * (4 * 1024 * 1024 + 3 * 1024 * 4096)
        rest = rows["bf16"]["parameters_total"] - blocks
        expected = {"bf16": 2.0, "bf16+int8": 1.0 + 4 / 1024, "bf16+nf4": 0.5 + 4 / 64}
        for stack, each in expected.items():
            assert rows[stack]["model_bytes"] == pytest.approx(blocks * each + 2 * rest, rel=0.05), stack
            assert rows[stack]["parameters_total"] == rows["bf16"]["parameters_total"], stack
        full = rows["bf16"]["model_bytes"]
        load = {stack: row["peak_allocated_bytes_load"] / full for stack, row in rows.items()}
        assert load["bf16+int8"] < 0.75 and load["bf16+nf4"] < 0.6, load
        assert rows["bf16+nf4"]["peak_allocated_bytes"] < rows["bf16"]["peak_allocated_bytes"]


class TestRow:
    @pytest.fixture(scope="class")
    @classmethod
    def row(cls, measure: Callable[..., dict[str, Any]], medium: ModelSpec) -> dict[str, Any]:
        return measure("prefill", "bf16", medium, batch_size=4, sequence_length=512)

    def test_is_ok_and_adds_up(self, row: dict[str, Any]) -> None:
        assert row["outcome"] == "ok", row.get("reason")
        parts = [row.get(name) or 0.0 for name in (*TIME_COLUMNS, "overhead_s")]
        assert sum(parts) == pytest.approx(row["wall_s"], rel=0.02)
        assert row["process_kind"] == "fork"
        assert row["overhead_s"] < 1.5

    def test_every_null_has_a_reason(self, row: dict[str, Any]) -> None:
        reasons = json.loads(row["null_reasons"])
        exempt = {column.name for column in IDENTITY} | {"reason", "error_type"}
        null = {name for name in columns() if row.get(name) is None} - exempt - reasons.keys()
        assert {name for name in null if not name.endswith(("_lo", "_hi", "_n"))} == set()

    def test_memory_is_consistent(self, row: dict[str, Any]) -> None:
        assert row["model_bytes"] <= row["allocated_bytes"] <= row["peak_allocated_bytes"] <= row["peak_reserved_bytes"]
        assert row["peak_requested_bytes"] <= row["peak_allocated_bytes"]
        assert 0 <= row["fragmentation"] < 1
        if row.get("peak_process_bytes") is not None:
            assert row["peak_process_bytes"] > row["reserved_bytes"]

    def test_passes_agree(self, row: dict[str, Any]) -> None:
        """Where the host was not twice as slow in one of them, which this model waits for."""
        fed = json.loads(row["environment"])["fed_from"]
        if row["host_loop_ms"] > 1.1 * fed["fastest_ms"] and "launch_bound" in row["flags"]:
            pytest.skip("the host was slow for a while")
        assert row["device_ms_p50"] <= row["latency_ms_p50"] * 1.02
        per_call = 4 * 512 / row["throughput_per_s"] * 1e3
        assert per_call == pytest.approx(row["device_ms_p50"], rel=0.25)


# ---- the card -------------------------------------------------------------------------------------------------------


class TestNvml:
    def test_the_same_card_by_uuid(
        self, card: DeviceInfo, measure: Callable[..., dict[str, Any]], bench: Any, tmp_path: Path
    ) -> None:
        """NVML's UUID, the row's, and the one that torch sees in the child, whatever the numbering."""
        from tasks.nvml import open_gpu

        facts = open_gpu(card.uuid).facts()
        assert facts.uuid == card.uuid
        note = tmp_path / "uuid"
        body = (
            f"open({str(note)!r}, 'w').write(str(torch.cuda.get_device_properties(0).uuid) + ' ' "
            "+ str(torch.cuda.device_count()))"
        )
        model, path = bench.factory(GREEDY.format(body=body))
        row = measure("forward", model=model, job={"search_path": path})
        assert row["outcome"] == "ok", row.get("reason")
        assert (row["device_uuid"], row["device_name"]) == (card.uuid, facts.name)
        seen, count = note.read_text().split()
        assert str(card.uuid).removeprefix("GPU-") == seen.removeprefix("GPU-")
        assert count == "1"

    def test_tick_of_the_energy_counter(self, card: DeviceInfo) -> None:
        from tasks.energy import probe_tick
        from tasks.nvml import open_gpu

        tick = probe_tick(open_gpu(card.uuid))
        assert isinstance(tick, float), tick
        assert tick == pytest.approx(0.1, rel=0.3)

    def test_energy_of_constant_work_is_repeatable(self, measure: Callable[..., dict[str, Any]]) -> None:
        axes = {"batch_size": 4, "heads": 12, "head_size": 64, "sequence_length": 2048}
        rows = [measure("attention", "bf16+sdpa-flash", **axes) for _ in range(4)]
        # the first one may find the card cold
        joules = [row["energy_j_per_unit"] for row in rows[1:]]
        assert max(joules) / min(joules) < 1.05, joules
        for row in rows:
            assert row["energy_source"] == "nvml_counter"
            assert row["energy_j"] == pytest.approx(row["power_w_mean"] * row["energy_window_s"], rel=0.01)
            assert row["energy_window_s"] >= 1.95, "20 ticks of the counter, which ticks every 0.1 s or a little less"

    def test_power_is_below_the_limit(self, measure: Callable[..., dict[str, Any]]) -> None:
        row = measure("attention", "bf16", sequence_length=2048, batch_size=4, heads=12, head_size=64)
        assert 20 < row["power_w_mean"] <= 1.1 * row["power_limit_w"]
        assert row["sm_clock_mhz_median"] > 200
        assert 10 < row["temperature_c_end"] < 110


class TestFacts:
    @pytest.fixture(scope="class")
    @classmethod
    def facts(cls, slot: Supervisor) -> dict[str, Any]:
        return slot.facts()

    def test_ceilings_are_in_order(self, facts: dict[str, Any]) -> None:
        ceilings = facts["ceilings"]
        assert ceilings["read_bytes_per_s"] >= ceilings["copy_bytes_per_s"]
        assert 5e10 < ceilings["copy_bytes_per_s"] < 2e13
        assert ceilings["fp16_flop_per_s"] > 1.5 * ceilings["fp32_flop_per_s"]
        if "tf32_flop_per_s" in ceilings:
            assert ceilings["bf16_flop_per_s"] > ceilings["tf32_flop_per_s"] > ceilings["fp32_flop_per_s"]
            assert ceilings["bf16_flop_per_s"] == pytest.approx(ceilings["fp16_flop_per_s"], rel=0.25)

    def test_idle_power(self, facts: dict[str, Any]) -> None:
        assert facts["idle_power_w"] is None or 2 < facts["idle_power_w"] < facts["power_limit_w"]

    def test_no_row_is_above_them(
        self, facts: dict[str, Any], measure: Callable[..., dict[str, Any]], medium: ModelSpec
    ) -> None:
        job = {"ceilings": facts["ceilings"], "idle_power_w": facts["idle_power_w"]}
        prefill = measure("prefill", "bf16", medium, job=job, batch_size=8, sequence_length=1024)
        assert prefill["outcome"] == "ok", prefill.get("reason")
        assert 0.05 < prefill["mfu"] < 1
        decode = measure("decode", "bf16+static-cache", medium, job=job, batch_size=1)
        assert decode["outcome"] == "ok", decode.get("reason")
        assert 0 < decode["mbu"] < 1


class TestServer:
    def test_refuses_to_fork_with_cuda_initialised(self, card: DeviceInfo) -> None:
        code = "import torch; torch.ones(1, device='cuda'); from tasks.forkserver import unready; print(unready())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=True
        )
        assert "CUDA is initialised in the server" in done.stdout

    def test_forks_on_and_on(self, slot: Supervisor) -> None:
        """Many cells later the server still forks, quickly: no child has initialised CUDA in it."""
        times = []
        for _ in range(5):
            done = slot._isolation.run("nothing", {}, timeout_s=60)
            assert done.kind == "fork"
            times.append(done.wall_s)
        assert median(times) < 1.0
