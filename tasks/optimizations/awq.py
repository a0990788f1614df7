"""AWQ (Lin et al. 2023): channels that matter to the text are scaled up before weights are rounded to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.models.packed import Codes, awq_tensors
from tasks.optimizations._gptq_plan import RTN
from tasks.optimizations._gptqmodel import GROUPS, OPTIONS, GptqModel

if TYPE_CHECKING:
    import torch


class Awq(GptqModel):
    name = "awq"
    summary = "AWQ: 4-bit weights, channels scaled by what the text needs (GPTQModel; method=rtn: only rounded)"
    options = {**OPTIONS, "method": "awq"}
    choices = {
        "bits": (4,),
        "group_size": GROUPS,
        "kernel": ("auto", "marlin", "triton", "aten", "torch"),
        "method": ("awq", RTN),
    }
    symmetric = False

    def tensors(self, found: Codes, bits: int) -> dict[str, torch.Tensor]:
        return awq_tensors(found, bits)

    def quantization_config(self, bits: int, group: int) -> dict[str, Any]:
        return {
            "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": True, "version": "gemm",
        }  # fmt: skip
