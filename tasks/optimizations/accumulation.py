"""Gradient accumulation: one optimizer step over several micro-batches, which need the activations of one only."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, Needs, Optimization, out_of_memory
from tasks.stacks import option, precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

# Relative distance from the whole batch's gradient. Rounding: 1e-6 in fp32, about 0.5 % where products are in half
# precision, more where the loss nears zero: gradients vanish there, and what rounds does not. One micro-batch of n lost
# is 1 / n where their gradients are alike.
EXACT, ROUNDED = 1e-3, 2e-2


class Accumulation(Optimization):
    name = "accumulation"
    family = "accumulation"
    summary = "gradients of equal micro-batches added up before each optimizer step"
    needs = Needs(workloads=("train_step",))
    options = {"micro_batches": 2}

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        reason = super().unsupported(cell, device)
        if reason:
            return reason
        (chosen,) = (technique for technique in cell.stack.techniques if technique.name == self.name)
        count, batch = int(option(chosen, "micro_batches")), cell.workload["batch_size"]
        if count < 1 or batch % count:
            return f"{self.name} needs micro-batches of equal size: {count} do not divide a batch of {batch}"
        return None

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.micro_batches = int(option(technique, "micro_batches"))

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every forward pass of a step sees a micro-batch, and together they give the whole batch's gradient."""
        count, batch = int(option(technique, "micro_batches")), session.job.cell.workload["batch_size"]
        sizes = forward_sizes(session)
        facts: dict[str, Any] = {"forwards_per_step": len(sizes), "samples_per_forward": sorted(set(sizes))}
        ok = len(sizes) >= count and set(sizes) == {batch // count}
        if ok and count > 1:
            difference, compared = gradient_difference(session)
            facts |= {"gradient_difference": difference, "micro_batches_compared": compared}
            half = session.settings.autocast is not None or precision_of(session.job.cell) != "fp32"
            lost = 0.5 / max(compared, 1)
            tolerance = min(ROUNDED if half else EXACT, lost)
            if difference is not None and difference > tolerance and has_fp32_twin(session):
                facts["gradient_rounding"] = rounding = gradient_rounding(session, compared)
                if rounding is not None:
                    tolerance = min(max(tolerance, 2 * rounding), lost)  # either side is rounded
            facts["gradient_tolerance"] = tolerance
            ok = difference is not None and difference <= tolerance
            if batch_norms(session.model):
                facts["batch_norm"] = "statistics of each micro-batch; frozen where gradients are compared"
                session.row.flag("statistics_per_micro_batch")
        return Evidence(ok=ok, facts=facts)


def forward_sizes(session: Session) -> list[int]:
    """Samples in each forward pass of the model during one step."""
    import torch

    sizes: list[int] = []

    def look(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [item for item in (*arguments, *keywords.values()) if isinstance(item, torch.Tensor)]
        sizes.append(tensors[0].shape[0] if tensors else 0)

    assert session.step is not None
    hook = session.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            session.step.run_short()
    finally:
        hook.remove()
    return sizes


def gradient_difference(session: Session) -> tuple[float | None, int]:
    """Relative distance between accumulated and whole-batch gradient, and how many micro-batches were compared.

    Where the whole batch does not fit in memory, which is what accumulation is for, half as many are compared, down to
    two; None if these do not fit either, or if gradients are not finite.
    """
    step: Any = session.step
    compared = len(step.micro_batches())
    while compared >= 2:
        try:
            return _difference(session, step.micro_batches()[:compared], step.whole(compared)), compared
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        step.optimizer.zero_grad(set_to_none=True)
        _free(session)
        compared //= 2
    return None, 0


def _free(session: Session) -> None:
    import torch

    if session.on_cuda:
        torch.cuda.empty_cache()


def has_fp32_twin(session: Session) -> bool:
    """Whether the same step without its autocast would compute in fp32 throughout."""
    import torch

    floating = {parameter.dtype for parameter in session.model.parameters() if parameter.is_floating_point()}
    return session.settings.autocast is not None and floating == {torch.float32}


def gradient_rounding(session: Session, parts: int) -> float | None:
    """Relative distance of the whole batch's gradient under autocast from that in fp32; None if it does not fit."""
    import torch

    step: Any = session.step
    try:
        with _alike(session.model), torch.compiler.set_stance("force_eager"):
            rounded = _on_the_host(step.gradients([step.whole(parts)]))
            with step.unrounded():
                exact = step.gradients([step.whole(parts)])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        step.optimizer.zero_grad(set_to_none=True)
        return None
    return _distance(rounded, exact)


def _difference(session: Session, parts: Sequence[Any], whole: Any) -> float | None:
    """The micro-batches run as measured, compiled if the stack says so; the whole batch runs eagerly."""
    import torch

    step: Any = session.step
    with _alike(session.model) as frozen:
        # what was compiled for training mode must not be compiled anew for these
        with torch.compiler.set_stance("force_eager" if frozen else "default"):
            # on the host: two sets of gradients may not fit where this technique is needed
            accumulated = _on_the_host(step.gradients(parts))
        with torch.compiler.set_stance("force_eager"):
            expected = step.gradients([whole])
    return _distance(accumulated, expected)


def _on_the_host(gradients: Sequence[Any]) -> list[Any]:
    return [None if gradient is None else gradient.cpu() for gradient in gradients]


def _distance(ours: Sequence[Any], theirs: Sequence[Any]) -> float | None:
    """Norm of the difference over the norm of `theirs`; None where only one has a gradient, or it is not finite."""
    import torch

    apart = size = 0.0
    for our, their in zip(ours, theirs, strict=True):
        if (our is None) != (their is None):
            return None
        if our is not None:
            apart += float(torch.linalg.vector_norm(our.to(their.device) - their, dtype=torch.float64)) ** 2
            size += float(torch.linalg.vector_norm(their, dtype=torch.float64)) ** 2
    difference = (apart / size) ** 0.5 if size else float("nan")
    return difference if math.isfinite(difference) else None


@contextmanager
def _alike(model: Any) -> Iterator[list[Any]]:
    """With the layers in evaluation mode that would treat micro-batches and the whole batch differently."""
    frozen = _frozen_layers(model)
    try:
        for module in frozen:
            module.eval()
        yield frozen
    finally:
        for module in frozen:
            module.train()


def batch_norms(model: Any) -> list[Any]:
    """Layers that normalise by the batch they see."""
    import torch

    return [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]


def _frozen_layers(model: Any) -> list[Any]:
    """What makes a sample's gradient depend on the other samples or on chance: batch statistics and dropout.

    A model with dropout is frozen as a whole, since attention drops inside its own functions.
    """
    import torch

    dropout = [module for module in model.modules() if isinstance(module, torch.nn.modules.dropout._DropoutNd)]
    if any(module.p > 0 for module in dropout):
        return [model]
    return batch_norms(model)
