"""The model as an ONNX graph in fp32, run by ONNX Runtime instead of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.optimization import Needs
from tasks.optimizations._onnx import OnnxRuntime

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.models.onnx_graph import Linear


class Onnx(OnnxRuntime):
    name = "onnx"
    summary = "exported to ONNX in fp32, run by ONNX Runtime"
    needs = Needs(
        packages=OnnxRuntime.needs.packages, optional_packages=OnnxRuntime.needs.optional_packages, extra="onnx",
        model_kinds=("language", "vision"), workloads=("prefill", "decode", "forward"),
    )  # fmt: skip
    bits = 32.0
    operator = "MatMul"
    dtype = "float32"

    def linear_bytes(self, linear: Linear, technique: Technique) -> float:
        return 4.0 * linear.inputs * linear.outputs

    def as_asked(self, linear: Linear, technique: Technique) -> bool:
        return linear.operator in ("MatMul", "Gemm") and linear.dtype == self.dtype
