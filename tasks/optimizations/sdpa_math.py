"""PyTorch's reference implementation behind `scaled_dot_product_attention`."""

from tasks.optimizations._attention import SdpaBackend


class SdpaMath(SdpaBackend):
    name = "sdpa-math"
    summary = "scaled_dot_product_attention, math backend"
    backend = "MATH"
    operators = ("_softmax", "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps")
