"""NF4: 4-bit weights on the quantiles of a normal distribution, one scale per 64 weights (bitsandbytes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._bitsandbytes import BitsAndBytes

if TYPE_CHECKING:
    import torch


class Nf4(BitsAndBytes):
    name = "nf4"
    summary = "bitsandbytes NF4, one scale per 64 weights"
    layer = "Linear4bit"
    storage = ("uint8",)
    bits = 4.0

    def config(self, dtype: str | None) -> dict[str, Any]:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype or "bfloat16",
        }

    def quantized(self, linear: torch.nn.Linear, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.to(device)  # type: ignore[no-any-return]
