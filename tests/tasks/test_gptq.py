"""GPTQ and AWQ: layouts, refusals, and with GPTQModel (make test-backends) what is made and how it runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks.artifacts import wanted
from tasks.cell import ModelSpec
from tasks.metrics.parameters import count_parameters, stored_bytes
from tasks.models.packing import packing_of
from tasks.optimization import Evidence, Unsupported
from tasks.registry import optimizations
from tasks.row import Row
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
backends = pytest.mark.backends

MADE = {"gptq": "gptq:samples=8", "awq": "awq:samples=4"}  # as in the contracts, which make the same
SMALL = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 512,
    "initializer_range": 0.05,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "dtype": "bfloat16", "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 512,
    "vocab_size": 256,
}  # fmt: skip


def proof(stack: str, session: Any) -> Evidence:
    chosen = next(item for item in parse_stack(stack).techniques if item.name in ("gptq", "awq"))
    return optimizations()[chosen.name].evidence(chosen, session)


@pytest.fixture(scope="module")
def small(bench: Any) -> ModelSpec:
    return bench.random_model("small-llama", SMALL, "language")  # type: ignore[no-any-return]


class TestLayout:
    def test_words_by_hand(self) -> None:
        """Codes 0..7 along the inputs: 0x76543210. AWQ's order along the outputs: 0, 2, 4, 6, 1, 3, 5, 7."""
        import torch

        from tasks.models.packed import Codes, awq_tensors, gptq_tensors

        counted = torch.arange(8, dtype=torch.int32)
        flat = {"scales": torch.ones(8, 1), "zeros": torch.full((8, 1), 8, dtype=torch.int32)}
        gptq = gptq_tensors(Codes(codes=counted.repeat(8, 1), **flat), 4)
        assert gptq["qweight"].tolist() == [[0x76543210] * 8]
        assert gptq["qzeros"].tolist() == [[0x77777777]], "stored less one"
        awq = awq_tensors(Codes(codes=counted[:, None].repeat(1, 8), **flat), 4)
        assert awq["qweight"].tolist() == [[0x75316420]] * 8

    @pytest.mark.parametrize(("method", "bits", "bound"), [("gptq", 4, 0.12), ("gptq", 8, 0.008), ("awq", 4, 0.12)])
    def test_there_and_back(self, method: str, bits: int, bound: float) -> None:
        import torch

        from tasks.models import packed

        torch.manual_seed(0)
        weight = torch.randn(48, 256) + 0.3 * (method == "awq")
        found = packed.round_to_nearest(weight, bits, 64, symmetric=method == "gptq")
        tensors = getattr(packed, f"{method}_tensors")(found, bits)
        back = getattr(packed, f"{method}_weight")(tensors, bits)
        zeros, scales = (x.repeat_interleave(64, 1) for x in (found.zeros, found.scales))
        assert torch.equal(back, scales * (found.codes - zeros))
        assert float((back - weight).norm() / weight.norm()) < bound
        # the greatest of a symmetric group lies half a step beyond the last code, and zero points are whole
        assert ((back - weight).abs() <= 1.01 * scales).all()


