"""On a real card: attention kernels with gradients, compile modes, offloaded layers, joined projections."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.optimization import Evidence
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

MEDIUM_LLAMA = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1024,
    "max_position_embeddings": 2048, "initializer_range": 0.05,
}  # fmt: skip
KERNELS = ("sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "flex", "flash-attn-2", "flash-attn-3")
SHAPE = {"batch_size": 2, "heads": 4, "head_size": 64, "sequence_length": 256}
GRAPHS = "static-cache+compile:mode=reduce-overhead"


@pytest.fixture(scope="module")
def medium(bench: Any) -> ModelSpec:
    return bench.random_model("medium-grouped-llama", MEDIUM_LLAMA, "language")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measure(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The row of one cell on the card, in a process of its own."""
    folder = tmp_path_factory.mktemp("slot")
    slot = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    slot.start()

    def run(kind: str, stack: str, model: ModelSpec | None = None, **axes: Any) -> dict[str, Any]:
        cell = replace(bench.cell(kind, stack, model, **axes), hardware=card.tag)
        return slot.measure(bench.job(cell, device=card, timeout_s=400.0)).row

    yield run
    slot.close()


def proof(name: str, session: Any) -> Evidence:
    stack = parse_stack(name)
    return optimizations()[stack.names()[0]].evidence(stack.techniques[0], session)


def skip_unsupported(bench: Any, card: DeviceInfo, kind: str, stack: str, **axes: Any) -> None:
    refusal = unsupported(bench.cell(kind, stack, **axes), card)
    if refusal:
        pytest.skip(refusal)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_and_gradients(bench: Any, card: DeviceInfo, name: str, causal: bool, direction: str) -> None:
    """Against attention written out in fp32 from the same bf16 inputs; bf16 has 8 bits."""
    import torch

    axes = {**SHAPE, "causal": causal, "direction": direction}
    skip_unsupported(bench, card, "attention", f"bf16+{name}", **axes)
    with bench.live(bench.job(bench.cell("attention", f"bf16+{name}", **axes), device=card), calls=1) as session:
        step = session.step
        assert step.problems() == []
        evidence = proof(name, session)
        assert evidence.ok, evidence.facts
        step.run(0, lambda _: None)
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = inputs = [tensor.detach().clone().float().requires_grad_() for tensor in step._inputs[0]]
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
            expected = scores.softmax(-1) @ v
            assert distance(step.output, expected) < 0.02
            if direction == "forward_backward":
                gradients = torch.autograd.grad(expected, inputs, step._gradients[0].float())
                for found, truth in zip(step.gradients, gradients, strict=True):
                    assert distance(found, truth) < 0.03


def distance(found: Any, truth: Any) -> float:
    return float((found.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("name", "applied"),
    [
        ("flex", "bf16+sdpa-flash"),
        ("flex", "bf16+eager"),
        ("sdpa-flash", "bf16+flex"),
        ("flash-attn-2", "bf16+sdpa-flash"),
        ("flash-attn-3", "bf16+sdpa-flash"),
    ],
)
def test_attention_pretenders(bench: Any, card: DeviceInfo, name: str, applied: str) -> None:
    job = bench.job(bench.cell("attention", f"bf16+{name}", **SHAPE), device=card)
    with bench.live(job, applied=applied) as session:
        evidence = proof(name, session)
    assert not evidence.ok, evidence.facts


def test_memory_of_the_backward_pass(measure: Callable[..., dict[str, Any]]) -> None:
    """Written out, the scores are kept for the backward pass; flash recomputes them."""
    axes = {"batch_size": 4, "heads": 12, "head_size": 64, "sequence_length": 2048, "direction": "forward_backward"}
    rows = {stack: measure("attention", f"bf16+{stack}", **axes) for stack in ("eager", "sdpa-flash", "flex")}
    for stack, row in rows.items():
        assert row["outcome"] == "ok", (stack, row.get("reason"))
        assert row["mfu"] > 0
    scores = 2 * 4 * 12 * 2048**2
    assert rows["eager"]["peak_allocated_bytes"] > 2 * scores
    assert rows["sdpa-flash"]["peak_allocated_bytes"] < scores
    assert rows["flex"]["peak_allocated_bytes"] < scores
    assert rows["sdpa-flash"]["flops"] == rows["eager"]["flops"] == 3 * 4 * 4 * 12 * 2048**2 * 64


@pytest.mark.parametrize("kind", ["prefill", "decode", "train_step"])
def test_flex_in_a_model(measure: Callable[..., dict[str, Any]], medium: ModelSpec, kind: str) -> None:
    length = {"prompt_tokens": 128, "new_tokens": 8} if kind == "decode" else {"sequence_length": 128}
    row = measure(kind, "bf16+flex", medium, batch_size=2, **length)
    assert row["outcome"] == "ok", row.get("reason")
    assert json.loads(row["evidence"])["flex"]["attention_operators"] == {"flex_attention": pytest.approx(4, abs=16)}


# ---- compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stack",
    [
        "compile:mode=max-autotune-no-cudagraphs",
        "compile:coordinate_descent=true",
        "compile:mode=reduce-overhead,coordinate_descent=true",
        "compile:fullgraph=true",
        "compile:dynamic=true",
    ],
)
def test_compile_options(measure: Callable[..., dict[str, Any]], stack: str) -> None:
    row = measure("forward", f"bf16+{stack}", batch_size=2)
    assert row["outcome"] == "ok", row.get("reason")
    (canonical,) = parse_stack(stack).techniques
    evidence = json.loads(row["evidence"])[str(canonical)]
    assert evidence["ok"]
    assert row["graph_breaks"] == 0
    if "coordinate_descent" in stack:
        assert evidence["kernels_tuned"] > 0
    assert ("cuda_graph_launches" in evidence) == ("reduce-overhead" in stack)


