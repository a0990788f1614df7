"""On a real card: training techniques take effect, save the memory that they claim, and leave the gradients alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.device import DeviceInfo
from tasks.optimization import Evidence
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import Supervisor

# Warnings are shown and no errors here: drivers, cards and versions differ from those that the other tests run on.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("torch_settings"),
]

# Twelve blocks with parameters large enough to be paged, and activations that outweigh them: 85 million parameters.
TRAINED = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
STACKS = [
    *("fp32", "tf32", "fp16", "bf16"),
    *("fp32+sgd", "fp16+sgd", "bf16+adamw-8bit", "bf16+paged-adamw", "bf16+paged-adamw-8bit", "fp16+paged-adamw-8bit"),
    *("fp32+checkpointing", "bf16+checkpointing", "bf16+checkpointing:mode=selective"),
    *("bf16+sdpa-flash+checkpointing", "bf16+sdpa-flash+checkpointing:mode=selective"),
    *("bf16+sdpa-efficient+checkpointing:mode=selective", "bf16+sdpa-cudnn+checkpointing:mode=selective"),
    *("fp32+accumulation:micro_batches=8", "tf32+accumulation", "fp16+accumulation", "bf16+accumulation"),
    *("bf16+compile", "bf16+checkpointing+compile", "bf16+accumulation+compile"),
    "bf16+accumulation+compile:mode=reduce-overhead",
    *("lora", "fp32+lora", "bf16+lora", "fp16+lora", "bf16+nf4+lora", "bf16+int8+lora", "nf4+lora"),
    "bf16+nf4+lora+paged-adamw-8bit+checkpointing+accumulation:micro_batches=8",
]


@pytest.fixture(scope="module")
def model(bench: Any) -> ModelSpec:
    return bench.random_model("trained-llama", TRAINED, "language")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def slot(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    folder = tmp_path_factory.mktemp("slot")
    supervisor = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    supervisor.start()
    yield supervisor
    supervisor.close()


@pytest.fixture(scope="module")
def row_of(slot: Supervisor, card: DeviceInfo, bench: Any, model: ModelSpec) -> Callable[[str], dict[str, Any]]:
    """The row of a training step of 8 x 512 tokens, measured once per stack."""

    @cache
    def measured(stack: str) -> dict[str, Any]:
        cell = replace(bench.cell("train_step", stack, model, batch_size=8, sequence_length=512), hardware=card.tag)
        refusal = unsupported(cell, card)
        if refusal:
            return {"outcome": "unsupported", "reason": refusal}
        return slot.measure(bench.job(cell, device=card, timeout_s=240.0)).row  # type: ignore[no-any-return]

    return measured


def ok(row: dict[str, Any]) -> dict[str, Any]:
    if row["outcome"] == "unsupported":
        pytest.skip(row["reason"])
    assert row["outcome"] == "ok", (row.get("reason"), row.get("evidence"))
    return row


def test_every_training_technique_is_here() -> None:
    used = {technique.name for stack in STACKS for technique in parse_stack(stack).techniques}
    assert {name for name, technique in optimizations().items() if technique.needs.workloads == ("train_step",)} <= used


@pytest.mark.parametrize("stack", STACKS)
def test_trains(row_of: Callable[[str], dict[str, Any]], stack: str) -> None:
    row = ok(row_of(stack))
    evidence = json.loads(row["evidence"])
    assert len(evidence) == len(parse_stack(stack).techniques)
    assert all(facts["ok"] for facts in evidence.values()), evidence
    assert "loss_did_not_fall" not in row["flags"]
    assert row["loss_last"] < row["loss_first"]
    # the first scale may be too large for a few steps, which is what it is for
    assert row["optimizer_steps_skipped"] == 0 or stack.startswith("fp16")
    assert row["optimizer_steps_skipped"] <= 5


class TestMemory:
    def test_checkpointing(self, row_of: Callable[[str], dict[str, Any]]) -> None:
        whole, block, selective = (
            ok(row_of(f"bf16+sdpa-flash{mode}"))["peak_allocated_bytes"]
            for mode in ("", "+checkpointing", "+checkpointing:mode=selective")
        )
        assert block < 0.8 * whole
        assert block < selective < whole

    def test_accumulation(self, row_of: Callable[[str], dict[str, Any]]) -> None:
        assert (
            ok(row_of("fp32+accumulation:micro_batches=8"))["peak_allocated_bytes"]
            < 0.6 * ok(row_of("fp32"))["peak_allocated_bytes"]
        )

    @pytest.mark.parametrize(
        ("stack", "bytes_each", "paged"),
        [("bf16", 8, 0), ("fp32+sgd", 4, 0), ("bf16+adamw-8bit", 2, 0), ("bf16+paged-adamw", 8, 8),
         ("bf16+paged-adamw-8bit", 2, 2)],
    )  # fmt: skip
    def test_optimizer_state(
        self, row_of: Callable[[str], dict[str, Any]], stack: str, bytes_each: float, paged: float
    ) -> None:
        row = ok(row_of(stack))
        assert row["optimizer_state_bytes"] == pytest.approx(bytes_each * row["parameters_total"], rel=0.05)
        assert row["optimizer_paged_bytes"] == pytest.approx(paged * row["parameters_total"], rel=0.05)

    def test_paged_state_is_not_the_allocators(self, row_of: Callable[[str], dict[str, Any]]) -> None:
        plain, paged = ok(row_of("bf16")), ok(row_of("bf16+paged-adamw"))
        saved = plain["peak_allocated_bytes"] - paged["peak_allocated_bytes"]
        assert saved == pytest.approx(paged["optimizer_paged_bytes"], rel=0.1)

    def test_adapters(self, row_of: Callable[[str], dict[str, Any]]) -> None:
        full, lora, qlora = (ok(row_of(stack)) for stack in ("bf16", "bf16+lora", "bf16+nf4+lora"))
        assert lora["peak_allocated_bytes"] < full["peak_allocated_bytes"]
        assert qlora["model_bytes"] < 0.5 * lora["model_bytes"] < 0.3 * full["model_bytes"]
        assert lora["parameters_trainable"] < 0.1 * full["parameters_trainable"]


def live(bench: Any, card: DeviceInfo, stack: str, model: ModelSpec, **more: Any) -> Any:
    cell = bench.cell("train_step", stack, model, batch_size=4, sequence_length=64)
    refusal = unsupported(cell, card)
    if refusal:
        pytest.skip(refusal)
    return bench.live(bench.job(cell, device=card), **more)


def proof(stack: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(stack).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.mark.parametrize(
    "stack", ["checkpointing", "checkpointing:mode=selective", "accumulation:micro_batches=4", "accumulation+compile"]
)
@pytest.mark.parametrize("prefix", ["fp32", "fp32+lora", "fp32+nf4+lora"])
def test_same_gradient(bench: Any, card: DeviceInfo, model: ModelSpec, prefix: str, stack: str) -> None:
    found = []
    for applied in (prefix, f"{prefix}+{stack}"):
        with live(bench, card, applied, model, calls=0) as session:
            found.append([g.cpu() for g in session.step.gradients(session.step.micro_batches())])
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(*found, strict=True))
    assert (apart / sum(float(b.double().square().sum()) for b in found[0])) ** 0.5 < 1e-3


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_loss_stays_near_that_of_fp32(bench: Any, card: DeviceInfo, precision: str) -> None:
    """20 steps of pocket with the same seeds: within 2 %, as on a CPU."""
    losses = []
    for stack in ("fp32", precision):
        with live(bench, card, stack, bench.POCKET, calls=0) as session:
            for index in range(20):
                session.step.run(index, lambda _label: None)
            if session.step.optimizer_steps() < 20:
                pytest.skip("the scaler skipped its first steps: other steps were taken")
            losses.append(session.step.losses())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class TestPretenders:
    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            ("paged-adamw", "bf16"),
            ("paged-adamw", "bf16+paged-adamw-8bit"),
            ("paged-adamw-8bit", "bf16+adamw-8bit"),
            ("paged-adamw-8bit", "bf16+paged-adamw"),
            ("adamw-8bit", "bf16+paged-adamw-8bit"),
            ("checkpointing", "bf16"),
            ("checkpointing", "bf16+checkpointing:mode=selective"),
            ("checkpointing:mode=selective", "bf16+checkpointing"),
            ("checkpointing:mode=selective", "bf16"),
            ("accumulation:micro_batches=4", "bf16+accumulation"),
        ],
    )
    def test_is_caught(self, bench: Any, card: DeviceInfo, model: ModelSpec, name: str, applied: str) -> None:
        with live(bench, card, f"bf16+{name}", model, applied=applied) as session:
            assert not proof(name, session).ok

    def test_page_that_is_no_page(self, bench: Any, card: DeviceInfo, model: ModelSpec) -> None:
        """A class that says it pages, and a state on the device."""
        with live(bench, card, "bf16+paged-adamw", model, calls=0) as session:
            session.step.optimizer.is_paged = False
            session.step.run(0, lambda _label: None)
            assert not proof("paged-adamw", session).ok

    def test_scaler_made_anew_each_step(self, bench: Any, card: DeviceInfo) -> None:
        import torch

        with live(bench, card, "fp16", bench.POCKET, calls=6) as session:
            assert proof("fp16", session).ok
            step, honest = session.step, session.step.run

            def anew(index: int, mark: Any) -> None:
                step.scaler = torch.amp.GradScaler("cuda", enabled=True)
                honest(index, mark)

            step.run = anew
            assert not proof("fp16", session).ok
