"""What the bitsandbytes techniques share: quantized loading of checkpoints and of random weights, and its proof."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.models.identity import model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization
from tasks.stacks import freezes_weights

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session


class BitsAndBytes(Optimization):
    """`layer` is the class that must have replaced the linear layers inside the blocks; the head stays as it is."""

    family = "compression"
    needs = Needs(
        packages=("bitsandbytes", "accelerate"),
        model_kinds=("language",),
        workloads=("prefill", "decode", "train_step"),
    )
    layer: ClassVar[str]
    storage: ClassVar[tuple[str, ...]]
    bits: ClassVar[float]

    def config(self, dtype: str | None) -> dict[str, Any]:
        """Keyword arguments of transformers' `BitsAndBytesConfig`; `dtype` is what the stack computes in."""
        raise NotImplementedError

    def quantized(self, linear: torch.nn.Linear, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        """The quantized layer of one linear layer with random weights."""
        raise NotImplementedError

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if cell.model.source == "random" and model_type(cell.model) == "gpt2":
            return f"{self.name} replaces linear layers, {cell.model.id} has Conv1D layers in their place"
        if cell.workload.kind == "train_step" and not freezes_weights(cell):
            return f"{self.name} stores weights that cannot be trained: add an adapter, as in {self.name}+lora"
        return super().unsupported(cell, device)

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        # one warning per product, thousands of lines
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if session.job.cell.model.source == "random" and options.checkpoint is None:
            options.keyword_arguments["linear_factory"] = self._random_linear
            return
        from transformers import BitsAndBytesConfig

        options.quantization = BitsAndBytesConfig(**self.config(options.dtype))

    def _random_linear(self, name: str, linear: torch.nn.Linear) -> torch.nn.Module:
        if "lm_head" in name:
            return linear
        return self.quantized(linear, linear.weight.dtype, linear.weight.device)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        kinds: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        elements = stored_bytes = 0
        for name, module in session.model.named_modules():
            if session.workload.training and any(p.requires_grad for p in module.parameters(recurse=False)):
                continue  # an adapter's
            if module.__class__.__module__.startswith("torch.nn") and hasattr(module, "in_features"):
                kinds["Linear" if "lm_head" not in name else "head"] += 1
            elif type(module).__name__ == self.layer and type(module).__module__.startswith("bitsandbytes"):
                kinds[self.layer] += 1
                stored[str(module.weight.dtype).removeprefix("torch.")] += 1
                elements += module.in_features * module.out_features
                stored_bytes += module.weight.untyped_storage().nbytes()
        bits = 8 * stored_bytes / elements if elements else None
        ok = kinds[self.layer] > 0 and kinds["Linear"] == 0 and set(stored) <= set(self.storage)
        ok = ok and bits is not None and bits <= self.bits
        return Evidence(ok=ok, facts={"layers": dict(kinds), "storage": dict(stored), "bits_per_weight": bits})
