"""Flash attention: tiles in on-chip memory, no scores in device memory (half precision on CUDA; any on CPU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimizations._attention import SdpaBackend
from tasks.stacks import precision_of

if TYPE_CHECKING:
    from tasks.cell import Cell
    from tasks.device import DeviceInfo


class SdpaFlash(SdpaBackend):
    name = "sdpa-flash"
    summary = "scaled_dot_product_attention, flash backend"
    backend = "FLASH_ATTENTION"
    operators = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if device.kind == "cuda" and precision_of(cell) in ("fp32", "tf32"):
            return f"{self.name} on CUDA needs fp16 or bf16, the stack has {precision_of(cell)}"
        if device.kind == "cuda" and device.compute_capability and device.compute_capability < (8, 0):
            return f"{self.name} needs compute capability 8.0, {device.name} has {device.compute_capability}"
        return super().unsupported(cell, device)
