"""What both 8-bit formats of torchao share: a signed byte per weight, one fp32 scale and one zero point per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimizations._torchao import TorchAo

if TYPE_CHECKING:
    import torch

    from tasks.cell import Technique


class Int8Rows(TorchAo):
    tensor = {"cpu": "Int8Tensor", "cuda": "Int8Tensor"}
    storage = {"cpu": "int8", "cuda": "int8"}
    bits = 8.0

    def weight_bytes(self, weight: torch.Tensor, technique: Technique) -> float:
        rows, columns = weight.shape
        return float(rows * columns + (4 + 1) * rows)
