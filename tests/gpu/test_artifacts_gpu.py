"""On a real card: pruned and distilled models are smaller and faster, 2:4 sparsity is what it says, `train` works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.optimizations.sparse_2_4 import block_linears, two_of_four
from tasks.registry import optimizations
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

# Large enough that a prefill is bound by its products, not by launching them.
LARGE_LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def large(bench: Any) -> ModelSpec:
    return bench.random_model("large-llama", LARGE_LLAMA, "language")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measure(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    folder = tmp_path_factory.mktemp("slot")
    slot = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    slot.start()

    def run(stack: str, model: ModelSpec, kind: str = "prefill", **changes: Any) -> Any:
        axes = {"batch_size": 8, "sequence_length": 512} if kind == "prefill" else {"batch_size": 1}
        cell = replace(bench.cell(kind, stack, model, **axes), hardware=card.tag)
        job = bench.job(cell, device=card, artifact_dir=str(folder / "store"), timeout_s=300.0, **changes)
        row = slot.measure(job).row
        assert row["outcome"] == "ok", (stack, row.get("reason"), row.get("evidence"))
        return row

    yield run
    slot.close()


class TestPrune:
    @pytest.mark.parametrize(
        ("stack", "share"),
        [("prune:ratio=0.5", 0.75), ("prune:ratio=0.5,what=layers", 0.65), ("prune:ratio=0.5,what=heads", 0.98)],
    )
    def test_smaller_and_faster(self, measure: Callable[..., Any], large: ModelSpec, stack: str, share: float) -> None:
        """Half of the MLP, of the layers, of the heads: less memory, fewer FLOPs, less time."""
        whole, pruned = measure("baseline", large), measure(stack, large)
        assert pruned["parameters_total"] < whole["parameters_total"]
        assert pruned["model_bytes"] < whole["model_bytes"]
        assert pruned["flops"] < whole["flops"]
        assert pruned["latency_ms_p50"] < share * whole["latency_ms_p50"]
        assert pruned["artifact_made_s"] > 0
        assert pruned["artifact_peak_bytes"] > pruned["model_bytes"]
        assert whole.get("artifact_key") is None

    def test_recovery_and_distillation_on_the_card(self, measure: Callable[..., Any], bench: Any) -> None:
        judged = {"quality": True, "quality_tokens": 4096, "quality_choices": 100}
        rows = {
            stack: measure(stack, bench.POCKET, **judged)
            for stack in (
                "baseline", "prune:what=layers,ratio=0.4", "prune:what=layers,ratio=0.4,recover_steps=300",
                "distill:layers=0.6,steps=20", "distill:layers=0.6,steps=400",
            )
        }  # fmt: skip
        seen = {stack: row["perplexity"] for stack, row in rows.items()}
        print(json.dumps(seen))
        whole, cut, recovered, few, more = seen.values()
        assert whole < recovered < cut
        assert whole < more < few


class TestSparse:
    def test_half_the_bytes(self, measure: Callable[..., Any], large: ModelSpec) -> None:
        dense, sparse = measure("baseline", large), measure("sparse-2-4", large)
        evidence = json.loads(sparse["evidence"])["sparse-2-4"]
        print(json.dumps({**evidence, "dense_ms": dense["latency_ms_p50"], "sparse_ms": sparse["latency_ms_p50"]}))
        assert evidence["sparse"] == evidence["layers"] == 28
        assert 8.5 < evidence["bits_per_weight"] < 10.4
        assert sparse["model_bytes"] < 0.7 * dense["model_bytes"]

    def test_multiplies_as_its_zeros_say(self, bench: Any, card: DeviceInfo) -> None:
        """Against the same checkpoint in dense layers."""
        import torch
        from transformers import AutoModelForCausalLM

        job = bench.job(bench.cell("prefill", "sparse-2-4", bench.POCKET, sequence_length=128), device=card)
        with bench.live(job, calls=0) as session:
            ids = torch.arange(512, device="cuda").view(4, 128)
            ours = session.model(input_ids=ids, use_cache=False).logits.float()
            folder = session.artifacts["sparse-2-4"].folder
        dense = AutoModelForCausalLM.from_pretrained(folder).cuda().eval()
        with torch.inference_mode():
            theirs = dense(input_ids=ids, use_cache=False).logits.float()
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02

    def test_pretenders(self, bench: Any, card: DeviceInfo) -> None:
        cell = bench.cell("prefill", "sparse-2-4", bench.POCKET)
        technique = optimizations()["sparse-2-4"]
        with bench.live(bench.job(cell, device=card), applied="bf16") as session:
            for layer in block_linears(session.model).values():
                layer.weight.data *= two_of_four(layer.weight.abs())
            assert not technique.evidence(cell.stack.techniques[0], session).ok, "zeros, but dense"
        with bench.live(bench.job(cell, device=card)) as session:
            assert technique.evidence(cell.stack.techniques[0], session).ok
            block = session.model.model.layers[0].mlp
            block.up_proj = torch_linear(block.up_proj)
            assert not technique.evidence(cell.stack.techniques[0], session).ok, "all but one"


def torch_linear(like: Any) -> Any:
    import torch

    return torch.nn.Linear(like.in_features, like.out_features, bias=False, dtype=torch.bfloat16, device="cuda")


@pytest.mark.usefixtures("torch_settings")
def test_train_a_gpt2_size_model(card: DeviceInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a minute is enough to see that it learns and fits; three make the model of the sweeps."""
    from orchestrator.train_model import train_model

    train_model(tmp_path / "model", size="gpt2", minutes=0.5, steps=None, device="cuda", seed=0)
    text = capsys.readouterr().out
    print(text)
    record = json.loads(text.splitlines()[-1])
    assert record["heldout_perplexity"] < 400, "a thousand and more at first"
    assert record["parameters"] > 95_000_000
