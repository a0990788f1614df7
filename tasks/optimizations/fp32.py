"""Single precision with TF32 off: the reference that everything is compared with."""

from tasks.optimizations._precision import Precision


class Fp32(Precision):
    name = "fp32"
    summary = "fp32 weights and arithmetic, TF32 off"
    dtype = "float32"
