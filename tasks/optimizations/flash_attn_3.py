"""FlashAttention-3 of the package flash-attn-3: asynchronous copies and products of Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._attention import FlashPackage

if TYPE_CHECKING:
    import torch

    from tasks.workloads.attention import AttentionShape, Kernel


class FlashAttn3(FlashPackage):
    name = "flash-attn-3"
    summary = "FlashAttention-3 (package flash-attn-3), Hopper"
    needs = Needs(devices=("cuda",), compute_capability=(9, 0), packages=("flash-attn-3",))
    implementation = "flash_attention_3"
    namespace = "flash_attn_3"

    def kernel(self, shape: AttentionShape) -> Kernel:
        from flash_attn_interface import flash_attn_func

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
            output = flash_attn_func(*rows, causal=shape.causal)
            # its first releases return the log-sum-exp too
            return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

        return kernel
