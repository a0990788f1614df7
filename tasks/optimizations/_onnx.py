"""What the ONNX techniques share: one exported graph, run by ONNX Runtime, and the proof of what runs there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.artifacts import ArtifactSpec, artifact_spec
from tasks.environment import version
from tasks.models.runtime import RuntimeModel, described, read_config, save_description
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.models.load import LoadedModel
    from tasks.models.onnx_graph import Graph, Linear
    from tasks.models.onnx_model import OnnxModel
    from tasks.session import Session

ARITHMETIC = 0.03  # what the file's initializers may differ from the format's arithmetic
NEAR = 1e-4  # relative distance of the exported graph's outputs from torch's, in fp32
# Operators in which the time goes; ONNX Runtime makes a Gemm of a product with a bias, which is no other arithmetic.
HEAVY = {
    "Conv": "Conv", "Gemm": "MatMul", "MatMul": "MatMul", "MatMulInteger": "MatMulInteger", "MatMulNBits": "MatMulNBits"
}  # fmt: skip
RUNTIMES = {"cpu": ("onnxruntime", "onnxruntime-gpu"), "cuda": ("onnxruntime-gpu",)}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime(Optimization):
    """`operator` and `dtype` are those of the blocks' linear layers; the head and everything else stay in fp32."""

    family = "compression"
    runtime = "onnxruntime"
    runtime_takes = ("fp32",)
    synchronises = "ONNX Runtime launches every operator itself and waits for the last one"
    needs = Needs(
        packages=("onnx", "onnxscript"), optional_packages=("onnxruntime", "onnxruntime-gpu"), extra="onnx",
        model_kinds=("language",), workloads=("prefill", "decode"),
    )  # fmt: skip
    bits: ClassVar[float]
    operator: ClassVar[str]
    dtype: ClassVar[str]

    def compress(self, technique: Technique, exported: Path, target: Path) -> None:
        """Make the graph in `target` from the exported one in fp32, with external data where that has some."""
        raise NotImplementedError

    def linear_bytes(self, linear: Linear, technique: Technique) -> float:
        """Bytes of one linear layer of the blocks by the format's arithmetic: numbers, scales, zero points."""
        raise NotImplementedError

    def as_asked(self, linear: Linear, technique: Technique) -> bool:
        """Whether a linear layer of the blocks is what the technique says."""
        return (linear.operator, linear.dtype) == (self.operator, self.dtype)

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is not None:
            return refusal
        if cell.model.trust_remote_code:
            return f"{self.name} exports transformers' own architectures, {cell.model.id} brings its code"
        if not any(name in device.packages for name in RUNTIMES[device.kind]):
            if device.kind == "cuda":
                how = "pip install onnxruntime-gpu in the place of onnxruntime"
                return f"{self.name} needs onnxruntime-gpu on cuda, which {device.tag} lacks: {how}"
            return f"{self.name} needs onnxruntime, which {device.tag} lacks: pip install '.[onnx]'"
        return None

    def artifact(self, technique: Technique, job: Any) -> ArtifactSpec:
        libraries = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "torch", "transformers")
        return artifact_spec(technique, job, libraries=libraries, checkpoint=False)

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
        """Export in fp32 on the CPU, compare with torch, compress; configuration and tokenizer lie beside the graph."""
        import onnx

        from tasks.metrics.parameters import count_parameters
        from tasks.models.onnx_export import GRAPH, export_graph
        from tasks.models.onnx_graph import read_graph

        vision = session.job.cell.model.kind == "vision"
        attention = None if vision else "eager"
        options = LoadOptions(checkpoint=session.load_options.checkpoint, dtype="float32", attention=attention)
        loaded = session.load(options, session.kept_on(options))
        model = loaded.model.to("cpu")
        made = export_graph(model, folder, vision=vision)
        save_description(loaded, folder)
        made |= {"parameters": count_parameters(model)[0], "relative_error": _compared(model, folder / GRAPH, vision)}
        onnx.checker.check_model(str(folder / GRAPH))
        session.loaded = None  # compression needs the room
        del loaded, model
        if self.operator != "MatMul":
            self._compress(technique, folder)
        graph = read_graph(folder / GRAPH)
        return {**made, "opset": graph.opset, "nodes": graph.operators.total(), "initializers": graph.elements}

    def _compress(self, technique: Technique, folder: Path) -> None:
        import onnx

        from tasks.models.onnx_export import GRAPH

        exported = folder / "fp32"
        exported.mkdir()
        for path in folder.glob(f"{GRAPH}*"):
            path.rename(exported / path.name)
        self.compress(technique, exported / GRAPH, folder / GRAPH)
        onnx.checker.check_model(str(folder / GRAPH))
        for path in exported.iterdir():
            path.unlink()
        exported.rmdir()

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        options.loader = partial(_bring, self.name)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The live session is of the artifact's file, on the device's provider, and its layers are as asked."""
        model, artifact = session.model, session.artifacts.get(self.name)
        if not isinstance(model, RuntimeModel) or model.runtime != self.runtime or artifact is None:
            return Evidence(ok=False, facts={"model": type(model).__name__, "artifact": artifact is not None})
        live: OnnxModel = model  # type: ignore[assignment]
        facts = _session_facts(live)
        ours = artifact.folder.resolve() in Path(facts["file"]).resolve().parents
        parameters = int(artifact.manifest.facts["parameters"])
        expected = self._expected_bytes(live.graph, technique, parameters)
        blocks = [linear for linear in live.graph.linears if not linear.head]
        facts |= {
            "linears": dict(Counter(f"{linear.operator} {linear.dtype}" for linear in blocks)),
            "head": [f"{linear.operator} {linear.dtype}" for linear in live.graph.linears if linear.head],
            "bytes": live.graph.bytes, "bytes_by_arithmetic": expected,
        }  # fmt: skip
        facts["of_the_artifact"] = ours
        weighted = bool(blocks) or live.graph.operators["Conv"] > 0
        ok = ours and weighted and all(self.as_asked(linear, technique) for linear in blocks)
        ok = ok and abs(live.graph.bytes / expected - 1) < ARITHMETIC and _placed_well(live, session.device.type)
        return Evidence(ok=ok and facts["threads"] == facts["threads_wanted"], facts=facts)

    def _expected_bytes(self, graph: Graph, technique: Technique, parameters: int) -> float:
        """All initializers by arithmetic: compressed layers, and the rest of the model's parameters in fp32."""
        blocks = [linear for linear in graph.linears if not linear.head]
        rest = parameters - sum(linear.inputs * linear.outputs for linear in blocks)
        return sum(self.linear_bytes(linear, technique) for linear in blocks) + 4 * rest


