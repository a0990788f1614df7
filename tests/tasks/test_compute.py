"""FLOPs counted on the meta device against closed forms, and what utilisation divides by."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.metric import Missing
from tasks.metrics.compute import Compute, count_flops
from tasks.models.identity import config_of
from tasks.validity import invalid_reasons


def counted(
    bench: Any, kind: str, model: ModelSpec | None = None, stack: str = "baseline", least: bool = False, **axes: Any
) -> float:
    """FLOPs as the metric counts them; the model itself is not needed, only its configuration."""
    import torch

    from tasks.models.load import LoadedModel, hf_config
    from tasks.row import Row
    from tasks.session import Session

    cell = bench.cell(kind, stack, model, **axes)
    session = Session(job=bench.job(cell, artifact_dir=""), device=torch.device("cpu"), row=Row())
    if model is not None:
        data = config_of(model)
        assert data is not None
        session.loaded = LoadedModel(model=None, weights="random", config=hf_config(data))
    counted_flops = count_flops(session)
    assert not isinstance(counted_flops, Missing)
    return counted_flops[least]


class Llama:
    """The closed form: two FLOPs for a multiply-add, causal attention counted as full."""

    def __init__(self, config: dict[str, Any]) -> None:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        self.layers, self.width = config["num_hidden_layers"], heads * head
        keys = head * config["num_key_value_heads"]
        attention = 2 * hidden * self.width + 2 * hidden * keys
        self.blocks = self.layers * (attention + 3 * hidden * config["intermediate_size"])
        self.head = hidden * config["vocab_size"]

    def attention(self, queries: int, keys: int) -> float:
        return 4.0 * self.layers * self.width * queries * keys

    def forward(self, batch: int, length: int, logits: int) -> float:
        return batch * (2 * self.blocks * length + self.attention(length, length) + 2 * self.head * logits)


class Gpt2(Llama):
    def __init__(self) -> None:
        self.layers, self.width = 12, 768
        self.blocks = 12 * 12 * 768 * 768
        self.head = 768 * 50257


GPT2 = ModelSpec(id="gpt2", source="random", reference="gpt2", kind="language")


@pytest.fixture(params=["pocket", "gpt2", "llama-3.2-1b"])
def known(request: pytest.FixtureRequest, bench: Any) -> tuple[ModelSpec, Llama]:
    if request.param == "gpt2":
        return GPT2, Gpt2()
    model = bench.POCKET
    if request.param != "pocket":
        model = ModelSpec(id=request.param, source="random", reference=request.param, kind="language")
    config = config_of(model)
    assert config is not None
    return model, Llama(config)


class TestClosedForm:
    def test_prefill(self, bench: Any, known: tuple[ModelSpec, Llama]) -> None:
        model, form = known
        found = counted(bench, "prefill", model, batch_size=3, sequence_length=96)
        assert found == pytest.approx(form.forward(3, 96, logits=1), rel=0.01)

    def test_decode(self, bench: Any, known: tuple[ModelSpec, Llama]) -> None:
        """One token for each sequence, at the middle of the answer."""
        model, form = known
        found = counted(bench, "decode", model, batch_size=2, prompt_tokens=64, new_tokens=32)
        assert found == pytest.approx(2 * (2 * form.blocks + form.attention(1, 80) + 2 * form.head), rel=0.01)

    def test_training_is_three_forwards(self, bench: Any, known: tuple[ModelSpec, Llama]) -> None:
        model, form = known
        found = counted(bench, "train_step", model, batch_size=2, sequence_length=64)
        assert found == pytest.approx(3 * form.forward(2, 64, logits=64), rel=0.01)


@pytest.mark.slow
def test_masked_half_is_not_what_must_be_executed(bench: Any, known: tuple[ModelSpec, Llama]) -> None:
    """A query sees itself and what stands before it: (n + 1) / 2n of full attention."""
    model, form = known
    axes = {"batch_size": 2, "sequence_length": 64}
    masked = 2 * form.attention(64, 64) * 63 / 128
    for kind, passes in (("prefill", 1), ("train_step", 3)):
        full, least = (counted(bench, kind, model, least=which, **axes) for which in (False, True))
        assert full - least == pytest.approx(passes * masked, rel=0.01)


def test_masked_half_of_the_kernel(bench: Any) -> None:
    axes = {"batch_size": 1, "heads": 2, "head_size": 16, "sequence_length": 128}
    assert counted(bench, "attention", **axes, least=True) == counted(bench, "attention", **axes)
    causal = {**axes, "causal": True}
    assert counted(bench, "attention", **causal, least=True) == counted(bench, "attention", **axes) * 129 / 256


@pytest.mark.parametrize(("mfu", "least", "reasons"), [(1.5, 0.5, []), (1.5, 1.0, ["above_compute_ceiling"])])
def test_only_what_must_be_executed_can_be_too_fast(bench: Any, mfu: float, least: float, reasons: list[str]) -> None:
    row = {"mfu": mfu, "mbu": None, "flops": 1e9, "flops_least": 1e9 * least, "hardware": "cpu"}
    assert invalid_reasons(row, bench.device()) == reasons


def test_resnet_50_is_the_published_figure(bench: Any) -> None:
    """4.09 G multiply-adds for one image of 224 x 224."""
    model = ModelSpec(id="resnet-50", source="random", reference="resnet-50", kind="vision")
    forward = counted(bench, "forward", model, batch_size=2, image_size=224)
    assert forward == pytest.approx(2 * 2 * 4.09e9, rel=0.01)
    training = counted(bench, "train_step", model, batch_size=2, image_size=224)
    # the first convolution has no gradient of its input
    assert training == pytest.approx(3 * forward, rel=0.04)


def test_attention_kernel(bench: Any) -> None:
    found = counted(bench, "attention", batch_size=4, heads=12, head_size=64, sequence_length=512)
    assert found == 4 * 4 * 12 * 512 * 512 * 64


def test_attention_kernel_with_its_backward_pass(bench: Any) -> None:
    """Against PyTorch's own counter on attention written out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    axes = {"batch_size": 2, "heads": 3, "head_size": 16, "sequence_length": 64, "direction": "forward_backward"}
    with bench.live(bench.job(bench.cell("attention", "eager", **axes)), calls=0) as session:
        with FlopCounterMode(display=False) as counter:
            session.step.run(0, lambda _: None)
        assert torch.is_grad_enabled()
    assert counted(bench, "attention", **axes) == counter.get_total_flops()