@pytest.mark.parametrize(
    ("asked", "applied"),
    [
        ("compile:coordinate_descent=true", "bf16+compile"),
        ("compile:mode=reduce-overhead", "bf16+compile:mode=max-autotune-no-cudagraphs"),
        ("compile:dynamic=true", "bf16+compile"),
    ],
)
def test_compile_pretenders(bench: Any, card: DeviceInfo, asked: str, applied: str) -> None:
    job = bench.job(bench.cell("forward", f"bf16+{asked}", batch_size=2), device=card)
    with bench.live(job, applied=applied, calls=4) as session:
        evidence = proof(asked, session)
    assert not evidence.ok, evidence.facts


def test_what_products_of_one_row_repeat(bench: Any, card: DeviceInfo) -> None:
    """The threshold is proven by kernels that work out less, and what torch does without it is no proof."""
    import torch
    from torch._inductor.codecache import PyCodeCache

    asked = "compile:coordinate_descent=true,realize_opcount_threshold=10"
    cell = bench.cell("decode", f"bf16+eager+static-cache+{asked}", bench.POCKET, batch_size=1)
    found = []
    for applied in (asked, "compile:coordinate_descent=true"):
        torch._dynamo.reset()
        PyCodeCache.cache_clear()  # all kernels count that the process has loaded, those of other tests, too
        with bench.live(bench.job(cell, device=card), applied=f"bf16+eager+static-cache+{applied}", calls=4) as session:
            found.append(proof(asked, session))
    stored, inlined = found
    assert stored.ok, stored.facts
    assert not inlined.ok, inlined.facts
    assert stored.facts["operations_repeated"] < inlined.facts["operations_repeated"]


# ---- joined projections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stack",
    [
        "fp32+fused-projections",
        f"fp32+fused-projections+{GRAPHS}",
        f"fp32+fused-projections+eager+{GRAPHS},coordinate_descent=true",
        f"fp32+fused-projections:of=attention+eager+{GRAPHS},coordinate_descent=true",
    ],
)
def test_joined_projections_give_the_same_tokens(bench: Any, card: DeviceInfo, stack: str) -> None:
    tokens = []
    for variant in ("fp32+eager", stack):
        job = bench.job(bench.cell("decode", variant, bench.POCKET, new_tokens=16), device=card)
        with bench.live(job, calls=4) as session:
            assert session.step.problems() == []
            tokens.append(session.step.tokens.cpu().clone())
            if variant == stack:
                for technique in parse_stack(stack).techniques[1:]:
                    evidence = optimizations()[technique.name].evidence(technique, session)
                    assert evidence.ok, (technique, evidence.facts)
    assert tokens[0].equal(tokens[1])


def test_joining_holds_one_block_twice_at_most(measure: Callable[..., dict[str, Any]], medium: ModelSpec) -> None:
    plain, joined = (
        measure("decode", stack, medium, batch_size=1, prompt_tokens=32, new_tokens=8)
        for stack in ("bf16", "bf16+fused-projections")
    )
    for row in (plain, joined):
        assert row["outcome"] == "ok", row.get("reason")
    block = 2 * (1024 * (1024 + 2 * 256) + 2 * 1024 * 4096)
    assert joined["model_bytes"] == pytest.approx(plain["model_bytes"], rel=0.01)
    assert joined["peak_allocated_bytes_load"] < plain["peak_allocated_bytes_load"] + 1.2 * block


# ---- offload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("source", ["random", "pocket"])
def test_offloaded_layers_give_the_same_tokens(bench: Any, card: DeviceInfo, source: str, to: str) -> None:
    model = bench.language if source == "random" else bench.POCKET
    tokens, stack = [], f"offload:keep=0.5,to={to}"
    for applied in ("fp32", f"fp32+{stack}"):
        job = bench.job(bench.cell("decode", f"fp32+{stack}", model, new_tokens=8), device=card)
        with bench.live(job, applied=applied) as session:
            tokens.append(session.step.tokens.cpu().clone())
            assert proof(stack, session).ok == ("offload" in applied)
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_memory_and_traffic(measure: Callable[..., dict[str, Any]], medium: ModelSpec, to: str) -> None:
    """A model that is never whole on the device, and a count that equals the weights away."""
    rows = {
        keep: measure("decode", f"bf16+offload:keep={keep},to={to}", medium, prompt_tokens=32, new_tokens=8)
        for keep in ("1.0", "0.5", "0")
    }
    for keep, row in rows.items():
        assert row["outcome"] == "ok", (keep, row.get("reason"))
    block = 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 4096 + 2 * 1024)
    for keep, away in (("1.0", 0), ("0.5", 2), ("0", 4)):
        assert rows[keep]["offload_bytes_per_pass"] == away * block
        assert rows[keep]["offload_bytes_per_token"] == away * block / rows[keep]["batch_size"]
        assert rows[keep]["model_bytes"] == pytest.approx(rows["1.0"]["model_bytes"], rel=0.001)
    assert rows["0"]["device_fraction"] < rows["0.5"]["device_fraction"] < rows["1.0"]["device_fraction"] == 1
    whole = rows["1.0"]["model_bytes"]
    assert rows["0"]["peak_allocated_bytes_load"] < 0.5 * whole
    assert rows["0"]["peak_allocated_bytes"] < rows["1.0"]["peak_allocated_bytes"] - 2 * block
