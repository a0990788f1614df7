"""8-bit weights with one scale per column, activations quantized at every product: ONNX Runtime's dynamic int8.

All activations of a product share one scale, outliers included, which costs more than the weights' rounding does.
On CPUs without VNNI ONNX Runtime's kernels saturate sums of two products at 16 bits: quality there is the machine's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.optimizations._onnx import OnnxRuntime

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.models.onnx_graph import Linear


class OnnxInt8(OnnxRuntime):
    name = "onnx-int8"
    summary = "ONNX graph with int8 weights, activations quantized at run time, run by ONNX Runtime"
    bits = 8.0
    multiplies = "int8"
    operator = "MatMulInteger"
    dtype = "int8"

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is None and device.kind == "cuda":
            return f"{self.name} runs on a CPU: ONNX Runtime quantizes activations there, not on {device.tag}"
        return refusal

    def compress(self, technique: Technique, exported: Path, target: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        from tasks.models.onnx_export import quiet_exporter
        from tasks.models.onnx_graph import head_of

        head = head_of(onnx.load(str(exported), load_external_data=False).graph)
        with quiet_exporter():
            quantize_dynamic(
                exported, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
                nodes_to_exclude=[head], use_external_data_format=exported.with_name(f"{exported.name}.data").exists(),
            )  # fmt: skip

    def linear_bytes(self, linear: Linear, technique: Technique) -> float:
        return linear.inputs * linear.outputs + linear.outputs * (4 + 1)  # a scale and a zero point per column
