"""FlashAttention-2 of the package flash-attn: the original of the algorithm that PyTorch has a copy of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.optimization import Needs
from tasks.optimizations._attention import FlashPackage

if TYPE_CHECKING:
    import torch

    from tasks.workloads.attention import AttentionShape, Kernel


class FlashAttn2(FlashPackage):
    name = "flash-attn-2"
    summary = "FlashAttention-2 (package flash-attn), Ampere and later"
    needs = Needs(devices=("cuda",), compute_capability=(8, 0), packages=("flash-attn",))
    implementation = "flash_attention_2"
    namespace = "flash_attn"

    def kernel(self, shape: AttentionShape) -> Kernel:
        from flash_attn import flash_attn_func

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            # its layout is (batch, sequence, heads, head_size): views, the rows stay where they are
            rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return flash_attn_func(*rows, causal=shape.causal).transpose(1, 2)

        return kernel
