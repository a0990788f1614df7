"""8-bit floating point (e4m3) weights and activations, activations scaled at every call: fp8 products (torchao)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.optimizations._torchao import TorchAo
from tasks.stacks import option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo


class AoFp8(TorchAo):
    """`scales`: one per row of the weight and per token, or one for each whole tensor."""

    name = "ao-fp8"
    summary = "torchao fp8 weights and activations, scaled at every call"
    needs = replace(TorchAo.needs, devices=("cuda",), compute_capability=(8, 9))
    options = {"scales": "row"}
    choices = {"scales": ("row", "tensor")}
    tensor = {"cuda": "Float8Tensor"}
    storage = {"cuda": "float8_e4m3fn"}
    dynamic = True
    multiplies = "fp8"
    bits = 8.0
    bf16_only = ("cuda",)

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if device.kind == "cpu":
            return f"{self.name} needs cuda with fp8 products: a cpu would convert every weight back for every call"
        return super().unsupported(cell, device)

    def config(self, technique: Technique, on_cuda: bool) -> Any:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor

        granularity = PerRow() if option(technique, "scales") == "row" else PerTensor()
        return Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)

    def weight_bytes(self, weight: torch.Tensor, technique: Technique) -> float:
        rows, columns = weight.shape
        return float(rows * columns + 4 * (rows if option(technique, "scales") == "row" else 1))

    def kind(self, weight: Any) -> str:
        scales = "row" if weight.scale.numel() == weight.shape[0] else "tensor"
        return f"{super().kind(weight)}, one scale per {scales}"

    def wanted(self, technique: Technique) -> str:
        return f"{super().wanted(technique)}, one scale per {option(technique, 'scales')}"