class TestRefusal:
    def reason(self, bench: Any, stack: str, model: Any = None, kind: str = "cuda", **changes: Any) -> str:
        packages = {**bench.device().packages, "gptqmodel": "7.6.0", "triton": "3.5"}
        device = bench.device(kind, **{"packages": packages, **changes})
        return unsupported(bench.cell("prefill", stack, model or bench.POCKET), device) or ""

    def test_dtype(self, bench: Any) -> None:
        for name in ("gptq", "awq"):
            assert "put bf16 into the stack" in self.reason(bench, f"fp32+{name}")
            assert "float32" in self.reason(bench, f"{name}:group_size=32", bench.language)
            assert self.reason(bench, f"fp16+{name}") == self.reason(bench, name) == ""

    def test_kernel(self, bench: Any) -> None:
        assert "no kernel marlin on cpu, it has aten, torch" in self.reason(bench, "gptq:kernel=marlin", kind="cpu")
        assert "no kernel aten on cuda, it has marlin, triton" in self.reason(bench, "awq:kernel=aten")
        assert "not 8-bit ones" in self.reason(bench, "gptq:kernel=aten,bits=8", kind="cpu")
        assert "needs compute capability 8.0" in self.reason(bench, "awq:kernel=marlin", compute_capability=(7, 5))
        bare = {"gptqmodel": "7.6.0"}
        assert "pip install triton" in self.reason(bench, "gptq:kernel=triton", packages=bare)
        assert self.reason(bench, "gptq:kernel=marlin", packages=bare) == ""

    def test_group(self, bench: Any, small: ModelSpec) -> None:
        odd = bench.random_model("odd-llama", {**SMALL, "intermediate_size": 192}, "language")
        assert "groups 128 inputs, odd-llama has 192" in self.reason(bench, "awq", odd)
        assert self.reason(bench, "awq:group_size=64", odd) == ""

    def test_package(self, bench: Any) -> None:
        assert "pip install '.[gptq]'" in self.reason(bench, "gptq", packages={})

    def test_random_layers_that_are_not_linear(self, bench: Any) -> None:
        gpt2 = bench.random_model("gpt", GPT2, "language")
        assert "Conv1D" in self.reason(bench, "gptq:method=rtn,group_size=32", gpt2)
        assert "Conv1D" in self.reason(bench, "awq:group_size=32", gpt2)
        assert self.reason(bench, "gptq:group_size=32", gpt2) == ""

    def test_published_quantized(self, bench: Any, tmp_path: Path) -> None:
        how = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "checkpoint_format": "gptq"}

        def model(**changes: Any) -> ModelSpec:
            folder = tmp_path / ("-".join(changes) or "published")  # a checkpoint's packing is read once
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({**SMALL, "quantization_config": {**how, **changes}}))
            return ModelSpec(id="mine", source="path", reference=str(folder), kind="language")

        assert self.reason(bench, "gptq:group_size=64", model()) == ""
        assert "write gptq:bits=4,group_size=64" in self.reason(bench, "gptq", model())
        assert "must have gptq" in self.reason(bench, "awq:group_size=64", model())
        assert "must have gptq" in self.reason(bench, "baseline", model())
        assert "must have gptq" in self.reason(bench, "bf16+nf4", model())
        assert "option text" in self.reason(bench, "gptq:group_size=64,text=a.txt", model())
        assert "must be all" in self.reason(bench, "prune+gptq:group_size=64", model())
        assert "'marlin'" in self.reason(bench, "gptq:group_size=64", model(checkpoint_format="marlin"))
        assert "different ways" in self.reason(bench, "gptq:group_size=64", model(dynamic={"a": {}}))

    def test_configurations_in_the_wild(self) -> None:
        """AutoAWQ's and AutoGPTQ's own words for the same."""
        awq = packing_of({"quantization_config": {
            "quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True,
        }})  # fmt: skip
        assert awq is not None
        assert (awq.bits, awq.group, awq.symmetric, awq.refusal) == (4, 128, False, None)
        gptq = packing_of({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}})
        assert gptq is not None
        assert (gptq.zeros_less_one, gptq.refusal) == (True, None)
        assert packing_of({"quantization_config": {"quant_method": "bitsandbytes"}}) is None
        assert packing_of({}) is None


class TestArtifact:
    def test_one_for_all_kernels(self, bench: Any, small: ModelSpec) -> None:
        def key(stack: str, model: Any = small) -> list[str]:
            return [item.spec.key for item in wanted(bench.job(bench.cell("prefill", stack, model)))]

        assert key("gptq") == key("gptq:kernel=torch") == key("bf16+gptq:kernel=marlin")
        assert (
            len({*key("gptq"), *key("gptq:samples=8"), *key("gptq:bits=8"), *key("gptq:method=rtn", bench.POCKET)}) == 4
        )
        assert key("gptq:method=rtn") == key("awq:method=rtn") == [], "random weights are rounded in place"
        assert len(key("prune+gptq:method=rtn")) == 2, "what was pruned is a checkpoint"


