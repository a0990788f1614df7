"""Compressed weights on a real card: bytes by technique, what loading holds at most, options, decoding, compilation."""

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

# Warnings are shown and no errors here: drivers, cards and versions differ from those that the other tests run on.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

# 134 million parameters in the blocks; widths are multiples of 1024, so that no format has to pad.
LAYERS, HIDDEN, INTER = 8, 1024, 4096
MEDIUM_LLAMA = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
# Rows of a block's weights for each of its weights, and bytes per weight of the blocks.
ROWS = (4 * HIDDEN + 2 * INTER + HIDDEN) / (4 * HIDDEN**2 + 3 * HIDDEN * INTER)
BYTES = {
    "int8": 1 + 4 * ROWS,
    "nf4": 0.5 + 4 / 64,
    "fp4": 0.5 + 4 / 64,
    "nf4:double=true": 0.5 + 1 / 64 + 4 / (64 * 256),
    "fp4:double=true": 0.5 + 1 / 64 + 4 / (64 * 256),
    "ao-int8": 1 + 5 * ROWS,
    "ao-int8-dynamic": 1 + 5 * ROWS,
    "ao-int4": 0.5 + 4 / 128,
    "ao-int4:group_size=32": 0.5 + 4 / 32,
    "ao-fp8": 1 + 4 * ROWS,
    "ao-fp8:scales=tensor": 1,
}


@pytest.fixture(scope="module")
def medium(bench: Any) -> ModelSpec:
    return bench.random_model("medium-llama", MEDIUM_LLAMA, "language")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measure(card: DeviceInfo, bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The row of one cell on the card, None where the stack is refused there."""
    folder = tmp_path_factory.mktemp("slot")
    slot = Supervisor(card, cpus=bench.CPUS, log_path=folder / "slot.log", work_dir=folder / "work")
    slot.start()

    def run(kind: str, stack: str, model: ModelSpec, **axes: Any) -> dict[str, Any]:
        cell = replace(bench.cell(kind, stack, model, **axes), hardware=card.tag)
        refusal = unsupported(cell, card)
        if refusal:
            pytest.skip(refusal)
        row = slot.measure(bench.job(cell, device=card, timeout_s=300.0)).row
        assert row["outcome"] == "ok", (stack, row.get("reason"), row.get("evidence"))
        return row

    yield run
    slot.close()


@pytest.fixture(scope="module")
def full(measure: Callable[..., Any], medium: ModelSpec) -> dict[str, Any]:
    return measure("decode", "bf16", medium, prompt_tokens=32, new_tokens=16)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BYTES)
class TestMemory:
    def test_bytes_and_peaks(
        self, measure: Callable[..., Any], medium: ModelSpec, full: dict[str, Any], name: str
    ) -> None:
        """Random weights: the format's bytes, and never the model in full while it is made."""
        row = measure("decode", f"bf16+{name}", medium, prompt_tokens=32, new_tokens=16)
        blocks = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTER)
        rest = full["model_bytes"] - 2 * blocks
        assert row["model_bytes"] == pytest.approx(blocks * BYTES[name] + rest, rel=0.03)
        assert row["parameters_total"] == full["parameters_total"]
        evidence = json.loads(row["evidence"])[name]
        assert evidence["bits_per_weight"] == pytest.approx(8 * BYTES[name], rel=0.03)
        # the packed weights, and the widest layer some times over (in fp32 and int32) while it is packed
        widest = 2 * HIDDEN * INTER
        assert row["peak_allocated_bytes_load"] < row["model_bytes"] + 12 * widest
        assert row["peak_allocated_bytes_load"] < full["model_bytes"]
        assert row["peak_allocated_bytes"] < full["peak_allocated_bytes"]

    def test_checkpoint(
        self, measure: Callable[..., Any], bench: Any, medium: ModelSpec, full: dict[str, Any], name: str
    ) -> None:
        """Trained weights, prefill and decode, never in full on the card; quality is judged elsewhere."""
        for kind in ("prefill", "decode"):
            row = measure(kind, f"bf16+{name}", bench.POCKET)
            assert json.loads(row["evidence"])[name]["ok"]
        row = measure("decode", f"bf16+{name}", bench.stored(medium), prompt_tokens=32, new_tokens=16)
        assert row["peak_allocated_bytes_load"] < full["model_bytes"]


def proof(name: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(name).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.mark.usefixtures("torch_settings")
class TestPretenders:
    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            ("nf4:double=true", "nf4"),
            ("nf4", "nf4:double=true"),
            ("fp4", "nf4"),
            ("nf4", "fp4"),
            ("int8", "ao-int8"),
            ("ao-int8", "int8"),
            ("ao-int8", "ao-int8-dynamic"),
            ("ao-int8-dynamic", "ao-int8"),
            ("ao-int4", "ao-int4:group_size=64"),
            ("ao-int4", "ao-int8"),
            ("ao-fp8", "ao-int8-dynamic"),
            ("ao-fp8", "ao-fp8:scales=tensor"),
            ("ao-fp8", "bf16"),
        ],
    )
    def test_is_caught(self, bench: Any, card: DeviceInfo, medium: ModelSpec, name: str, applied: str) -> None:
        for stack in (name, applied):
            refusal = unsupported(bench.cell("prefill", stack, medium), card)
            if refusal:
                pytest.skip(refusal)
        job = bench.job(bench.cell("prefill", name, medium), device=card)
        with bench.live(job, calls=1) as session:
            found = proof(name, session)
        assert found.ok, found.facts
        with bench.live(job, applied=applied, calls=1) as session:
            found = proof(name, session)
        assert not found.ok, found.facts


@pytest.mark.parametrize("name", ["ao-int8", "ao-int8-dynamic", "ao-int4", "ao-fp8"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_compiled(measure: Callable[..., Any], medium: ModelSpec, kind: str, name: str) -> None:
    """Where torchao's speed is: the compiled step, in decoding on a static cache."""
    cache = "static-cache+" if kind == "decode" else ""
    axes = {"prompt_tokens": 32, "new_tokens": 16} if kind == "decode" else {"sequence_length": 128}
    row = measure(kind, f"bf16+{name}+{cache}compile", medium, batch_size=1 if kind == "decode" else 4, **axes)
    assert row["graphs_compiled"] > 0
    assert all(facts["ok"] for facts in json.loads(row["evidence"]).values())
