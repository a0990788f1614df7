"""GPTQ and AWQ on a CUDA device: the kernels by name, made there, bytes and memory. Speed is for the sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.manifest import MANIFEST
from tasks.optimization import Evidence
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

LAYERS, HIDDEN, INTER = 4, 1024, 4096
MEDIUM = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN, "intermediate_size": INTER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1024,
    "max_position_embeddings": 2048,
}  # fmt: skip
# bits per weight by hand: codes, a scale of two bytes per group of 128, packed zero points, the order of the inputs
BITS = {
    "gptq:kernel=marlin": 4 + 16 / 128,
    "gptq:kernel=triton": 4 + 16 / 128 + 4 / 128,
    "gptq:kernel=torch": 4 + 16 / 128 + 4 / 128,
    "gptq:kernel=marlin,bits=8": 8 + 16 / 128,
    "gptq:kernel=triton,bits=8": 8 + 16 / 128 + 8 / 128,
    "awq:kernel=marlin": 4 + 16 / 128 + 4 / 128,
    "awq:kernel=triton": 4 + 16 / 128 + 4 / 128,
    "awq:kernel=torch": 4 + 16 / 128 + 4 / 128,
}
BLOCKS = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTER)


def kernel_of(stack: str) -> str:
    return stack.partition("kernel=")[2].partition(",")[0]


def proof(stack: str, session: Any) -> Evidence:
    chosen = next(item for item in parse_stack(stack).techniques if item.name in ("gptq", "awq"))
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.fixture(scope="module")
def medium(bench: Any) -> ModelSpec:
    return bench.random_model("medium-packed", MEDIUM, "language")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measure(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The row of one cell on the card; skipped where the stack is refused there."""
    folder = tmp_path_factory.mktemp("slot")
    slot = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    slot.start()

    def run(kind: str, stack: str, model: ModelSpec, axes: dict[str, Any], **job: Any) -> dict[str, Any]:
        cell = replace(bench.cell(kind, stack, model, **axes), hardware=card.tag)
        refusal = unsupported(cell, card)
        if refusal:
            pytest.skip(refusal)
        limits = {"timeout_s": 600.0, "artifact_timeout_s": 800.0}
        row = slot.measure(bench.job(cell, device=card, **{**limits, **job})).row
        assert row["outcome"] == "ok", (stack, row.get("reason"), row.get("evidence"))
        return row

    yield run
    slot.close()


