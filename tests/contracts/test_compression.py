"""Compressed weights: bytes by the format's arithmetic, options, random weights layer by layer, and no side effects."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tasks.metrics.parameters import count_parameters, stored_bytes
from tasks.optimization import Evidence, Unsupported
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported

# Inductor imports torch's own TorchScript helpers, which warn since Python 3.11 has a newer way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

backends = pytest.mark.backends
BITSANDBYTES = ("int8", "nf4", "fp4", "nf4:double=true", "fp4:double=true")
TORCHAO = ("ao-int8", "ao-int8-dynamic", "ao-int4", "ao-int4:group_size=32")
STACKS = [*BITSANDBYTES, *(pytest.param(name, marks=backends) for name in TORCHAO)]

# Every width can be grouped by 128.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def wide(bench: Any) -> Any:
    from tasks.models.identity import random_config

    return bench.random_model("wide-llama", {**random_config(bench.language.reference), **WIDE}, "language")


def proof(name: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(name).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks, whatever they have become."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "in_features") and "lm_head" not in name}


def bytes_of(name: str, rows: int, columns: int, *, unpacked: bool) -> float:
    """One bf16 weight by hand. `unpacked`: bitsandbytes has not rearranged it for AVX512-BF16."""
    weights, blocks = rows * columns, rows * columns / 64
    table = 16 * 4
    scales = {
        "int8": weights + 4 * rows,
        "nf4": weights / 2 + (4 if unpacked else 2) * blocks + table,
        "nf4:double=true": weights / 2 + (blocks + 4 * blocks / 256 + 1028 if unpacked else 2 * blocks) + table,
        "ao-int8": weights + 5 * rows,
        "ao-int4": weights / 2 + 2 * 2 * weights / 128,
        "ao-int4:group_size=32": weights / 2 + 2 * 2 * weights / 32,
    }
    return scales[name.replace("fp4", "nf4").replace("-dynamic", "")]


class TestBytes:
    @pytest.mark.parametrize("called", [True, False])
    @pytest.mark.parametrize("name", STACKS)
    def test_are_those_of_the_format(self, bench: Any, name: str, called: bool) -> None:
        with bench.live(bench.job(bench.cell("prefill", f"bf16+{name}", bench.POCKET)), calls=int(called)) as session:
            model, found = session.model, proof(name, session)
            assert found.ok, found.facts
            layers = linears(model)
            packed = any(
                getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False)
                for layer in layers.values()
            )
            held = stored_bytes(model)
        rest = 2 * (2048 * 256 + 11 * 256) + sum(buffer.nbytes for buffer in model.buffers())
        expected = rest + sum(
            bytes_of(name, layer.out_features, layer.in_features, unpacked=not packed) for layer in layers.values()
        )
        assert len(layers) == 5 * 7
        assert held == pytest.approx(expected, rel=0.03)
        assert held < 0.6 * 2 * count_parameters(model)[0]

    @pytest.mark.parametrize("name", STACKS)
    def test_parameters_are_counted_as_weights(self, bench: Any, name: str) -> None:
        counts = []
        for stack in ("bf16", f"bf16+{name}"):
            with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET)), calls=0) as session:
                counts.append(count_parameters(session.model)[0])
        assert counts[0] == counts[1]

    @backends
    def test_fp8_without_a_card(self, bench: Any) -> None:
        """The same class of tensors, weight-only: their bytes can be counted anywhere."""
        import torch
        from torchao.quantization import Float8WeightOnlyConfig, quantize_

        from tasks.metrics.parameters import storage_bytes

        layer = torch.nn.Linear(256, 768, bias=False, dtype=torch.bfloat16)
        quantize_(layer, Float8WeightOnlyConfig(set_inductor_config=False))
        technique, (chosen,) = optimizations()["ao-fp8"], parse_stack("ao-fp8").techniques
        assert storage_bytes([layer.weight]) == technique.weight_bytes(layer.weight, chosen)  # type: ignore[attr-defined]
        assert technique.kind(layer.weight) == "weight-only, one scale per row"  # type: ignore[attr-defined]
        assert technique.wanted(chosen) == "dynamic, one scale per row"  # type: ignore[attr-defined]


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            ("nf4:double=true", "nf4"),
            ("nf4", "nf4:double=true"),
            ("fp4:double=true", "nf4:double=true"),
            ("fp4:double=true", "fp4"),
            pytest.param("ao-int4:group_size=32", "ao-int4", marks=backends),
            pytest.param("ao-int4", "ao-int4:group_size=64", marks=backends),
        ],
    )
    @pytest.mark.parametrize("calls", [0, 1])
    def test_another_is_caught(self, bench: Any, name: str, applied: str, calls: int) -> None:
        cell = bench.cell("prefill", name, bench.POCKET)
        with bench.live(bench.job(cell), applied=applied, calls=calls) as session:
            found = proof(name, session)
        assert not found.ok, found.facts

    @pytest.mark.parametrize(
        "name", [*(n for n in ("int8", "nf4")), *(pytest.param(n, marks=backends) for n in ("ao-int8", "ao-int4"))]
    )
    def test_a_copy_in_full_is_caught(self, bench: Any, name: str) -> None:
        """Compressed weights are of no use beside the ones that they stand for."""
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET)), calls=1) as session:
            assert proof(name, session).ok
            layer = session.model.model.layers[0].mlp.up_proj
            held = layer.weight.data.new_zeros(1) if name in ("int8", "nf4") else layer.weight.qdata
            whole = held.new_zeros(40 * layer.in_features * layer.out_features)
            if name in ("int8", "nf4"):
                layer.register_buffer("kept", whole)
            else:
                layer.weight.qdata = whole[: held.numel()].view(held.shape).copy_(held)
            assert not proof(name, session).ok


def error_of(layer: Any, truth: Any) -> float:
    """Relative error of the weight that a layer multiplies with: its answers to unit vectors."""
    import torch

    with torch.inference_mode():
        answer = layer(torch.eye(truth.shape[1], dtype=torch.bfloat16)).float().T
    return float((answer - truth).norm() / truth.norm())


class TestRandomWeights:
    @pytest.mark.parametrize("name", STACKS)
    def test_are_only_rounded(self, bench: Any, wide: Any, name: str) -> None:
        """What rounding to 4 bits in groups, or 8 bits in rows, costs on a normal distribution."""
        import torch

        from tasks.models.load import load
        from tasks.optimization import LoadOptions

        exact = load(wide, LoadOptions(dtype="float32"), torch.device("cpu"), ()).model
        bound = {"int8": 0.02, "nf4": 0.12, "fp4": 0.15, "ao-int8": 0.02, "ao-int8-dynamic": 0.02, "ao-int4": 0.15}
        with bench.live(bench.job(bench.cell("prefill", f"bf16+{name}", wide)), calls=0) as session:
            assert proof(name, session).ok
            for path, layer in linears(session.model).items():
                error = error_of(layer, exact.get_submodule(path).weight.detach())
                assert 0.001 < error < bound[name.partition(":")[0]], path
            assert type(session.model.lm_head) is torch.nn.Linear
            assert session.model.lm_head.weight.dtype is torch.bfloat16

    @backends
    @pytest.mark.parametrize("name", TORCHAO)
    def test_never_held_in_full(self, bench: Any, wide: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """While one layer is quantized no other layer of the blocks has plain weights."""
        import torch
        import torchao.quantization as quantization

        real, plain, built = quantization.quantize_, [], []

        def watched(layer: Any, *given: Any) -> None:
            built.append(layer)
            plain.append(sum(type(item.weight.data) is torch.Tensor for item in built))
            real(layer, *given)

        monkeypatch.setattr(quantization, "quantize_", watched)
        with bench.live(bench.job(bench.cell("prefill", f"bf16+{name}", wide)), calls=0):
            pass
        assert plain == [1] * 14


@backends
class TestTorchao:
    @pytest.mark.parametrize("name", TORCHAO)
    def test_leaves_inductor_alone(self, bench: Any, name: str) -> None:
        from torch._inductor import config

        before = config.save_config()
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET)), calls=1):
            assert config.save_config() == before

    @pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")
    @pytest.mark.parametrize("name", ["ao-int8", "ao-int8-dynamic", "ao-int4"])
    def test_compiled(self, bench: Any, wide: Any, name: str) -> None:
        """The compiler rounds intermediates elsewhere: it may differ from eager, but not be further from the truth."""
        logits: dict[str, Any] = {}
        for stack in ("fp32", f"bf16+{name}", f"bf16+{name}+compile"):
            with bench.live(bench.job(bench.cell("prefill", stack, wide))) as session:
                assert session.step.problems() == []
                if stack != "fp32":
                    assert proof(name, session).ok
                if "compile" in stack:
                    assert proof("compile", session).ok
                logits[stack] = session.step.logits.float().clone()
        exact = logits.pop("fp32")
        eager, compiled = (float((found - exact).norm() / exact.norm()) for found in logits.values())
        assert eager < 0.5
        assert compiled < 1.25 * eager

    def test_whole_cell_in_a_forked_process(self, bench: Any, supervisor: Any) -> None:
        """The server has torchao blocked, its child must find it."""
        row = supervisor.measure(bench.job(bench.cell("decode", "bf16+ao-int4", bench.POCKET), timeout_s=240.0)).row
        assert row["outcome"] == "ok", row.get("reason")
        assert row["process_kind"] == "fork"
        assert row["parameters_total"] == 4_459_264
        evidence = json.loads(row["evidence"])["ao-int4"]
        assert evidence["ok"]
        assert evidence["bits_per_weight"] == pytest.approx(4.25)

    def test_width_that_torchao_would_skip_in_silence(self, bench: Any) -> None:
        odd = {"head_dim": 24, "hidden_size": 64}
        from tasks.models.identity import random_config

        model = bench.random_model("odd", {**random_config(bench.language.reference), **odd}, "language")
        cell = bench.cell("prefill", "bf16+ao-int4:group_size=64", model)
        assert unsupported(cell, bench.device()) is None, "the projections' widths are not known from the file"
        with pytest.raises(Unsupported, match=r"o_proj.*96 inputs"), bench.live(bench.job(cell)):
            pass

    def test_is_not_joined(self, bench: Any) -> None:
        cell = bench.cell("prefill", "bf16+ao-int8+fused-projections", bench.POCKET)
        with pytest.raises(Unsupported, match="no plain"), bench.live(bench.job(cell)):
            pass


class TestRefusal:
    def reason(self, bench: Any, stack: str, model: Any = None, kind: str = "cuda", **changes: Any) -> str:
        device = bench.device(kind, packages={**bench.device().packages, "torchao": "0.18.0"}, **changes)
        return unsupported(bench.cell("prefill", stack, model or bench.POCKET), device) or ""

    def test_int4_on_cuda_is_bf16(self, bench: Any) -> None:
        assert "bfloat16 on cuda" in self.reason(bench, "fp32+ao-int4")
        assert "bfloat16 on cuda" in self.reason(bench, "ao-int4:group_size=32", bench.language)
        assert self.reason(bench, "ao-int4") == self.reason(bench, "bf16+ao-int4") == ""
        assert self.reason(bench, "fp32+ao-int4", kind="cpu") == ""

    def test_group_that_does_not_divide(self, bench: Any) -> None:
        assert "128 inputs, tiny-llama has 64" in self.reason(bench, "bf16+ao-int4", bench.language)
        assert self.reason(bench, "bf16+ao-int4:group_size=64", bench.language) == ""

    def test_fp8_by_device(self, bench: Any) -> None:
        assert "needs cuda" in self.reason(bench, "bf16+ao-fp8", kind="cpu")
        assert "8.9" in self.reason(bench, "bf16+ao-fp8")
        assert self.reason(bench, "bf16+ao-fp8", compute_capability=(9, 0)) == ""
        assert "bfloat16" in self.reason(bench, "fp16+ao-fp8", compute_capability=(9, 0))

    def test_layers_that_are_not_linear(self, bench: Any) -> None:
        gpt2 = bench.random_model("gpt", {"model_type": "gpt2", "n_embd": 64, "n_layer": 1}, "language")
        for name in ("ao-int8", "ao-int8-dynamic", "ao-int4", "nf4", "fp4"):
            assert "Conv1D" in self.reason(bench, name, gpt2)


def test_rounding_orders_the_formats(bench: Any) -> None:
    """On trained weights 8 bits are nearer than quantiles of a normal distribution, and those than FP4."""
    logits: dict[str, Any] = {}
    for name in ("fp32", "int8", "nf4", "fp4", "nf4:double=true"):
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET, sequence_length=128))) as session:
            logits[name] = session.step.logits.float().clone()
    distance: Callable[[str], float] = lambda name: float((logits[name] - logits["fp32"]).norm())  # noqa: E731
    assert distance("int8") < 0.5 * distance("nf4")
    assert distance("nf4") < distance("fp4")
    assert distance("nf4:double=true") == pytest.approx(distance("nf4"), rel=0.3)
