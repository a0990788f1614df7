"""What the optimizers share: how a training step gets one, and what its state on the live parameters proves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.optimization import Evidence, Needs, Optimization, Unsupported

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session

# bitsandbytes keeps the state of parameters with fewer elements in fp32, and outside of pages.
LEAST_QUANTIZED, LEAST_PAGED = 4096, 100_000


class OptimizerKind(Optimization):
    """An optimizer in AdamW's place; `state_bits` is the least that it keeps per parameter, on the device or in pages.

    `footprint_bits` is what of that must be in device memory.
    """

    family = "optimizer"
    needs = Needs(workloads=("train_step",))
    optimizer_class: ClassVar[str]
    state_bits: ClassVar[float]

    @property
    def footprint_bits(self) -> float:
        return self.state_bits

    def build(self, parameters: list[Any], learning_rate: float) -> Any:
        """The optimizer of these parameters."""
        raise NotImplementedError

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.optimizer = self.build

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The class, and the bits of state that the trained parameters really have."""
        from tasks.metrics.training import state_bytes

        optimizer = session.step.optimizer  # type: ignore[union-attr]
        total, paged = state_bytes(optimizer)
        elements = sum(parameter.numel() for parameter in optimizer.state)
        facts: dict[str, Any] = {
            "optimizer": type(optimizer).__name__,
            "state_elements": dict(state_dtypes(optimizer)),
            "state_bits_per_parameter": 8 * total / elements if elements else None,
            "state_bytes": total,
            "paged_bytes": paged,
        }
        ok = elements > 0 and type(optimizer).__name__ == self.optimizer_class
        return Evidence(ok=ok and self.proven(optimizer), facts=facts)

    def proven(self, optimizer: Any) -> bool:
        """Whether the state is of this kind."""
        return True


class BitsAndBytesOptimizer(OptimizerKind):
    """An AdamW of bitsandbytes: its state quantized in blocks, or in pages that the driver moves to the host."""

    needs = Needs(workloads=("train_step",), packages=("bitsandbytes",))
    quantized: ClassVar[bool] = False
    paged: ClassVar[bool] = False

    @property
    def footprint_bits(self) -> float:
        return 0.0 if self.paged else self.state_bits

    def build(self, parameters: list[Any], learning_rate: float) -> Any:
        import bitsandbytes.optim as optimizers

        least = max(LEAST_QUANTIZED if self.quantized else 0, LEAST_PAGED if self.paged else 0)
        if not any(parameter.numel() >= least for parameter in parameters):
            what = "paged" if self.paged else "quantized"
            raise Unsupported(f"{self.name}: no state would be {what}, every parameter has less than {least} elements")
        return getattr(optimizers, self.optimizer_class)(parameters, lr=learning_rate, weight_decay=1e-2)

    def proven(self, optimizer: Any) -> bool:
        import torch

        for parameter, state in optimizer.state.items():
            moments = [state.get(name) for name in ("state1", "state2")]
            small = parameter.numel() < LEAST_QUANTIZED
            dtype = torch.uint8 if self.quantized and not small else torch.float32
            paged = self.paged and parameter.numel() >= LEAST_PAGED
            if any(moment is None or moment.dtype != dtype for moment in moments):
                return False
            if any(bool(getattr(moment, "is_paged", False)) != paged for moment in moments):
                return False
        return True


def state_dtypes(optimizer: Any) -> Counter[str]:
    """Elements of the state tensors as large as their parameters, by dtype."""
    import torch

    found: Counter[str] = Counter()
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                found[str(value.dtype).removeprefix("torch.")] += value.numel()
    return found
