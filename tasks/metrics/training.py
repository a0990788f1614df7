"""What training did: the loss before and after, steps taken and skipped, and what the optimizer keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase

if TYPE_CHECKING:
    from tasks.session import Session


class Training(Metric):
    name = "training"
    columns = (
        Column(name="loss_first", type="float", doc="training loss, mean over the input sets, when first seen"),
        Column(name="loss_last", type="float", doc="training loss of the same input sets, when last seen"),
        Column(
            name="loss_at_step_8", type="float", doc="training loss of the eighth call: after equally many everywhere"
        ),
        Column(name="optimizer_steps", type="int", doc="steps that the optimizer took, warm-up included"),
        Column(name="optimizer_steps_skipped", type="int", doc="steps left out since a scaled gradient overflowed"),
        Column(name="optimizer_state_bytes", type="int", doc="what the optimizer keeps per parameter, pages included"),
        Column(name="optimizer_paged_bytes", type="int", doc="of it, in pages that may move to the host: not in peaks"),
    )

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def end(self, phase: Phase, session: Session) -> None:
        step: Any = session.step
        if phase is not Phase.THROUGHPUT or not session.workload.training:
            return
        taken, losses = step.optimizer_steps(), step.losses()
        total, paged = state_bytes(step.optimizer)
        self._found = {
            "optimizer_steps": taken,
            "optimizer_steps_skipped": step.calls - taken,
            "optimizer_state_bytes": total,
            "optimizer_paged_bytes": paged,
        }
        seen = dict(zip(("loss_first", "loss_last"), losses or (None, None), strict=True))
        for name, loss in seen.items():
            self._found[name] = _loss(loss, "no input set was seen twice")
        self._found["loss_at_step_8"] = _loss(step.loss_at_step_8(), f"only {step.calls} steps were asked for")

    def collect(self, session: Session) -> dict[str, Any]:
        reason = "the measuring passes were not reached" if session.workload.training else "nothing is trained"
        return self._found or {column.name: Missing(reason=reason) for column in self.columns}


def _loss(value: float | None, unseen: str) -> float | Missing:
    if value is None:
        return Missing(reason=unseen)
    return value if math.isfinite(value) else Missing(reason="the loss is not finite")


def state_bytes(optimizer: Any) -> tuple[int, int]:
    """Bytes of the optimizer's state tensors, shared ones once, and those of them that are paged."""
    import torch

    seen: dict[int, tuple[int, bool]] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes(), bool(getattr(value, "is_paged", False))
    return sum(size for size, _ in seen.values()), sum(size for size, paged in seen.values() if paged)
