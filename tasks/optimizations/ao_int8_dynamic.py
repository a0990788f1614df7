"""8-bit weights and, quantized row by row at every call, 8-bit activations: integer products (torchao).

On CUDA the integer product needs more than 16 rows; with fewer, as in decoding few sequences, torchao multiplies the
same numbers in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._ao_int8 import Int8Rows

if TYPE_CHECKING:
    from tasks.cell import Technique


class AoInt8Dynamic(Int8Rows):
    name = "ao-int8-dynamic"
    summary = "torchao int8 weights, and activations quantized to int8 at every call"
    dynamic = True
    multiplies = "int8"

    def config(self, technique: Technique, on_cuda: bool) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
