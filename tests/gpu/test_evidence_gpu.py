"""On a real card: evidence of offload and compile that a byte count or a graph count alone would let pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.device import DeviceInfo
from tasks.optimization import Evidence, Unsupported
from tasks.optimizations.cuda_graph import capture
from tasks.registry import optimizations
from tasks.stacks import parse_stack

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 256, "n_positions": 128}


def proof(name: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(name).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_gpt2_blocks_leave_the_card(bench: Any, card: DeviceInfo, to: str) -> None:
    model, stack = bench.random_model("small-gpt2", GPT2, "language"), f"offload:keep=0.25,to={to}"
    logits = []
    for applied in ("fp32", f"fp32+{stack}"):
        job = bench.job(bench.cell("prefill", f"fp32+{stack}", model), device=card)
        with bench.live(job, applied=applied) as session:
            logits.append(session.step.logits.cpu().clone())
            evidence = proof(stack, session)
            assert evidence.ok == ("offload" in applied), evidence.facts
            if to == "cpu" and "offload" in applied:
                assert set(evidence.facts["fetched_from"]) == {"cpu"}
    assert logits[0].allclose(logits[1], atol=1e-5)


@pytest.mark.parametrize("made", ["prune:what=layers,ratio=0.5", "distill:layers=0.5,steps=2"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_artifacts_are_offloaded(bench: Any, card: DeviceInfo, made: str, to: str) -> None:
    stack = f"offload:keep=0,to={to}"
    with bench.live(bench.job(bench.cell("prefill", f"bf16+{made}+{stack}"), device=card)) as session:
        evidence = proof(stack, session)
    assert evidence.ok, evidence.facts


@pytest.mark.parametrize(
    "stack",
    [
        "fp32+static-cache+compile",
        "fp32+static-cache+compile:mode=reduce-overhead",
        "fp32+static-cache+compile+cuda-graph",
        "fp32+no-cache+compile:mode=reduce-overhead",
        "fp32+flex+compile",
    ],
)
def test_every_step_runs_compiled_code(bench: Any, card: DeviceInfo, stack: str) -> None:
    kind = "prefill" if "flex" in stack else "decode"
    axes = {"new_tokens": 6} if kind == "decode" else {}
    with bench.live(bench.job(bench.cell(kind, stack, bench.POCKET, **axes), device=card), calls=4) as session:
        name = next(str(item) for item in parse_stack(stack).techniques if item.name == "compile")
        evidence = proof(name, session)
    assert evidence.ok, evidence.facts
    assert evidence.facts["segments"] == (5 if kind == "decode" else 1)


def test_graphs_of_flex_attention_are_not_the_steps(bench: Any, card: DeviceInfo) -> None:
    job = bench.job(bench.cell("prefill", "fp32+flex+compile", bench.POCKET), device=card)
    with bench.live(job, applied="fp32+flex") as session:
        evidence = proof("compile", session)
    assert not evidence.ok, evidence.facts
    assert evidence.facts["graphs"] > 0


def test_steps_beyond_the_recompile_limit_are_found(bench: Any, card: DeviceInfo) -> None:
    job = bench.job(bench.cell("decode", "fp32+compile:dynamic=false", new_tokens=16), device=card)
    with bench.live(job) as session:
        evidence = proof("compile:dynamic=false", session)
    assert not evidence.ok, evidence.facts
    assert 0 < evidence.facts["segments_compiled"] < evidence.facts["segments"] == 15


def test_step_that_asks_the_host_cannot_be_captured(card: DeviceInfo) -> None:
    number = torch.ones(1, device="cuda")
    try:
        with pytest.raises(Unsupported, match="cannot capture this step"):
            capture(lambda: None, lambda: print(float(number.sum())), [])
    finally:  # the broken recording leaves the generator of this process, which a cell would end with, inside of it
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            number.add_(1)


@pytest.mark.parametrize("check", ["", "+sync-check"])
def test_looking_at_flags_is_not_launching(bench: Any, card: DeviceInfo, check: str) -> None:
    """One launch for a large step: the host is not what limits it, whether it then waits for a flag or not."""
    from statistics import median

    from tasks.timing import Passes

    large = {"model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 1024,
             "max_position_embeddings": 512}  # fmt: skip
    model = bench.random_model("large-llama", large, "language")
    stack = f"bf16+static-cache+cuda-graph{check}"
    job = bench.job(bench.cell("decode", stack, model), device=card, profile=bench.INSTANT)
    with bench.live(job) as session:
        passes = Passes(session)
        passes.warm_up()
        passes.latency()
    assert median(session.timings.issue_shares) < 0.5
