"""ONNX Runtime beside torch: the same tokens and quality, its own bytes, and evidence that a wrong graph fails."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.metrics.parameters import count_parameters, stored_bytes
from tasks.models.identity import random_config
from tasks.optimization import Evidence, Unsupported
from tasks.registry import optimizations
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported

backends = pytest.mark.backends
FORMATS = ("onnx", "onnx-int8", "onnx-int4", "onnx-int4:group_size=128")
BLOCKS, HEAD, LAYERS = 5 * 786_432, 2048 * 256, 5  # pocket: linear weights of its blocks, its tied embedding
PARAMETERS = 4_459_264


def proof(name: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(name).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


@contextmanager
def tampered(session: Any, name: str, graph: Path) -> Iterator[None]:
    """The artifact's graph is another while the model is loaded again from it."""
    artifact = session.artifacts[name]
    target = artifact.folder / "model.onnx"
    kept = target.read_bytes()
    try:
        shutil.copy(graph, target)
        session.load()
        yield
    finally:
        target.write_bytes(kept)


@pytest.mark.parametrize("stack", ["onnx", "onnx-int4", "prune+onnx-int8"])
def test_is_exported_on_the_host(bench: Any, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp32 model never lies on the card, but for random weights, which the card draws."""
    monkeypatch.setitem(sys.modules, "onnx", ModuleType("onnx"))

    def asked_for(model: ModelSpec, before: str | None = None) -> str:
        job = bench.job(bench.cell("prefill", stack, model))
        chosen = job.cell.stack.techniques[-1]

        def make(session: Session) -> None:
            session.load_options.checkpoint = before
            optimizations()[chosen.name].make_artifact(chosen, session, bench.folder)

        return str(bench.device_asked_for(monkeypatch, job, make))

    assert asked_for(bench.POCKET) == asked_for(bench.language, before="/pruned") == "cpu"
    assert asked_for(bench.language) == "cuda"


@backends
class TestLanguage:
    @pytest.mark.parametrize("name", FORMATS)
    def test_bytes_and_evidence(self, bench: Any, name: str) -> None:
        outputs = 5 * (256 + 128 + 128 + 256 + 768 + 768 + 256)
        by_hand = {
            "onnx": 4 * BLOCKS,
            "onnx-int8": BLOCKS + 5 * outputs,
            "onnx-int4": BLOCKS * (4 + 32 / 32) / 8,
            "onnx-int4:group_size=128": BLOCKS * (4 + 32 / 128) / 8,
        }
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET))) as session:
            assert session.step.problems() == []
            found = proof(name, session)
            model = session.model
            assert count_parameters(model) == (PARAMETERS, 0)
            assert stored_bytes(model) == pytest.approx(by_hand[name] + 4 * (PARAMETERS - BLOCKS), rel=0.001)
            assert model.sizes() == {
                "num_hidden_layers": LAYERS, "intermediate_size": 768, "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }  # fmt: skip
        assert found.ok, found.facts
        assert found.facts["providers"][0] == "CPUExecutionProvider"
        assert (found.facts["threads"], found.facts["inter_op_threads"], found.facts["spinning"]) == (1, 1, "1")
        operator = {"onnx": "MatMul float32", "onnx-int8": "MatMulInteger int8"}.get(name, "MatMulNBits int4")
        assert found.facts["linears"] == {operator: 7 * LAYERS}
        assert found.facts["head"] == ["MatMul float32"]
        operators = found.facts["operators"]
        assert operators[f"CPUExecutionProvider {operator.split()[0]}"] >= 7 * LAYERS
        assert ("CPUExecutionProvider DynamicQuantizeLinear" in operators) == (name == "onnx-int8")
        assert session.artifacts[name.partition(":")[0]].manifest.facts["relative_error"] < 1e-5

    def test_decodes_the_tokens_of_torch(self, bench: Any) -> None:
        """Also in batches, with lengths that were not traced, and request after request in the same buffers."""
        tokens: dict[str, Any] = {}
        for stack in ("fp32", "onnx"):
            cell = bench.cell("decode", stack, bench.POCKET, batch_size=3, prompt_tokens=40, new_tokens=24)
            with bench.live(bench.job(cell)) as session:
                session.step.run(1, lambda _label: None)
                session.step.run(0, lambda _label: None)
                tokens[stack] = session.step.tokens.clone()
                held = session.step.cache_bytes()
                assert session.step.problems() == []
        assert tokens["onnx"].equal(tokens["fp32"])
        # the last token's keys and values are never made
        assert held == 3 * (40 + 24 - 1) * LAYERS * 2 * 2 * 64 * 4

    @pytest.mark.parametrize(("name", "least", "most"), [("onnx", 0.0, 1e-4), ("onnx-int8", 1e-5, 0.03)])
    def test_quality_by_the_same_code(self, bench: Any, name: str, least: float, most: float) -> None:
        """fp32 within 1e-4 of torch's perplexity, dynamic int8 within 3 %."""
        from tasks.quality import judge, make_reference
        from tasks.row import Row
        from tasks.session import Session

        cell = bench.cell("prefill", name, bench.POCKET)
        job = bench.job(cell, quality=True, quality_choices=20)
        with bench.live(job, calls=1) as session:
            make_reference(Session(job=job, device=session.device, row=Row()))
            reading = judge(session)
        ratio = reading.perplexity_log_ratio
        assert least <= abs(math.expm1(ratio)) < most
        assert reading.label == "quality"
        assert reading.top1_agreement > (0.999 if name == "onnx" else 0.9)
        assert reading.choices == 20

    def test_precision_and_pruning_see_what_it_holds(self, bench: Any) -> None:
        small = {**random_config(bench.language.reference), "num_hidden_layers": 1}
        model = bench.random_model("small-onnx", small, "language")
        with bench.live(bench.job(bench.cell("prefill", "fp32+prune+onnx", model))) as session:
            for name in ("fp32", "prune", "onnx"):
                found = proof(name, session)
                assert found.ok, found.facts
            assert session.model.sizes()["intermediate_size"] == 96
            assert session.loaded.weights == "random"

    def test_weights_beside_the_graph(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """As models have them that a protobuf cannot hold."""
        import tasks.models.onnx_export as export

        monkeypatch.setattr(export, "INLINE_BYTES", 1000)
        wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.05}
        model = bench.random_model("wide-onnx", {**random_config(bench.language.reference), **wide}, "language")
        logits = []
        for stack in ("fp32", "onnx", "onnx-int8", "onnx-int4"):
            with bench.live(bench.job(bench.cell("prefill", stack, model))) as session:
                logits.append(session.step.logits.clone())
                if stack != "fp32":
                    found = proof(stack, session)
                    assert found.ok, found.facts
                    folder = session.artifacts[stack].folder
                    assert sorted(path.name for path in folder.glob("model.onnx*")) == ["model.onnx", "model.onnx.data"]
                    assert (folder / "model.onnx.data").stat().st_size > 0.8 * stored_bytes(session.model)
        apart = [float((one - logits[0]).norm() / logits[0].norm()) for one in logits[1:]]
        assert apart[0] < 1e-5 < apart[1] < apart[2] < 0.3

    @pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
    def test_linear_layers_with_biases(self, bench: Any, architecture: str) -> None:
        """Gemm, in GPT-2, or a product and a sum, which ONNX Runtime joins: they are products of two matrices too."""
        config = {"model_type": architecture, "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
        config |= {"gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128}, "qwen2": {}}[architecture]
        if architecture == "qwen2":
            config = {**random_config(bench.language.reference), **config, "num_hidden_layers": 1}
        model = bench.random_model(f"{architecture}-onnx", {**config, "initializer_range": 0.05}, "language")
        logits = []
        for stack in ("fp32", "onnx", "onnx-int8", "onnx-int4"):
            with bench.live(bench.job(bench.cell("prefill", stack, model))) as session:
                logits.append(session.step.logits.clone())
                if stack != "fp32":
                    found = proof(stack, session)
                    assert found.ok, found.facts
        apart = [float((one - logits[0]).norm() / logits[0].norm()) for one in logits[1:]]
        assert apart[0] < 1e-5 < apart[1] < apart[2] < 0.3


@backends
class TestVision:
    def test_same_logits_at_any_size(self, bench: Any) -> None:
        found = {}
        for stack in ("fp32", "onnx"):
            cell = bench.cell("forward", stack, bench.vision, batch_size=3, image_size=40)
            with bench.live(bench.job(cell)) as session:
                found[stack] = session.step.output.logits.clone()
                if stack == "onnx":
                    evidence = proof(stack, session)
                    assert evidence.ok, evidence.facts
                    total = count_parameters(session.model)[0]
                    assert stored_bytes(session.model) == pytest.approx(4 * total, rel=0.03)
        assert float((found["onnx"] - found["fp32"]).norm() / found["fp32"].norm()) < 1e-5


@backends
class TestPretenders:
    @pytest.mark.parametrize(
        ("name", "applied"),
        [("onnx-int8", "onnx"), ("onnx", "onnx-int8"), ("onnx-int4", "onnx-int4:group_size=128"), ("onnx", "fp32")],
    )
    def test_another_technique(self, bench: Any, name: str, applied: str) -> None:
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET)), applied=applied) as session:
            found = proof(name, session)
        assert not found.ok, found.facts

    @pytest.mark.parametrize(("name", "other"), [("onnx-int8", "onnx"), ("onnx", "onnx-int4")])
    def test_another_graph_under_its_name(self, bench: Any, name: str, other: str) -> None:
        with bench.live(bench.job(bench.cell("prefill", other, bench.POCKET)), calls=0) as session:
            graph = session.artifacts[other].folder / "model.onnx"
        with bench.live(bench.job(bench.cell("prefill", name, bench.POCKET)), calls=0) as session:
            assert proof(name, session).ok
            with tampered(session, name, graph):
                found = proof(name, session)
            assert not found.ok, found.facts

    def test_the_right_file_from_another_place(self, bench: Any, tmp_path: Path) -> None:
        with bench.live(bench.job(bench.cell("prefill", "onnx", bench.POCKET)), calls=0) as session:
            artifact = session.artifacts["onnx"]
            shutil.copytree(artifact.folder, tmp_path / "copy")
            session.artifacts["onnx"] = replace(artifact, folder=tmp_path / "copy")
            session.load()
            session.artifacts["onnx"] = artifact
            found = proof("onnx", session)
        assert not found.ok
        assert not found.facts["of_the_artifact"]

    def test_full_weights_kept_beside(self, bench: Any, tmp_path: Path) -> None:
        """Compressed weights are of no use beside the ones that they stand for."""
        import numpy
        import onnx

        with bench.live(bench.job(bench.cell("prefill", "onnx-int8", bench.POCKET)), calls=0) as session:
            graph = onnx.load(session.artifacts["onnx-int8"].folder / "model.onnx")
            extra = onnx.numpy_helper.from_array(numpy.zeros((256, 768), dtype=numpy.float32), "kept_in_full")
            graph.graph.initializer.append(extra)
            onnx.save(graph, tmp_path / "more.onnx")
            with tampered(session, "onnx-int8", tmp_path / "more.onnx"):
                found = proof("onnx-int8", session)
        assert not found.ok, found.facts