def _bring(name: str, session: Session) -> LoadedModel:
    """`LoadOptions.loader`: the artifact's graph in a session on this device."""
    import torch

    from tasks.models.onnx_export import GRAPH
    from tasks.models.onnx_model import OnnxModel, open_session

    artifact = session.artifacts[name]
    path = artifact.folder / GRAPH
    try:
        opened = open_session(path, session.device, torch.get_num_threads())
    except LookupError as refusal:
        raise Unsupported(f"{name}: {refusal}") from refusal
    parameters = int(artifact.manifest.facts["parameters"])
    return described(OnnxModel(opened, path, read_config(artifact.folder), session.device, parameters), session)


def _compared(model: Any, path: Path, vision: bool) -> float:
    """Relative distance of the graph's logits from the model's on other shapes than were traced; both on the CPU.

    Raises `Unsupported` where it is no rounding: the graph then is not the model.
    """
    import torch

    from tasks.models.onnx_model import OnnxModel, open_session

    device = torch.device("cpu")
    ours = OnnxModel(open_session(path, device, torch.get_num_threads()), path, model.config, device, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if vision:
            images = torch.randn(3, model.config.num_channels, 96, 64, generator=generator)
            found, true = ours(images).logits, model(images).logits
        else:
            ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (3, 12), generator=generator)
            state = ours.new_state(3, 12)
            ours(ids[:, :11], past_key_values=state)
            found = torch.cat([ours(ids[:, 11:], past_key_values=state).logits, ours(ids).logits], dim=1)
            true = model(input_ids=ids, use_cache=False).logits
            true = torch.cat([true[:, 11:], true], dim=1)
    error = float((found - true).norm() / true.norm())
    if not error < NEAR:
        raise Unsupported(f"the exported graph is not the model: its logits differ by {error:.2g} of their size")
    return error


def _session_facts(model: OnnxModel) -> dict[str, Any]:
    """Settings and placement as the live session tells them."""
    import onnxruntime
    import torch

    from tasks.models.onnx_model import SPINNING

    options = model.session.get_session_options()
    placed = model.placed()
    return {
        "onnxruntime": onnxruntime.__version__,
        # both may be installed, and the later one is what is imported
        "distribution": next((name for name in RUNTIMES["cpu"] if version(name) == onnxruntime.__version__), None),
        "providers": model.session.get_providers(),
        "file": str(getattr(model.session, "_model_path", None) or model.path),
        "graph_optimization_level": options.graph_optimization_level.name,
        "threads": options.intra_op_num_threads,
        "threads_wanted": torch.get_num_threads(),
        "inter_op_threads": options.inter_op_num_threads,
        "spinning": options.get_session_config_entry(SPINNING),
        "operators": {f"{provider} {name}": count for (provider, name), count in (placed or {}).items()},
    }


def _placed_well(model: OnnxModel, device: str) -> bool:
    """Whether the operators in which the time goes run on the device, and are those of the file."""
    wanted, placed = PROVIDERS[device], model.placed()
    if model.session.get_providers()[0] != wanted:
        return False
    if placed is None:  # an ONNX Runtime that does not tell: what the file holds is what is left
        return True
    elsewhere = [name for (provider, name) in placed if name in HEAVY and provider != wanted]
    live = _heavy((name, count) for (_, name), count in placed.items())
    return live == _heavy(model.graph.operators.items()) and not elsewhere


def _heavy(operators: Iterable[tuple[str, int]]) -> Counter[str]:
    count: Counter[str] = Counter()
    for name, number in operators:
        if name in HEAVY:
            count[HEAVY[name]] += number
    return count
