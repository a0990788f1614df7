"""cuDNN's fused attention, CUDA only, half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimization import Needs
from tasks.optimizations._attention import SdpaBackend
from tasks.stacks import precision_of

if TYPE_CHECKING:
    from tasks.cell import Cell
    from tasks.device import DeviceInfo


class SdpaCudnn(SdpaBackend):
    name = "sdpa-cudnn"
    summary = "scaled_dot_product_attention, cuDNN backend"
    needs = Needs(devices=("cuda",), compute_capability=(8, 0))
    backend = "CUDNN_ATTENTION"
    operators = ("_scaled_dot_product_cudnn_attention",)

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if precision_of(cell) in ("fp32", "tf32"):
            return f"{self.name} needs fp16 or bf16, the stack has {precision_of(cell)}"
        return super().unsupported(cell, device)