@pytest.mark.parametrize("stack", ["fp32", "bf16", "nf4", "fp32+sdpa-math", "compile"])
def test_every_stack_does_the_same_work(bench: Any, stack: str) -> None:
    """Counting the optimised path would make it look like less."""
    assert counted(bench, "prefill", bench.POCKET, stack) == counted(bench, "prefill", bench.POCKET)


class TestMetric:
    def test_mfu_and_its_precision(self, bench: Any) -> None:
        """Divided by the ceiling of the precision that the stack computes in."""
        for stack, key in (("bf16", "bf16"), ("fp32", "fp32"), ("baseline", "fp32")):
            job = bench.job(bench.cell("prefill", stack), profile=bench.INSTANT, ceilings={f"{key}_flop_per_s": 1e12})
            with bench.measured(job) as (session, metrics):
                row = metrics["compute"].collect(session)
                timings = session.timings.throughput
                assert row["mfu"] == pytest.approx(row["flops"] * timings.calls / timings.seconds / 1e12)
                assert isinstance(row["mbu"], Missing)

    def test_products_of_another_kind_have_no_share_of_this_ceiling(self, bench: Any) -> None:
        """Integer products beside the ceiling of bf16 ones: twice as fast is not impossible, and no utilisation."""
        ceilings = {"bf16_flop_per_s": 1.0, "fp32_flop_per_s": 1.0}
        job = bench.job(bench.cell("prefill", "bf16+int8"), profile=bench.INSTANT, ceilings=ceilings)
        with bench.measured(job) as (session, metrics):
            assert metrics["compute"].collect(session)["mfu"].reason == (
                "the int8 matrix product of this device was not measured"
            )

    def test_mbu_of_decode(self, bench: Any) -> None:
        """Weights but for the embedding's rows, and the cache at half of its growth, once for every token."""
        cell = bench.cell("decode", "fp32+static-cache", batch_size=2, prompt_tokens=32, new_tokens=32)
        with bench.measured(bench.job(cell, profile=bench.INSTANT, ceilings={"read_bytes_per_s": 1e9})) as (
            session,
            metrics,
        ):
            row = metrics["compute"].collect(session)
            timings = session.timings.throughput
            weights = 4 * (sum(p.numel() for p in session.model.parameters()) - 256 * 64)
            cache = 2 * 64 * (2 * 2 * 2 * 16) * 4 * (32 + 16) / 64
            per_token_s = timings.seconds / (timings.calls * 31)
            assert row["mbu"] == pytest.approx((weights + cache) / per_token_s / 1e9, rel=0.01)

    def test_without_ceilings(self, bench: Any) -> None:
        with bench.measured(bench.job(bench.cell("prefill"), profile=bench.INSTANT)) as (session, metrics):
            row = metrics["compute"].collect(session)
        assert "was not measured" in row["mfu"].reason

    def test_count_is_kept_for_the_next_round(self, bench: Any, tmp_path: Any) -> None:
        cell = bench.cell("prefill", model=bench.POCKET, sequence_length=24)
        with bench.live(bench.job(cell, artifact_dir=str(tmp_path))) as session:
            first = Compute().collect(session)["flops"]
            (kept,) = (tmp_path / "flops").glob("*.json")
            kept.write_text("[123.0, 100.0]")
            assert Compute().collect(session)["flops"] == 123.0 != first

    def test_factory_has_no_count(self, bench: Any) -> None:
        model, path = bench.factory(
            "import torch\ndef make(): return torch.nn.Linear(2, 2), lambda b, d, s: torch.ones(b, 2)"
        )
        with bench.live(bench.job(bench.cell("forward", model=model), search_path=path)) as session:
            assert "factory" in Compute().collect(session)["flops"].reason
