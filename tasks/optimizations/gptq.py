"""GPTQ (Frantar et al. 2022): weights rounded one column after another, each error made up for by the columns left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.models.packed import Codes, gptq_tensors
from tasks.optimizations._gptq_plan import RTN
from tasks.optimizations._gptqmodel import GROUPS, OPTIONS, GptqModel

if TYPE_CHECKING:
    import torch


class Gptq(GptqModel):
    name = "gptq"
    summary = "GPTQ: 4- or 8-bit weights calibrated on text (GPTQModel; method=rtn: only rounded)"
    options = {**OPTIONS, "method": "gptq"}
    choices = {
        "bits": (4, 8),
        "group_size": GROUPS,
        "kernel": ("auto", "marlin", "triton", "aten", "torch"),
        "method": ("gptq", RTN),
    }
    symmetric = True

    def tensors(self, found: Codes, bits: int) -> dict[str, torch.Tensor]:
        return gptq_tensors(found, bits)

    def quantization_config(self, bits: int, group: int) -> dict[str, Any]:
        return {
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False,
            "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32",
        }  # fmt: skip
