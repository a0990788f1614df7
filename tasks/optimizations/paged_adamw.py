"""AdamW with its moments in unified memory (bitsandbytes): the driver moves pages to the host when memory is short."""

from tasks.optimization import Needs
from tasks.optimizations._optimizer import BitsAndBytesOptimizer


class PagedAdamW(BitsAndBytesOptimizer):
    name = "paged-adamw"
    summary = "bitsandbytes AdamW with moments in pages that may move to the host"
    needs = Needs(workloads=("train_step",), packages=("bitsandbytes",), devices=("cuda",))
    optimizer_class = "PagedAdamW"
    state_bits = 64.0
    paged = True
