"""4-bit weights in groups with one scale, rounded to nearest: ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.optimizations._onnx import OnnxRuntime
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.models.onnx_graph import Linear


class OnnxInt4(OnnxRuntime):
    name = "onnx-int4"
    summary = "ONNX graph with int4 weights in groups, rounded to nearest, run by ONNX Runtime"
    options = {"group_size": 32}
    choices = {"group_size": (16, 32, 64, 128)}
    bits = 4.0
    operator = "MatMulNBits"
    dtype = "int4"

    def compress(self, technique: Technique, exported: Path, target: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        from tasks.models.onnx_export import quiet_exporter
        from tasks.models.onnx_graph import head_of

        loaded = ONNXModel(onnx.load(str(exported)))
        head = head_of(loaded.model.graph)
        loaded.replace_gemm_with_matmul()
        with quiet_exporter():
            quantizer = MatMulNBitsQuantizer(
                loaded.model, bits=4, block_size=int(str(option(technique, "group_size"))), is_symmetric=True,
                nodes_to_exclude=[head],
            )  # fmt: skip
            quantizer.process()
        external = exported.with_name(f"{exported.name}.data").exists()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=external)

    def linear_bytes(self, linear: Linear, technique: Technique) -> float:
        group = int(str(option(technique, "group_size")))
        return linear.inputs * linear.outputs / 2 + 4 * linear.outputs * -(-linear.inputs // group)

    def as_asked(self, linear: Linear, technique: Technique) -> bool:
        return super().as_asked(linear, technique) and linear.group == option(technique, "group_size")
