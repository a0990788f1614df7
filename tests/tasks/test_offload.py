"""Offloaded layers: the same outputs, the bytes that a pass fetches, and evidence that counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.footprint import lower_bound
from tasks.metric import Phase
from tasks.metrics.offload import OffloadTraffic
from tasks.metrics.parameters import stored_bytes
from tasks.optimization import Evidence
from tasks.optimizations.offload import _Away, kept_layers
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported

# transformers warns of what it does by itself when it offloads
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


def proof(stack: str, session: Any) -> Evidence:
    (technique,) = (item for item in parse_stack(stack).techniques if item.name == "offload")
    return optimizations()["offload"].evidence(technique, session)


def folders(bench: Any) -> list[Path]:
    return list((bench.folder / "artifacts" / "offloaded").glob("*"))


@pytest.mark.parametrize("source", ["random", "pocket"])
@pytest.mark.parametrize("keep", ["0", "0.5", "1.0"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_same_outputs_and_all_bytes_counted(bench: Any, source: str, keep: str, kind: str) -> None:
    model = bench.language if source == "random" else bench.POCKET
    stack = f"fp32+offload:keep={keep},to=disk"
    outputs = []
    for applied in ("fp32", stack):
        job = bench.job(bench.cell(kind, stack, model))
        with bench.live(job, applied=applied) as session:
            outputs.append(getattr(session.step, "logits" if kind == "prefill" else "tokens").float().clone())
            if applied == "fp32":
                whole, layers = stored_bytes(session.model), list(session.model.model.layers)
                away = sum(parameter.nbytes for layer in layers[kept_layers(len(layers), float(keep)) :]
                           for parameter in layer.parameters())  # fmt: skip
                continue
            evidence = proof(stack, session)
            assert evidence.ok, evidence.facts
            assert session.settings.transfers.bytes_per_pass == away
            metric = OffloadTraffic()
            metric.end(Phase.WARMUP, session)
            assert metric.collect(session)["offload_bytes_per_pass"] == away
            tokens = 2 * 32 if kind == "prefill" else 2
            assert metric.collect(session)["offload_bytes_per_token"] == away / tokens
            assert stored_bytes(session.model) == whole, "what is elsewhere is still the model's"
            assert session.step.problems() == []
    assert outputs[0].equal(outputs[1])
    assert folders(bench) == []


def test_bf16_weights_survive_the_file(bench: Any) -> None:
    outputs = []
    for stack in ("bf16", "bf16+offload:keep=0,to=disk"):
        with bench.live(bench.job(bench.cell("prefill", stack))) as session:
            outputs.append(session.step.logits.clone())
    assert outputs[0].equal(outputs[1])


def test_gpt2_whose_blocks_are_no_linear_layers(bench: Any) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    model = bench.random_model("tiny-gpt2", config, "language")
    stack = "fp32+offload:keep=0.25,to=disk"
    outputs = []
    for applied in ("fp32", stack):
        with bench.live(bench.job(bench.cell("prefill", stack, model)), applied=applied) as session:
            outputs.append(session.step.logits.clone())
    assert outputs[0].equal(outputs[1])


def test_to_the_cpu_moves_what_the_hooks_will_fetch(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card GPT-2's Conv1D blocks are made on the device: they must leave it before the hooks look for them."""
    import accelerate
    import torch

    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    stack = "fp32+offload:keep=0.25,to=cpu"
    moved: list[Any] = []
    seen: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda module: (moved.append(module), module)[1])
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *_args, **_keywords: seen.extend(moved))
    monkeypatch.setattr(_Away, "device_map", on_a_card(_Away.device_map))
    job = bench.job(bench.cell("prefill", stack, bench.random_model("tiny-gpt2", config, "language")))
    with bench.live(job, calls=0) as session:
        layers = list(session.model.transformer.h)
        assert [layer for layer in layers if any(layer is module for module in seen)] == layers[1:]


def on_a_card(device_map: Any) -> Any:
    def mapped(self: Any, model: Any) -> Any:
        self._main = 0
        return device_map(self, model)

    return mapped


