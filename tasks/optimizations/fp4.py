"""FP4: 4-bit floating-point weights (sign, two bits of exponent, one of mantissa), one scale per 64 (bitsandbytes)."""

from tasks.optimizations._bitsandbytes import FourBit


class Fp4(FourBit):
    name = "fp4"
    summary = "bitsandbytes FP4, one scale per 64 weights; double: scales in 8 bits too"
    code = "fp4"
