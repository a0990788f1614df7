"""AdamW with moments in 8 bits, in unified memory (bitsandbytes): what QLoRA trains with."""

from tasks.optimization import Needs
from tasks.optimizations._optimizer import BitsAndBytesOptimizer


class PagedAdamW8bit(BitsAndBytesOptimizer):
    name = "paged-adamw-8bit"
    summary = "bitsandbytes AdamW with 8-bit moments in pages that may move to the host"
    needs = Needs(workloads=("train_step",), packages=("bitsandbytes",), devices=("cuda",))
    optimizer_class = "PagedAdamW8bit"
    state_bits = 16.0
    quantized = True
    paged = True