class TestOnTheHost:
    """What is only read and saved need not fit on the card; random weights are the card's own."""

    def asked_for(self, bench: Any, patch: pytest.MonkeyPatch, stack: str, model: ModelSpec, before: str = "") -> str:
        job = bench.job(bench.cell("prefill", stack, model))
        (chosen,) = [item for item in job.cell.stack.techniques if item.name in ("gptq", "awq")]

        def make(session: Session) -> None:
            session.load_options.checkpoint = before or None
            optimizations()[chosen.name].make_artifact(chosen, session, bench.folder)

        patch.setattr("tasks.optimizations._gptq_calibrate.import_library", lambda: None)
        return str(bench.device_asked_for(patch, job, make))

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_rounding(self, bench: Any, small: ModelSpec, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        rounded = f"{method}:method=rtn"
        assert self.asked_for(bench, monkeypatch, rounded, bench.POCKET) == "cpu"
        assert self.asked_for(bench, monkeypatch, f"prune+{rounded}", small, before="/pruned") == "cpu"

    def test_what_is_saved_for_the_library(self, bench: Any, small: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = ModelSpec(id="theirs", source="hub", reference="they/theirs", kind="language")
        assert self.asked_for(bench, monkeypatch, "gptq", hub) == "cpu"
        assert self.asked_for(bench, monkeypatch, "gptq", small) == "cuda"

    def test_rounds_there(self, bench: Any, small: ModelSpec, tmp_path: Path) -> None:
        """The whole of it in a session on a card that is not there."""
        import torch

        job = bench.job(bench.cell("prefill", "gptq:method=rtn", bench.stored(small)))
        (chosen,) = job.cell.stack.techniques
        session = Session(job=job, device=torch.device("cuda"), row=Row())
        facts = optimizations()["gptq"].make_artifact(chosen, session, tmp_path)
        assert facts is not None and facts["method"] == "rtn"
        assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())


class TestBuilding:
    """Marlin is compiled before the cell, once for each dtype, and no other kernel is."""

    @pytest.mark.parametrize(
        ("stack", "expected"),
        [
            ("bf16+gptq", "marlin bf16"),
            ("bf16+awq:kernel=marlin,method=rtn", "marlin bf16"),
            ("fp16+gptq:bits=8", "marlin fp16"),
            ("gptq", "marlin pocket"),
            ("bf16+gptq:kernel=triton", None),
        ],
    )
    def test_names(self, bench: Any, stack: str, expected: str | None) -> None:
        cell = bench.cell("prefill", stack, bench.POCKET)
        chosen = cell.stack.techniques[-1]
        technique = optimizations()[chosen.name]
        assert technique.kernels_to_build(chosen, bench.job(cell, device=bench.device("cuda"))) == expected
        for other in (bench.device(), bench.device("cuda", compute_capability=(7, 5))):
            assert technique.kernels_to_build(chosen, bench.job(cell, device=other)) is None

    @pytest.mark.parametrize(("kernel", "compiled"), [("marlin", True), ("triton", False)])
    def test_compiles_what_will_run(
        self, bench: Any, kernel: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from tasks.optimizations._gptq_kernels import KERNELS

        built: list[torch.dtype] = []

        def prewarm(dtype: torch.dtype) -> bool:
            time.sleep(0.05)
            built.append(dtype)
            return True

        marlin = ModuleType("gptqmodel.utils.marlin")
        marlin.prewarm_marlin_extension = prewarm  # type: ignore[attr-defined]
        for module in (ModuleType("gptqmodel"), ModuleType("gptqmodel.utils"), marlin):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("tasks.optimizations._gptqmodel.choose", lambda *_: KERNELS["awq"][kernel])
        job = bench.job(bench.cell("prefill", "bf16+awq", bench.POCKET))
        session = Session(job=job, device=torch.device("cuda"), row=Row())
        session.load_options.dtype = "bfloat16"
        seconds = optimizations()["awq"].build_kernels(job.cell.stack.techniques[-1], session)
        assert built == ([torch.bfloat16] if compiled else [])
        assert 0.05 <= seconds < 5 if compiled else seconds == 0


class TestOneOperation:
    """Layers whose kernel is an extension, in a compiled step. Marlin itself: tests/gpu."""

    def layers(self) -> Any:
        """Two layers through which no graph goes."""
        import torch

        class Breaking(torch.nn.Module):
            def __init__(self, inputs: int, out_features: int) -> None:
                super().__init__()
                self.weight = torch.nn.Buffer(torch.randn(out_features, inputs))
                self.out_features = out_features

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                torch._dynamo.graph_break()
                padded = torch.nn.functional.pad(self.weight, (0, 0, 0, 3))
                return torch.nn.functional.linear(x, padded)[..., : self.out_features]  # as kernels cut off padding

        torch.manual_seed(0)
        return torch.nn.Sequential(Breaking(8, 12), torch.nn.SiLU(), Breaking(12, 4)).eval()

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_goes_into_one_graph(self, dynamic: bool) -> None:
        import torch

        from tasks.optimizations._gptq_kernels import one_operation

        model = self.layers()
        x = torch.randn(2, 3, 8)
        with torch.inference_mode():
            expected = model(x)
            compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(x)
            torch._dynamo.reset()
            assert [one_operation(model[place]) for place in (0, 2)] == [model[0], model[2]]
            assert model(x).equal(expected), "eager as before"
            compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(compiled(x), expected)
            assert compiled(torch.randn(1, 5, 8)).shape == (1, 5, 4)

    def test_two_models_at_once(self) -> None:
        """Each compiled one calls its own layers, whose weights may change."""
        import torch

        from tasks.optimizations._gptq_kernels import one_operation

        x, models = torch.randn(1, 8), [self.layers(), self.layers()]
        keys = [one_operation(model[place]).operation_key for model in models for place in (0, 2)]
        assert keys == list(range(keys[0], keys[0] + 4)), "places in the order of making, in every process"
        with torch.inference_mode():
            compiled = [torch.compile(model, fullgraph=True) for model in models]
            exact = compiled[0](x)
            torch.testing.assert_close(compiled[1](x), exact)
            models[1][2].weight.mul_(2)
            torch.testing.assert_close(compiled[0](x), exact)
            torch.testing.assert_close(compiled[1](x), 2 * exact)
            torch.testing.assert_close(compiled[0](x), exact)

    def test_the_next_process_finds_what_was_compiled(self, tmp_path: Path) -> None:
        script = """
import torch
from torch._dynamo.utils import counters
from tasks.optimizations._gptq_kernels import one_operation

layers = [torch.nn.Linear(8, 8) for _ in range(2)]
for layer in layers:
    one_operation(layer)
with torch.inference_mode():
    torch.compile(torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1]), fullgraph=True)(torch.ones(2, 8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        said = [
            subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
        assert [run.stdout.split() for run in said] == [["0", "1"], ["1", "0"]]


@backends
class TestMade:
    @pytest.fixture(scope="class", params=["gptq", "awq"])
    @classmethod
    def method(cls, request: Any) -> str:
        return str(request.param)

    def test_every_kernel_gives_the_same(self, bench: Any, method: str) -> None:
        """Storage, and answers that differ by the rounding of bf16; what is kept is what a layer multiplies with."""

        found = {}
        for kernel in ("aten", "torch"):
            stack = f"{MADE[method]},kernel={kernel}"
            with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET))) as session:
                evidence = proof(stack, session)
                assert evidence.ok, evidence.facts
                assert evidence.facts["kernel"] == kernel
                assert evidence.facts["samples"] == int(MADE[method].rpartition("=")[2])
                assert 4.15 < evidence.facts["bits_per_weight"] < 4.36
                assert count_parameters(session.model)[0] == 4_459_264
                found[kernel] = session.step.logits.float().clone()
                # 35 layers in 4.x bits, embeddings and norms in bf16
                blocks = 5 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
                rest = 2 * (2048 * 256 + 11 * 256)
                assert stored_bytes(session.model) == pytest.approx(rest + blocks * 4.25 / 8, rel=0.03)
        assert float((found["aten"] - found["torch"]).norm() / found["torch"].norm()) < 0.02

    def test_calibration_beats_rounding(self, bench: Any, method: str) -> None:
        import torch

        logits: dict[str, Any] = {}
        for stack in ("fp32", f"bf16+{method}:method=rtn", f"bf16+{MADE[method]}"):
            with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET, sequence_length=256))) as session:
                logits[stack] = torch.log_softmax(session.step.logits.float(), -1).clone()
        exact, rounded, calibrated = logits.values()
        divergence = [float((exact.exp() * (exact - other)).sum(-1).mean()) for other in (rounded, calibrated)]
        assert divergence[1] < divergence[0]

    @pytest.mark.timeout(1500)
    def test_whole_cells_make_it_once(self, bench: Any, supervisor: Any, method: str) -> None:
        """In processes of their own, with quality: the second finds what the first has made."""
        limits = {"timeout_s": 300.0, "artifact_timeout_s": 900.0, "quality": True, "quality_choices": 20}
        rows = {}
        for stack in (f"bf16+{MADE[method]}", f"bf16+{method}:method=rtn", f"bf16+{MADE[method]},kernel=torch"):
            cell = bench.cell("decode", stack, bench.POCKET, batch_size=1)
            rows[stack] = row = supervisor.measure(bench.job(cell, **limits)).row
            assert row["outcome"] == "ok", row.get("reason")
            assert row["parameters_total"] == 4_459_264
            assert row["artifact_made_s"] > 0
        calibrated, rounded, again = rows.values()
        assert again["artifact_key"] == calibrated["artifact_key"]
        assert again["artifact_reused"]
        # AWQ's scales gain little from so little text; GPTQ corrects every rounding
        slack = 0.0 if method == "gptq" else 2 * rounded["kl_divergence_stderr"]
        assert 0 < calibrated["kl_divergence"] < rounded["kl_divergence"] + slack
        noise = 2 * (calibrated["perplexity_log_ratio_stderr"] + rounded["perplexity_log_ratio_stderr"])
        assert calibrated["perplexity_log_ratio"] <= rounded["perplexity_log_ratio"] + noise
        assert abs(calibrated["perplexity_log_ratio"]) < 0.03
        assert json.loads(rounded["evidence"])[f"{method}:method=rtn"]["method"] == "rtn"

    def test_nothing_leaks(self, bench: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Environment, root logger and working directory are as before, while it is made too."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "store"))  # torch sets it itself, when it likes
        environment, root = dict(os.environ), logging.getLogger()
        before = (root.level, list(root.handlers))
        small = bench.random_model("leaky-llama", SMALL, "language")
        stack = f"{method}:samples=2,group_size=64"
        with bench.live(bench.job(bench.cell("prefill", stack, small), artifact_dir=str(tmp_path / "store"))):
            assert dict(os.environ) == environment
            assert (root.level, list(root.handlers)) == before
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    def test_starts_from_the_pruned_one(self, bench: Any, method: str) -> None:
        stack = f"prune:ratio=0.34+{method}:method=rtn"
        with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET)), calls=1) as session:
            assert proof(stack, session).ok
            assert {layer.mlp.down_proj.in_features for layer in session.model.model.layers} == {512}

    def test_compiled(self, bench: Any, method: str) -> None:
        logits: dict[str, Any] = {}
        small = bench.random_model("compiled-llama", {**SMALL, "num_hidden_layers": 1}, "language")
        for stack in (f"{method}:method=rtn,group_size=64", f"{method}:method=rtn,group_size=64+compile"):
            with bench.live(bench.job(bench.cell("prefill", stack, small))) as session:
                assert session.step.problems() == []
                assert proof(stack, session).ok
                logits[stack] = session.step.logits.float().clone()
        eager, compiled = logits.values()
        assert float((compiled - eager).norm() / eager.norm()) < 0.02


@backends
class TestRandomWeights:
    def test_layers_of_gpt2(self, bench: Any) -> None:
        """Transposed layers with biases."""
        gpt2 = bench.random_model("tiny-gpt2", GPT2, "language")
        stack = "gptq:samples=2,group_size=32"
        with bench.live(bench.job(bench.cell("prefill", "baseline", gpt2))) as session:
            exact = session.step.logits.float().clone()
        with bench.live(bench.job(bench.cell("prefill", stack, gpt2))) as session:
            evidence = proof(stack, session)
            assert evidence.ok, evidence.facts
            assert sum(evidence.facts["layers"].values()) == 4
            assert float((session.step.logits.float() - exact).norm() / exact.norm()) < 0.1

    @pytest.mark.parametrize("stack", ["gptq:method=rtn", "gptq:method=rtn,bits=8", "awq:method=rtn"])
    def test_rounded_in_place(self, bench: Any, small: ModelSpec, stack: str) -> None:
        """What every layer multiplies with is the seeded weight, rounded; nothing is put into the store."""
        import torch

        from tasks.models.load import load
        from tasks.optimization import LoadOptions

        exact = load(small, LoadOptions(dtype="float32"), torch.device("cpu"), ()).model
        with bench.live(bench.job(bench.cell("prefill", stack, small)), calls=0) as session:
            evidence = proof(stack, session)
            assert evidence.ok, evidence.facts
            assert evidence.facts["method"] == "rtn"
            assert session.artifacts == {}
            for name, layer in session.model.named_modules():
                if hasattr(layer, "qweight"):
                    weight = exact.get_submodule(name).weight
                    with torch.inference_mode():
                        answer = layer(torch.eye(weight.shape[1], dtype=torch.bfloat16)).float().T
                    assert 0.001 < float((answer - weight).norm() / weight.norm()) < 0.15, name

    @pytest.mark.parametrize("method", ["gptq", "awq"])
    def test_one_graph(self, bench: Any, small: ModelSpec, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Marlin's layers go into a compiled step: the library's own, loaded by the techniques."""
        import torch

        from tasks.optimizations._gptq_kernels import KERNELS

        stack = f"{method}:method=rtn,kernel=torch"
        monkeypatch.setitem(KERNELS[method], "torch", replace(KERNELS[method]["torch"], compiled=True))
        with bench.live(bench.job(bench.cell("prefill", stack, small)), calls=1) as session, torch.inference_mode():
            assert proof(stack, session).ok
            ids = torch.arange(12)[None]
            exact = session.model(input_ids=ids, use_cache=False).logits
            graphs: list[Any] = []

            def backend(graph: Any, _inputs: Any) -> Any:
                graphs.append(graph)
                return graph.forward

            model = torch.compile(session.model, fullgraph=True, backend=backend)
            apart = model(input_ids=ids, use_cache=False).logits - exact
        assert float(apart.float().norm() / exact.float().norm()) < 0.02
        (graph,) = graphs
        operations = [node for node in graph.graph.nodes if "packed_linear" in str(node.target)]
        assert len(operations) == sum("Linear" in type(module).__name__ for module in session.model.modules()) - 1


@backends
class TestPretenders:
    @pytest.mark.parametrize(
        ("stack", "applied"),
        [
            (MADE["gptq"], "gptq:method=rtn"),
            ("gptq:method=rtn", MADE["gptq"]),
            ("gptq:method=rtn", "awq:method=rtn"),
            ("awq:method=rtn", "gptq:method=rtn"),
            ("awq:method=rtn", "awq:method=rtn,group_size=64"),
            ("gptq:method=rtn,bits=8", "gptq:method=rtn"),
            ("gptq:method=rtn,kernel=aten", "gptq:method=rtn,kernel=torch"),
            ("gptq:method=rtn", "ao-int4"),
            ("awq:method=rtn", "nf4"),
        ],
    )
    def test_is_caught(self, bench: Any, stack: str, applied: str) -> None:
        with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET)), applied=applied, calls=1) as session:
            found = proof(stack, session)
        assert not found.ok, found.facts

    @pytest.mark.parametrize("stack", ["gptq:method=rtn", "awq:method=rtn"])
    def test_label_and_copy_are_caught(self, bench: Any, stack: str) -> None:
        with bench.live(bench.job(bench.cell("prefill", "bf16", bench.POCKET))) as session:
            session.model.config.quantization_config = {"quant_method": stack.partition(":")[0], "bits": 4}
            session.model.is_quantized = True
            assert not proof(stack, session).ok
        with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET)), calls=1) as session:
            assert proof(stack, session).ok
            layer = session.model.model.layers[0].mlp.up_proj
            layer.kept = layer.qweight.new_zeros(40 * layer.in_features * layer.out_features)
            assert not proof(stack, session).ok


