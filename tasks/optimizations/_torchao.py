"""What the torchao techniques share: quantized loading of checkpoints and of random weights, and its proof."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.metrics.parameters import storage_bytes
from tasks.models.identity import config_of, model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.stacks import precision_of

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

ARITHMETIC = 0.03  # what storage may differ from the format's arithmetic
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32"}


class TorchAo(Optimization):
    """Linear layers stay what they are; their weights become instances of a class of torchao's.

    `tensor` names that class by device kind, `storage` the dtype of its packed numbers, `dynamic` says whether
    activations are quantized at every call.
    """

    family = "compression"
    needs = Needs(packages=("torchao",), extra="ao", model_kinds=("language",), workloads=("prefill", "decode"))
    tensor: ClassVar[dict[str, str]]
    storage: ClassVar[dict[str, str]]
    dynamic: ClassVar[bool] = False
    bits: ClassVar[float]
    # device kinds whose kernels compute in bf16 only
    bf16_only: ClassVar[tuple[str, ...]] = ()

    def config(self, technique: Technique, on_cuda: bool) -> Any:
        """torchao's configuration object. None of them may set inductor's options: those hold for the whole process."""
        raise NotImplementedError

    def weight_bytes(self, weight: torch.Tensor, technique: Technique) -> float:
        """Bytes of one weight of shape (outputs, inputs) by the format's arithmetic: numbers, scales, zero points."""
        raise NotImplementedError

    def kind(self, weight: Any) -> str:
        """How one weight of the class is quantized, in a word or two: must be `wanted`."""
        return "dynamic" if getattr(weight, "act_quant_kwargs", None) is not None else "weight-only"

    def wanted(self, technique: Technique) -> str:
        return "dynamic" if self.dynamic else "weight-only"

    def environment(self, technique: Technique) -> dict[str, str]:
        # its binaries are for other formats than these, and want one version of torch and CUDA each
        return {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is not None:
            return refusal
        if model_type(cell.model) == "gpt2":
            return f"{self.name} replaces weights of linear layers, {cell.model.id} has Conv1D layers in their place"
        dtype = _dtype(cell)
        if device.kind in self.bf16_only and dtype not in ("bfloat16", None):
            return f"{self.name} computes in bfloat16 on {device.kind}, not in {dtype}: put bf16 into the stack"
        return None

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        config = self.config(technique, session.on_cuda)
        if session.job.cell.model.source == "random":
            options.keyword_arguments["linear_factory"] = lambda name, linear: (
                linear if "lm_head" in name else _quantized(linear, config)
            )
            return
        from transformers import TorchAoConfig

        options.quantization = TorchAoConfig(config)

    def apply(self, technique: Technique, session: Session) -> None:
        """Refuse what torchao left as it was: it says nothing about widths that its formats cannot hold."""
        left = [name for name, weight in _weights(session.model).items() if not _is_torchao(weight)]
        if left:
            width = session.model.get_submodule(left[0]).in_features
            raise Unsupported(f"{self.name} cannot hold {left[0]} and {len(left) - 1} others: {width} inputs")

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """All weights of the blocks are of the class, quantized as asked, in the bytes that the format takes."""
        device = session.device.type
        weights = _weights(session.model)
        done = {name: weight for name, weight in weights.items() if _is_torchao(weight)}
        classes = Counter(type(weight).__name__ for weight in weights.values())
        kinds = Counter(self.kind(w) for w in done.values() if type(w).__name__ == self.tensor.get(device))
        stored = Counter(_packed_dtype(weight) for weight in done.values())
        elements = sum(weight.numel() for weight in done.values())
        held = storage_bytes(done.values())
        right = set(classes) == {self.tensor.get(device)} and set(stored) == {self.storage.get(device)}
        right = right and set(kinds) == {self.wanted(technique)}
        expected = sum(self.weight_bytes(weight, technique) for weight in done.values()) if right else 0.0
        facts = {
            "weights": dict(classes), "head": _head_class(session.model), "storage": dict(stored), "kinds": dict(kinds),
            "bits_per_weight": 8 * held / elements if elements else None,
            "bits_per_weight_by_arithmetic": 8 * expected / elements if expected else None,
        }  # fmt: skip
        ok = expected > 0 and abs(held / expected - 1) < ARITHMETIC and facts["head"] in ("Parameter", None)
        return Evidence(ok=ok, facts=facts)


def _quantized(linear: torch.nn.Linear, config: Any) -> torch.nn.Module:
    from torchao.quantization import quantize_

    quantize_(linear, config)
    return linear


def _weights(model: Any) -> dict[str, Any]:
    """Weights of the linear layers inside the blocks, of whatever class, by the layer's name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "weight") and "lm_head" not in name
    }


def _is_torchao(weight: Any) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _packed_dtype(weight: Any) -> str:
    packed = getattr(weight, "qdata", None)
    return str(packed.dtype).removeprefix("torch.") if packed is not None else "none"


def _head_class(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return None if head is None else type(head.weight).__name__


def _dtype(cell: Cell) -> str | None:
    """What the model's weights are before they are compressed; None where that is not known without loading it."""
    chosen = precision_of(cell)
    if chosen is not None:
        return _DTYPES.get(chosen)
    try:
        config = config_of(cell.model) or {}
    except (OSError, ValueError):
        return None
    found = config.get("dtype") or config.get("torch_dtype")
    return None if found is None else str(found)