def test_weights_fetched_from_the_device_are_no_evidence(bench: Any) -> None:
    """They are as many bytes, and none of them moves."""
    stack = "fp32+offload:keep=0.5,to=disk"
    with bench.live(bench.job(bench.cell("prefill", stack))) as session:
        places = session.model.hf_device_map
        session.model.hf_device_map = {name: "cpu" if place == "disk" else place for name, place in places.items()}
        session.model.hf_device_map.update({name: "main" for name, place in places.items() if place == "cpu"})
        claimed = "fp32+offload:keep=0.5,to=cpu"
        assert proof(claimed, session).ok, "as if they came from the host"
        session.settings.transfers.devices["cuda"] += 1
        evidence = proof(claimed, session)
        assert not evidence.ok
        assert evidence.facts["fetched_from"]["cuda"] == 1


@pytest.mark.parametrize("made", ["prune:what=layers,ratio=0.5", "distill:layers=0.5,steps=2"])
def test_artifacts_of_random_models_are_offloaded_too(bench: Any, made: str) -> None:
    """They are loaded as checkpoints, with fewer layers than the model's own configuration says."""
    stack = f"fp32+{made}+offload:keep=0,to=disk"
    with bench.live(bench.job(bench.cell("prefill", stack))) as session:
        evidence = proof(stack, session)
    assert evidence.ok, evidence.facts
    assert evidence.facts["layers"] == evidence.facts["layers_away"] == 1


@pytest.mark.parametrize("applied", ["fp32", "fp32+offload:keep=1.0,to=disk"])
def test_pretenders_are_caught(bench: Any, applied: str) -> None:
    stack = "fp32+offload:keep=0.5,to=disk"
    with bench.live(bench.job(bench.cell("prefill", stack)), applied=applied) as session:
        evidence = proof(stack, session)
    assert not evidence.ok
    assert evidence.facts["layers_away"] == 0


def test_another_fraction_is_no_evidence(bench: Any) -> None:
    stack, applied = "fp32+offload:keep=0.5,to=disk", "fp32+offload:keep=0,to=disk"
    with bench.live(bench.job(bench.cell("prefill", stack)), applied=applied) as session:
        assert not proof(stack, session).ok
        assert proof(applied, session).ok


def test_weights_fetched_once_and_kept_are_no_evidence(bench: Any) -> None:
    stack = "fp32+offload:keep=0,to=disk"
    with bench.live(bench.job(bench.cell("prefill", stack))) as session:
        session.settings.transfers.fetched_bytes //= 2
        assert not proof(stack, session).ok


def test_refusals(bench: Any) -> None:
    def reason(stack: str, device: Any) -> str:
        return str(unsupported(bench.cell("prefill", stack), device))

    assert "needs an accelerator" in reason("offload", bench.device())
    assert reason("offload:to=disk", bench.device()) == "None"
    assert reason("bf16+offload", bench.device("cuda")) == "None"
    assert "from 0 to 1" in reason("offload:keep=1.5,to=disk", bench.device())
    assert "does not go with compile" in reason("offload:to=disk+compile", bench.device())
    assert "does not go with nf4" in reason("nf4+offload:to=disk", bench.device())


def test_layers_are_whole() -> None:
    assert [kept_layers(32, keep) for keep in (0, 0.25, 0.5, 0.75, 1.0)] == [0, 8, 16, 24, 32]
    assert kept_layers(2, 0.9) == 2


def test_planning_knows_that_less_is_on_the_device(bench: Any) -> None:
    model = ModelSpec(id="8b", source="random", reference="llama-3.1-8b", kind="language")
    sizes = [
        lower_bound(bench.cell("prefill", stack, model)).weight_bytes
        for stack in ("bf16", "bf16+offload:keep=0.5", "bf16+offload:keep=0")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(sizes[1] - sizes[2], rel=1e-6)
    assert sizes[2] < 2.2e9, "embeddings and head"
