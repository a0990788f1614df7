"""AdamW with both moments in 8 bits, one scale per block (bitsandbytes): 2 bytes of state per parameter, not 8."""

from tasks.optimizations._optimizer import BitsAndBytesOptimizer


class AdamW8bit(BitsAndBytesOptimizer):
    name = "adamw-8bit"
    summary = "bitsandbytes AdamW with moments in 8 bits"
    optimizer_class = "AdamW8bit"
    state_bits = 16.0
    quantized = True
