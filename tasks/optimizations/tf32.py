"""fp32 weights, products on tensor cores with 10-bit mantissas (Ampere and later)."""

from tasks.optimization import Needs
from tasks.optimizations._precision import Precision


class Tf32(Precision):
    name = "tf32"
    summary = "fp32 weights, matrix products and convolutions in TF32"
    needs = Needs(devices=("cuda",), compute_capability=(8, 0))
    dtype = "float32"
    tf32 = True
