"""8-bit weights with one scale per row, converted to the activations' dtype for every product (torchao)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._ao_int8 import Int8Rows

if TYPE_CHECKING:
    from tasks.cell import Technique


class AoInt8(Int8Rows):
    name = "ao-int8"
    summary = "torchao int8 weights, one scale per row"

    def config(self, technique: Technique, on_cuda: bool) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig(set_inductor_config=False)
