"""Memory-efficient attention (xFormers' algorithm), CUDA only, fp32 too."""

from tasks.optimization import Needs
from tasks.optimizations._attention import SdpaBackend


class SdpaEfficient(SdpaBackend):
    name = "sdpa-efficient"
    summary = "scaled_dot_product_attention, memory-efficient backend"
    needs = Needs(devices=("cuda",))
    backend = "EFFICIENT_ATTENTION"
    operators = ("_scaled_dot_product_efficient_attention",)
