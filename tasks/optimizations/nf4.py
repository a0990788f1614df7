"""NF4: 4-bit weights on the quantiles of a normal distribution, one scale per 64 weights (bitsandbytes)."""

from tasks.optimizations._bitsandbytes import FourBit


class Nf4(FourBit):
    name = "nf4"
    summary = "bitsandbytes NF4, one scale per 64 weights; double: scales in 8 bits too"
    code = "nf4"
