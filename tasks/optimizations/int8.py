"""LLM.int8(): 8-bit weights and activations, outlier columns in half precision (bitsandbytes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._bitsandbytes import BitsAndBytes

if TYPE_CHECKING:
    import torch


class Int8(BitsAndBytes):
    name = "int8"
    summary = "bitsandbytes LLM.int8()"
    layer = "Linear8bitLt"
    storage = ("int8",)
    bits = 8.0
    synchronises = "bitsandbytes looks for outliers of every product on the host"

    def config(self, dtype: str | None) -> dict[str, Any]:
        return {"load_in_8bit": True}

    def quantized(self, linear: torch.nn.Linear, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        # quantization happens when the weight arrives on the device
        layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.to(device)  # type: ignore[no-any-return]
