"""What a checkpoint's configuration says of weights that were published quantized by GPTQ or AWQ; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tasks.cell import ModelSpec
from tasks.models.identity import config_of


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a checkpoint's weights are packed; `refusal` says why it cannot be loaded here, if so."""

    method: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool = False
    zeros_less_one: bool = False
    refusal: str | None = None

    @property
    def description(self) -> str:
        return f"{self.method}, {self.bits} bits in groups of {self.group}"


def packing_of(config: dict[str, Any]) -> Packing | None:
    """What the configuration of a checkpoint says; None where it is not quantized by GPTQ or AWQ."""
    data = config.get("quantization_config") or {}
    method = data.get("quant_method")
    if method not in ("gptq", "awq"):
        return None
    layout = str(data.get("checkpoint_format") or data.get("format") or data.get("version") or "").lower()
    known = {"gptq": ("gptq", "gptq_v2", ""), "awq": ("gemm", "")}[method]
    refusal = None
    if layout not in known:
        refusal = f"its layout {layout!r} is none of {', '.join(filter(None, known))}"
    elif data.get("dynamic"):
        refusal = "its layers are quantized in different ways"
    elif data.get("lm_head"):
        refusal = "its head is quantized too"
    return Packing(
        method=method,
        bits=int(data.get("bits") or data.get("w_bit") or 0),
        group=int(data.get("group_size") or data.get("q_group_size") or 0),
        symmetric=bool(data.get("sym", method == "gptq")) and not (method == "awq" and data.get("zero_point", True)),
        act_order=bool(data.get("desc_act", False)),
        zeros_less_one=method == "gptq" and layout != "gptq_v2",
        refusal=refusal,
    )


@cache
def quantized_already(model: ModelSpec) -> Packing | None:
    """How the model was published quantized, where its configuration is at hand."""
    try:
        return packing_of(config_of(model) or {})
    except (OSError, ValueError, TypeError):
        return None
