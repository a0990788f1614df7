"""Half precision: fp16 weights in inference; in training autocast with a persistent gradient scaler."""

from tasks.optimizations._precision import Precision


class Fp16(Precision):
    name = "fp16"
    summary = "fp16 weights; in training autocast with one persistent GradScaler"
    dtype = "float16"
