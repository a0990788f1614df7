"""LLM.int8(): 8-bit weights and activations, outlier columns in half precision (bitsandbytes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimizations._bitsandbytes import BitsAndBytes

if TYPE_CHECKING:
    import torch

    from tasks.cell import Technique

OUTLIER = 6.0  # activations from this size on are multiplied in half precision


class Int8(BitsAndBytes):
    name = "int8"
    summary = "bitsandbytes LLM.int8()"
    layer = "Linear8bitLt"
    storage = "int8"
    bits = 8.0
    multiplies = "int8"
    synchronises = "bitsandbytes looks for outliers of every product on the host"

    def config(self, dtype: str | None, technique: Technique) -> dict[str, Any]:
        return {"load_in_8bit": True, "llm_int8_threshold": OUTLIER}

    def quantized(self, linear: torch.nn.Linear, technique: Technique) -> torch.nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=OUTLIER,
            device="meta",
        )
        # quantization happens when the weight arrives on the device
        layer.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        return layer.to(linear.weight.device)  # type: ignore[no-any-return]

    def layer_bytes(self, layer: Any) -> float:
        return float(layer.in_features * layer.out_features + 4 * layer.out_features)

    def kind(self, layer: Any) -> str:
        return f"rows, outliers from {layer.state.threshold:g}"

    def wanted(self, technique: Technique) -> str:
        return f"rows, outliers from {OUTLIER:g}"
