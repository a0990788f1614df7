"""bfloat16: the range of fp32 with 8-bit mantissas; in training autocast without a scaler."""

from tasks.optimization import Needs
from tasks.optimizations._precision import Precision


class Bf16(Precision):
    name = "bf16"
    summary = "bf16 weights; in training autocast"
    needs = Needs(compute_capability=(8, 0))
    dtype = "bfloat16"
