"""GGUF in llama.cpp on the CPU: the checkpoint becomes a file in one of its types and runs in that runtime.

The file is written by us (`tasks.models.gguf_file`) and quantized by llama.cpp, without an importance matrix. Weights
are loaded into memory, not mapped. Products of quantized weights take activations in 8 bits, and those of F16 weights
in F16; keys and values are F16 and attention is fused, both as llama.cpp does by default. With the type F32 everything
is computed in fp32.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import ArtifactSpec, artifact_spec, wanted
from tasks.models.identity import config_of
from tasks.models.runtime import described, read_config, save_description
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization
from tasks.optimizations._gguf_types import MIXTURES, bits_of, expected_types, is_matrix, stored_bytes
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.job import CellJob
    from tasks.models.gguf_file import StoredTensor
    from tasks.models.llama_cpp import LlamaCpp
    from tasks.models.load import LoadedModel
    from tasks.session import Session

FILE = "model.gguf"
ARITHMETIC = 0.03  # what bytes may differ from the format's arithmetic
BUILD = "CMAKE_ARGS='-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF'"


class Gguf(Optimization):
    name = "gguf"
    family = "compression"
    summary = "GGUF file in one of llama.cpp's types, run by llama.cpp on the CPU"
    needs = Needs(
        devices=("cpu",), packages=("gguf", "llama-cpp-python"), extra="gguf", variables=BUILD,
        workloads=("prefill", "decode"), model_kinds=("language",),
    )  # fmt: skip
    options = {"type": "Q4_K_M"}
    choices = {"type": tuple(MIXTURES)}
    runtime = "llama.cpp"
    multiplies = "int8"
    runtime_takes = ("fp32",)  # what is not quantized is fp32 anyway
    bits = bits_of("Q2_K")  # the least of any type, for the predicted footprint

    def held_share(self, technique: Technique, bytes_per_element: float) -> float:
        """Of the cache that the model would have in torch."""
        return min(1.0, 2 / bytes_per_element)

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is not None:
            return refusal
        if cell.model.source == "factory":
            return f"{self.name} needs a checkpoint of transformers, {cell.model.id} is a factory's module"
        from tasks.models.gguf_file import refused

        try:
            config = config_of(cell.model)
        except (OSError, ValueError):
            config = None
        reason = None if config is None else refused(config)  # without a configuration at hand, making will tell
        return None if reason is None else f"{self.name}: {reason}"

    def artifact(self, technique: Technique, job: CellJob) -> ArtifactSpec:
        libraries = ("gguf", "llama-cpp-python", "torch", "transformers")
        return artifact_spec(technique, job, libraries=libraries, checkpoint=False)

    def make_artifact(self, technique: Technique, session: Session, folder: Path) -> dict[str, Any]:
        import torch

        from tasks.models.gguf_file import read_tensors, write_gguf
        from tasks.models.llama_cpp import quantize

        loaded = session.load()
        key = next(item.spec.key for item in wanted(session.job) if item.technique.name == self.name)
        exact = folder / "exact.gguf"
        write_gguf(loaded.model, exact, key)
        quantize(exact, folder / FILE, _mixture(technique).code, torch.get_num_threads())
        exact.unlink()
        save_description(loaded, folder)
        return _described(read_tensors(folder / FILE))

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        folder = session.artifacts[self.name].folder
        options.loader = lambda session: self._bring(session, technique, folder)

    def _bring(self, session: Session, technique: Technique, folder: Path) -> LoadedModel:
        import torch

        from tasks.models.llama_cpp import LlamaCpp

        exact = option(technique, "type") == "F32"
        model = LlamaCpp(folder / FILE, read_config(folder), threads=torch.get_num_threads(), exact=exact)
        return described(model, session)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The loaded model is the artifact's file; its matrices are in the mixture's types, in the bytes these take."""
        from tasks.models.llama_cpp import LlamaCpp

        model, artifact = session.model, session.artifacts.get(self.name)
        if not isinstance(model, LlamaCpp) or artifact is None:
            return Evidence(ok=False, facts={"runtime": type(model).__name__})
        tensors = model.tensors
        mixture, sizes = _mixture(technique), model.sizes()
        group = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        expected = expected_types(mixture, tensors, group)
        matrices = [tensor for tensor in tensors if is_matrix(tensor)]
        arithmetic = sum(stored_bytes(expected[t.name][1], t) for t in matrices)
        arithmetic += sum(t.elements * 4 for t in tensors if not is_matrix(t))
        held, elements = model.weights.bytes, sum(t.elements for t in tensors)
        wrong = [t.name for t in matrices if t.type != expected[t.name][1]]
        fallen = Counter(pair[1] for pair in expected.values() if pair[0] != pair[1])
        own = _is(model, artifact, tensors)
        facts = {
            **_described(tensors), **own, **_running(model, session),
            "bits_per_weight": 8 * held / elements, "bits_per_weight_by_arithmetic": 8 * arithmetic / elements,
            "in_another_type": wrong[:3], "fallback": dict(fallen),
        }  # fmt: skip
        ok = own["is_the_artifact"] and facts["threads_as_set"] and bool(matrices) and not wrong
        return Evidence(ok=ok and abs(held / arithmetic - 1) < ARITHMETIC, facts=facts)


def _mixture(technique: Technique) -> Any:
    return MIXTURES[str(option(technique, "type"))]


def _described(tensors: list[StoredTensor]) -> dict[str, Any]:
    """Tensors and weights by their type in the file."""
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.type] += tensor.elements
    return {"tensors": dict(Counter(tensor.type for tensor in tensors)), "weights": dict(numbers)}


def _is(model: LlamaCpp, artifact: Any, tensors: list[StoredTensor]) -> dict[str, Any]:
    """Whether what llama.cpp has loaded is the file of this artifact: its key, its bytes and its parameters."""
    from tasks.models.gguf_file import KEY
    from tasks.models.llama_cpp import library

    found = {
        "key": model.metadata(KEY) == artifact.spec.key,
        "file": model.file == artifact.folder / FILE,
        "bytes": model.weights.bytes == sum(tensor.bytes for tensor in tensors),
        "parameters": library().llama_model_n_params(model.handle) == sum(tensor.elements for tensor in tensors),
    }
    return {"is_the_artifact": all(found.values()), "same": found}


def _running(model: LlamaCpp, session: Session) -> dict[str, Any]:
    """How it runs: threads as the contexts have them, the processor's features in use, where the weights lie."""
    import torch

    from tasks.models.llama_cpp import LlamaCppState, library, messages

    live = [state for state in (getattr(session.step, "cache", None), *model.states()) if state is not None]
    threads = sorted({number for state in live if isinstance(state, LlamaCppState) for number in state.threads()})
    return {
        "threads": threads, "threads_as_set": threads == [torch.get_num_threads()],
        "system": " ".join(library().llama_print_system_info().decode().split()),
        "buffers": [line.partition(":")[2].strip() for line in messages() if "model buffer size" in line],
        "mapped": False, "exact_attention": model.exact, "importance_matrix": False,
    }  # fmt: skip
