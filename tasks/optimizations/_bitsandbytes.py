"""What the bitsandbytes techniques share: quantized loading of checkpoints and of random weights, and its proof."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.metrics.parameters import stored_bytes
from tasks.models.identity import model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization
from tasks.stacks import freezes_weights, option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

BLOCK = 64  # weights per scale of a 4-bit layer
NESTED_BLOCK = 256  # scales per scale of scales
TABLE_BYTES = 16 * 4  # the numbers that a 4-bit code stands for, kept beside every weight
NESTED_TABLE_BYTES = 256 * 4 + 4  # the same for the codes of scales, and their mean
ARITHMETIC = 0.03  # what storage may differ from the format's arithmetic


class BitsAndBytes(Optimization):
    """`layer` is the class that must have replaced the linear layers inside the blocks; the head stays as it is."""

    family = "compression"
    needs = Needs(
        packages=("bitsandbytes", "accelerate"),
        model_kinds=("language",),
        workloads=("prefill", "decode", "train_step"),
    )
    layer: ClassVar[str]
    storage: ClassVar[str]
    bits: ClassVar[float]

    def config(self, dtype: str | None, technique: Technique) -> dict[str, Any]:
        """Keyword arguments of transformers' `BitsAndBytesConfig`; `dtype` is what the stack computes in."""
        raise NotImplementedError

    def quantized(self, linear: torch.nn.Linear, technique: Technique) -> torch.nn.Module:
        """The quantized layer of one linear layer with random weights, on its device."""
        raise NotImplementedError

    def layer_bytes(self, layer: Any) -> float:
        """Bytes of one layer's weight by the format's arithmetic, scales and tables included."""
        raise NotImplementedError

    def kind(self, layer: Any) -> str:
        """How one layer is quantized, in a word or two: must be `wanted`."""
        raise NotImplementedError

    def wanted(self, technique: Technique) -> str:
        raise NotImplementedError

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if cell.model.source == "random" and model_type(cell.model) == "gpt2":
            return f"{self.name} replaces linear layers, {cell.model.id} has Conv1D layers in their place"
        if cell.workload.kind == "train_step" and not freezes_weights(cell):
            return f"{self.name} stores weights that cannot be trained: add an adapter, as in {self.name}+lora"
        return super().unsupported(cell, device)

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        # one warning per product, thousands of lines
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if session.job.cell.model.source == "random" and options.checkpoint is None:
            options.keyword_arguments["linear_factory"] = lambda name, linear: (
                linear if "lm_head" in name else self.quantized(linear, technique)
            )
            return
        from transformers import BitsAndBytesConfig

        options.quantization = BitsAndBytesConfig(**self.config(options.dtype, technique))

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every linear layer of the blocks is of the class, quantized as asked, and takes the format's bytes."""
        import torch

        plain: Counter[str] = Counter()
        layers = []
        for name, module in session.model.named_modules():
            if session.workload.training and any(p.requires_grad for p in module.parameters(recurse=False)):
                continue  # an adapter's
            if module.__class__.__module__.startswith("torch.nn") and hasattr(module, "in_features"):
                plain["Linear" if "lm_head" not in name else "head"] += 1
            elif type(module).__name__ == self.layer and type(module).__module__.startswith("bitsandbytes"):
                layers.append(module)
        stored = Counter(str(layer.weight.dtype).removeprefix("torch.") for layer in layers)
        kinds = Counter(self.kind(layer) for layer in layers)
        elements = sum(layer.in_features * layer.out_features for layer in layers)
        biases = sum(0 if layer.bias is None else layer.bias.nbytes for layer in layers)
        held = stored_bytes(torch.nn.ModuleList(layers)) - biases
        expected = sum(self.layer_bytes(layer) for layer in layers)
        facts = {
            "layers": {self.layer: len(layers), **plain}, "storage": dict(stored), "kinds": dict(kinds),
            "bits_per_weight": 8 * held / elements if elements else None,
            "bits_per_weight_by_arithmetic": 8 * expected / elements if elements else None,
        }  # fmt: skip
        ok = bool(layers) and not plain["Linear"] and set(stored) == {self.storage}
        ok = ok and set(kinds) == {self.wanted(technique)} and abs(held / expected - 1) < ARITHMETIC
        return Evidence(ok=ok, facts=facts)


class FourBit(BitsAndBytes):
    """4-bit codes of `code`, one fp32 scale per 64 weights; with `double` scales are 8-bit codes themselves.

    On a CPU with AVX512-BF16 the library rearranges a layer at its first call: scales become bf16, those of scales are
    resolved. Their rounding stays, `double` saves nothing then.
    """

    layer = "Linear4bit"
    storage = "uint8"
    bits = 4.0
    options = {"double": False}
    code: ClassVar[str]

    def config(self, dtype: str | None, technique: Technique) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.code,
            "bnb_4bit_compute_dtype": dtype or "bfloat16",
            "bnb_4bit_use_double_quant": bool(option(technique, "double")),
        }

    def quantized(self, linear: torch.nn.Linear, technique: Technique) -> torch.nn.Module:
        import bitsandbytes as bnb

        how = {"quant_type": self.code, "compress_statistics": bool(option(technique, "double"))}
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            device="meta",
            **how,
        )
        # quantization happens when the weight arrives on the device
        layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, **how)
        layer.bias = linear.bias
        return layer.to(linear.weight.device)  # type: ignore[no-any-return]

    def layer_bytes(self, layer: Any) -> float:
        weights: int = layer.in_features * layer.out_features
        scales = math.ceil(weights / BLOCK)
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            return weights / 2 + 2 * scales + TABLE_BYTES
        if not layer.weight.quant_state.nested:
            return weights / 2 + 4 * scales + TABLE_BYTES
        return weights / 2 + scales + 4 * math.ceil(scales / NESTED_BLOCK) + TABLE_BYTES + NESTED_TABLE_BYTES

    def kind(self, layer: Any) -> str:
        state = layer.weight.quant_state
        nested = state.original_nested if getattr(state, "packing_format_for_cpu", False) else state.nested
        return f"{state.quant_type} double" if nested else str(state.quant_type)

    def wanted(self, technique: Technique) -> str:
        return f"{self.code} double" if option(technique, "double") else self.code