@backends
@pytest.mark.timeout(1500)
class TestCell:
    def test_whole_cells_share_the_artifact(self, bench: Any, supervisor: Any) -> None:
        rows = []
        for kind, round_ in (("decode", 0), ("prefill", 1)):
            cell = bench.cell(kind, "onnx-int8", bench.POCKET)
            job = bench.job(cell, round=round_, quality=kind == "prefill", timeout_s=240.0)
            rows.append(supervisor.measure(job).row)
        for row in rows:
            assert row["outcome"] == "ok", (row.get("reason"), row.get("invalid_reasons"))
            assert row["process_kind"] == "fork"
            assert row["parameters_total"] == PARAMETERS
            assert row["model_bytes"] < 0.45 * 4 * PARAMETERS
            assert row["artifact_bytes"] > row["model_bytes"]
            assert row["artifact_made_s"] > 0
            assert row["peak_host_bytes"] > row["model_bytes"]
            assert row["flops"] > 0
            assert json.loads(row["evidence"])["onnx-int8"]["ok"]
        assert rows[1]["artifact_reused"]
        assert rows[0]["artifact_key"] == rows[1]["artifact_key"]
        assert rows[0]["kv_cache_bytes"] > 0
        assert 0 < abs(rows[1]["perplexity_log_ratio"]) < 0.03

    def test_vision(self, bench: Any, supervisor: Any) -> None:
        row = supervisor.measure(bench.job(bench.cell("forward", "onnx"), quality=True, timeout_s=240.0)).row
        assert row["outcome"] == "ok", (row.get("reason"), row.get("invalid_reasons"))
        assert row["top1_agreement"] == 1.0