@pytest.mark.parametrize("stack", BITS)
def test_random_weights(measure: Callable[..., Any], medium: ModelSpec, stack: str) -> None:
    """Rounded layer by layer on the card: the format's bytes, the kernel that was named, never the model in full."""
    method, _, rest = stack.partition(":")
    rounded = f"{method}:method=rtn,{rest}"
    axes = {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 16}
    full = measure("decode", "bf16", medium, axes)
    row = measure("decode", f"bf16+{rounded}", medium, axes)
    found = [facts for name, facts in json.loads(row["evidence"]).items() if name.startswith(method)]
    assert found[0]["kernel"] == kernel_of(stack)
    assert found[0]["method"] == "rtn"
    assert found[0]["bits_per_weight"] == pytest.approx(BITS[stack], rel=0.03)
    assert row["parameters_total"] == full["parameters_total"]
    assert row["model_bytes"] == pytest.approx(full["model_bytes"] - 2 * BLOCKS + BLOCKS * BITS[stack] / 8, rel=0.03)
    # codes are int32, and weights fp32, while one layer is packed
    assert row["peak_allocated_bytes_load"] < row["model_bytes"] + 24 * HIDDEN * INTER
    assert row["peak_allocated_bytes_load"] < full["model_bytes"]
    assert row["load_s"] < 90, "nvcc has its own time, before the cell"
    # the library's allocator settings have not come with it
    variables = json.loads(row["environment"])["variables"]
    assert "max_split_size_mb" not in variables.get("PYTORCH_ALLOC_CONF", "")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_rounded_from_a_checkpoint(measure: Callable[..., Any], bench: Any, medium: ModelSpec, method: str) -> None:
    """Trained weights: rounded on the host, with nothing on the card, and loaded there packed."""
    axes = {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 16}
    row = measure("decode", f"bf16+{method}:method=rtn", bench.stored(medium), axes)
    manifest = json.loads((bench.folder / "artifacts" / method / row["artifact_key"] / MANIFEST).read_text())
    assert row["artifact_peak_bytes"] == manifest["peak_host_bytes"], "nothing was reserved on the card"
    assert row["peak_allocated_bytes_load"] < 2 * row["parameters_total"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_made_on_the_card(measure: Callable[..., Any], bench: Any, method: str) -> None:
    """Calibrated there, once for all kernels, and nearer to the reference than rounding."""
    judged = {"quality": True, "quality_choices": 20}
    axes = {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 16}
    rounded = measure("decode", f"bf16+{method}:method=rtn", bench.POCKET, axes, **judged)
    keys = set()
    for kernel in ("marlin", "triton", "torch"):
        row = measure("decode", f"bf16+{method}:samples=16,kernel={kernel}", bench.POCKET, axes, **judged)
        keys.add(row["artifact_key"])
        assert 0 < row["kl_divergence"] < rounded["kl_divergence"]
    assert len(keys) == 1


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kernel", ["marlin", "triton"])
def test_compiled(measure: Callable[..., Any], medium: ModelSpec, method: str, kernel: str) -> None:
    """Marlin's layers go into one graph of the whole step."""
    stack = f"bf16+{method}:method=rtn,kernel={kernel}"
    whole = ":fullgraph=true" if kernel == "marlin" else ""
    row = measure("prefill", f"{stack}+compile{whole}", medium, {"sequence_length": 128})
    assert all(facts["ok"] for facts in json.loads(row["evidence"]).values())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_compiled_as_one_cuda_graph(measure: Callable[..., Any], medium: ModelSpec, method: str) -> None:
    stack = f"bf16+{method}:method=rtn,kernel=marlin+static-cache+compile:fullgraph=true+cuda-graph"
    row = measure("decode", stack, medium, {"batch_size": 1, "prompt_tokens": 32, "new_tokens": 16})
    assert row["graph_breaks"] == 0
    assert all(facts["ok"] for facts in json.loads(row["evidence"]).values())


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize(
    ("stack", "applied"),
    [
        ("gptq:method=rtn,kernel=marlin", "gptq:method=rtn,kernel=triton"),
        ("gptq:method=rtn,kernel=triton", "gptq:method=rtn,kernel=torch"),
        ("awq:method=rtn,kernel=marlin", "awq:method=rtn,kernel=triton"),
        ("gptq:method=rtn,kernel=marlin", "awq:method=rtn,kernel=marlin"),
        ("awq:method=rtn", "bf16+nf4"),
    ],
)
def test_pretender_is_caught(bench: Any, card: DeviceInfo, medium: ModelSpec, stack: str, applied: str) -> None:
    for item in (stack, applied):
        refusal = unsupported(bench.cell("prefill", item, medium), card)
        if refusal:
            pytest.skip(refusal)
    job = bench.job(bench.cell("prefill", stack, medium), device=card)
    with bench.live(job, calls=1) as session:
        found = proof(stack, session)
    assert found.ok, found.facts
    with bench.live(job, applied=applied, calls=1) as session:
        found = proof(stack, session)
    assert not found.ok, found.facts


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.usefixtures("torch_settings")
def test_kernels_agree(bench: Any, card: DeviceInfo, medium: ModelSpec, method: str) -> None:
    """The same codes: answers of all kernels differ by their own rounding."""
    logits = {}
    for kernel in ("torch", "triton", "marlin"):
        stack = f"{method}:method=rtn,kernel={kernel}"
        refusal = unsupported(bench.cell("prefill", stack, medium), card)
        if refusal:
            pytest.skip(refusal)
        with bench.live(bench.job(bench.cell("prefill", stack, medium), device=card)) as session:
            logits[kernel] = session.step.logits.float().clone()
    exact = logits.pop("torch")
    for kernel, found in logits.items():
        assert float((found - exact).norm() / exact.norm()) < 0.03, kernel
