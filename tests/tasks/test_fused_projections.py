"""Joined projections: the same arithmetic and tokens, no second copy of the weights, and evidence of their use."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.optimization import Evidence, Unsupported
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

BIASED = {"model_type": "qwen2", "dtype": "float32", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def proof(session: Any, stack: str = "fused-projections") -> Evidence:
    return optimizations()["fused-projections"].evidence(parse_stack(stack).techniques[0], session)


@pytest.mark.parametrize("of", ["all", "attention", "mlp"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_same_outputs_from_fewer_products(bench: Any, kind: str, of: str) -> None:
    outputs, stack = [], f"fused-projections:of={of}"
    for applied in ("fp32", f"fp32+{stack}"):
        with bench.live(bench.job(bench.cell(kind, stack)), applied=applied) as session:
            outputs.append(getattr(session.step, "logits" if kind == "prefill" else "tokens").float().clone())
            evidence = proof(session, stack)
            assert evidence.ok == ("fused" in applied), evidence.facts
    assert outputs[0].allclose(outputs[1], atol=1e-5)


def test_biases_are_joined_too(bench: Any) -> None:
    model = bench.random_model("tiny-qwen2", BIASED, "language")
    outputs = []
    for applied in ("fp32", "fp32+fused-projections"):
        with bench.live(bench.job(bench.cell("prefill", "fused-projections", model)), applied=applied, calls=0) as live:
            for name, parameter in live.model.named_parameters():
                if name.endswith("bias"):  # zero as made: make them matter, and differ from each other
                    parameter.data.copy_(parameter.data + 0.1)
            live.step.run(0, lambda _: None)
            outputs.append(live.step.logits.clone())
            assert any(name.endswith("q_k_v_joined.bias") for name, _ in live.model.named_parameters()) == (
                "fused" in applied
            )
    assert outputs[0].allclose(outputs[1], atol=1e-5)


def test_the_first_product_of_a_pass_is_not_kept(bench: Any) -> None:
    with bench.live(bench.job(bench.cell("prefill", "fp32+fused-projections"))) as session:
        joined = [module for module in session.model.modules() if type(module).__name__ == "JoinedLinear"]
        assert len(joined) == 4
        assert all(module._output is None for module in joined)


def test_one_block_left_apart_is_found(bench: Any) -> None:
    import torch

    with bench.live(bench.job(bench.cell("prefill", "fp32+fused-projections"))) as session:
        assert proof(session).ok
        attention = session.model.model.layers[1].self_attn
        attention.k_proj = torch.nn.Linear(64, 32, bias=False)
        evidence = proof(session)
    assert not evidence.ok
    assert evidence.facts["apart"] == 1


def test_joined_but_unused_is_found(bench: Any) -> None:
    """The joined weights are there, and the layers compute from copies of their own."""
    import torch

    with bench.live(bench.job(bench.cell("prefill", "fp32+fused-projections"))) as session:
        mlp = session.model.model.layers[0].mlp
        plain = torch.nn.functional.linear
        for name in ("gate_proj", "up_proj"):
            weight = mlp.gate_up_joined.weight[getattr(mlp, name)._columns].clone()
            getattr(mlp, name).forward = lambda x, weight=weight: plain(x, weight)
        assert not proof(session).ok


def test_joined_but_computed_for_every_part_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every joined product is there and used equally often, and none of them saves anything."""
    from tasks.optimizations._joined import JoinedLinear

    with bench.live(bench.job(bench.cell("prefill", "fp32+fused-projections:of=mlp"))) as session:
        assert proof(session, "fused-projections:of=mlp").ok
        monkeypatch.setattr(JoinedLinear, "once", JoinedLinear.__call__)
        assert not proof(session, "fused-projections:of=mlp").ok


@pytest.mark.slow
def test_compiles_without_a_break(bench: Any) -> None:
    job = bench.job(bench.cell("decode", "fp32+fused-projections+static-cache+compile:fullgraph=true"))
    reference = bench.job(bench.cell("decode", "fp32+static-cache"))
    with bench.live(job) as session, bench.live(reference) as eager:
        assert session.step.tokens.equal(eager.step.tokens)
        assert proof(session).ok


def test_refusals(bench: Any) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    model = bench.random_model("tiny-gpt2", config, "language")
    cell = bench.cell("prefill", "fused-projections", model)
    assert "joined as published" in str(unsupported(cell, bench.device()))
    job = bench.job(bench.cell("prefill", "nf4+fused-projections", bench.POCKET))
    with pytest.raises(Unsupported, match="no plain attention or mlp projections"), bench.live(job):
        pass