@backends
def test_importing_says_nothing_and_asks_nobody(tmp_path: Path) -> None:
    """No output, no warning, no connection, while it is imported and a session is made."""
    import subprocess
    import sys

    code = """
import socket, sys
def refuse(*_): raise AssertionError("it wants to talk to somebody")
socket.socket.connect = socket.getaddrinfo = refuse
import onnx, torch
from pathlib import Path
from tasks.models.onnx_model import open_session
from onnx import TensorProto, helper
value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
path = Path(sys.argv[1]) / "relu.onnx"
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
assert open_session(path, torch.device("cpu"), 1).get_providers() == ["CPUExecutionProvider"]
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestRefusal:
    def reason(self, bench: Any, stack: str, model: Any = None, kind: str = "cpu", **packages: Any) -> str:
        found = {**bench.device().packages, "onnx": "1", "onnxscript": "1", "onnxruntime": "1", **packages}
        device = bench.device(kind, packages={name: number for name, number in found.items() if number})
        workload = "forward" if model is bench.vision else "prefill"
        return unsupported(bench.cell(workload, stack, model or bench.POCKET), device) or ""

    def test_none_where_it_runs(self, bench: Any) -> None:
        assert self.reason(bench, "fp32+onnx") == self.reason(bench, "onnx", bench.vision) == ""
        assert self.reason(bench, "onnx-int4", kind="cuda", **{"onnxruntime-gpu": "1"}) == ""
        assert self.reason(bench, "onnx", onnxruntime=None, **{"onnxruntime-gpu": "1"}) == ""

    def test_without_the_runtime(self, bench: Any) -> None:
        assert "pip install '.[onnx]'" in self.reason(bench, "onnx", onnxruntime=None)
        assert "pip install onnxruntime-gpu" in self.reason(bench, "onnx", kind="cuda")

    def test_int8_on_cuda(self, bench: Any) -> None:
        assert "runs on a CPU" in self.reason(bench, "onnx-int8", kind="cuda", **{"onnxruntime-gpu": "1"})

    @pytest.mark.parametrize("other", ["bf16", "compile", "eager", "fused-projections"])
    def test_what_changes_a_torch_model(self, bench: Any, other: str) -> None:
        assert f"onnxruntime: no {other}" in self.reason(bench, f"onnx+{other}")

    def test_models(self, bench: Any) -> None:
        assert "applies to prefill, decode" in self.reason(bench, "onnx-int8", bench.vision)
        code = replace(bench.POCKET, trust_remote_code=True)
        assert "brings its code" in self.reason(bench, "onnx", code)

    @backends
    def test_windows_of_attention(self, bench: Any) -> None:
        config = {**random_config(bench.language.reference), "model_type": "mistral", "sliding_window": 16}
        model = bench.random_model("windowed", config, "language")
        with (
            pytest.raises(Unsupported, match="full attention"),
            bench.live(bench.job(bench.cell("prefill", "onnx", model))),
        ):
            pass