@backends
class TestPublished:
    @pytest.fixture(params=["gptq", "awq"])
    def published(self, request: Any, bench: Any, tmp_path: Path) -> Iterator[tuple[str, ModelSpec, Any]]:
        """A checkpoint that somebody has quantized, and the logits of the stack that made it."""
        stack = f"{request.param}:method=rtn,group_size=64"
        with bench.live(bench.job(bench.cell("prefill", stack, bench.POCKET))) as session:
            logits = session.step.logits.float().clone()
            shutil.copytree(session.artifacts[request.param].folder, tmp_path / "mine")
        (tmp_path / "mine" / "manifest.json").unlink()
        spec = ModelSpec(id="mine", source="path", reference=str(tmp_path / "mine"), kind="language")
        yield f"{request.param}:group_size=64", spec, logits

    def test_is_loaded_as_it_is(self, bench: Any, published: tuple[str, ModelSpec, Any]) -> None:
        import torch

        stack, model, expected = published
        cell = bench.cell("prefill", stack, model)
        assert unsupported(cell, bench.device()) is None
        assert wanted(bench.job(cell)) == []
        with bench.live(bench.job(cell)) as session:
            evidence = proof(stack, session)
            assert evidence.ok, evidence.facts
            assert evidence.facts["method"] == "as published"
            assert torch.equal(session.step.logits.float(), expected)
        plain = replace(cell, stack=parse_stack("fp32"))
        with bench.live(bench.job(plain)) as session:  # the quality reference
            assert {type(layer.mlp.up_proj) for layer in session.model.model.layers} == {torch.nn.Linear}
            assert float((session.step.logits - expected).norm() / expected.norm()) < 0.02

    def test_without_packed_weights(self, bench: Any, tmp_path: Path) -> None:
        shutil.copytree(bench_pocket(), tmp_path / "fake")
        path = tmp_path / "fake" / "config.json"
        how = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
        model = ModelSpec(id="fake", source="path", reference=str(tmp_path / "fake"), kind="language")
        with (
            pytest.raises(Unsupported, match="no packed weights"),
            bench.live(bench.job(bench.cell("prefill", "gptq", model))),
        ):
            pass


def bench_pocket() -> Path:
    from tasks.models.identity import POCKET

    return POCKET
