"""PyTorch's reference implementation behind `scaled_dot_product_attention`."""

from tasks.optimizations._attention import MATH, SdpaBackend


class SdpaMath(SdpaBackend):
    name = "sdpa-math"
    summary = "scaled_dot_product_attention, math backend"
    backend = "MATH"
    operators = (MATH,)
