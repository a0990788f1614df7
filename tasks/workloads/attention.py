"""Scaled dot-product attention as a kernel, without a model, forward or with its backward pass.

An attention technique supplies the kernel through `Settings.attention`; without one it is whatever
`scaled_dot_product_attention` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.cell import WorkloadPoint
from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import waiting_bytes

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

    # from queries, keys and values to the output, each of shape (batch, heads, sequence, head_size)
    Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SETS = 4
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What a kernel may prepare for before it is timed: a mask is the same for every call."""

    sequence_length: int
    causal: bool
    device: torch.device


class Attention(Workload):
    kind = "attention"
    summary = "scaled dot-product attention alone: batch 4, 12 heads of 64, as in the source article"
    axes = {
        "batch_size": 4,
        "heads": 12,
        "head_size": 64,
        "sequence_length": 2048,
        "causal": False,
        "direction": FORWARD,
    }
    choices = {"direction": (FORWARD, FORWARD_BACKWARD)}
    needs_model = False

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {**super().columns(point), "new_tokens": None}

    def needs_gradients(self, point: WorkloadPoint) -> bool:
        return bool(point["direction"] == FORWARD_BACKWARD)

    def prepare(self, session: Session) -> Step:
        import torch

        point = session.job.cell.workload
        dtype = getattr(torch, session.load_options.dtype or "float32")
        generator = torch.Generator(session.device).manual_seed(session.job.seed)
        shape = (point["batch_size"], point["heads"], point["sequence_length"], point["head_size"])
        backward = self.needs_gradients(point)

        def drawn() -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=session.device).to(dtype)

        # queries, keys, values, and for the backward pass the gradient of the output
        inputs = [tuple(drawn().requires_grad_(backward) for _ in range(3)) for _ in range(SETS)]
        gradients = [drawn() for _ in range(SETS)] if backward else None
        make = session.settings.attention or fused
        kernel = make(AttentionShape(sequence_length=shape[2], causal=bool(point["causal"]), device=session.device))
        return AttentionStep(session.compiled(kernel), inputs, gradients)


def fused(shape: AttentionShape) -> Kernel:
    """PyTorch's `scaled_dot_product_attention`, with whichever backend is allowed."""
    import torch

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    return kernel


class AttentionStep(Step):
    """One call is a forward pass, with `gradients` (of the outputs, one for each set of inputs) a backward one too."""

    primary = "call"
    boundaries: Mapping[str, bool] = {}
    unit = "token"

    def __init__(self, function: Kernel, inputs: list[Any], gradients: list[torch.Tensor] | None = None) -> None:
        self._function, self._inputs, self._gradients = function, inputs, gradients
        batch, _, length, _ = inputs[0][0].shape
        self.waiting_bytes = waiting_bytes(inputs) + waiting_bytes(gradients or [])
        self.units_per_call = batch * length
        self.output: Any = None
        self.gradients: tuple[torch.Tensor, ...] = ()  # of queries, keys and values

    def run(self, index: int, mark: Mark) -> None:
        # released before the next ones are made, as a layer of a model would
        self.output, self.gradients = None, ()
        number = index % len(self._inputs)
        output = self._function(*self._inputs[number])
        if self._gradients is not None:
            import torch

            self.gradients = torch.autograd.grad(output, self._inputs[number], self._gradients[number])
        self.output = output.detach()
        mark("call")

    def problems(self) -> list[str]:
        """Every row of the output is a convex combination of values: finite, and shaped as the queries."""
        import torch

        if self.output.shape != self._inputs[0][0].shape:
            return ["wrong_output_shape"]
        if self._gradients is not None and [g.shape for g in self.gradients] != [self.output.shape] * 3:
            return ["wrong_gradient_shape"]
        found = [] if bool(torch.isfinite(self.output).all()) else ["output_not_finite"]
        return found + ([] if all(bool(torch.isfinite(g).all()) for g in self.gradients) else ["gradient_not_finite"])
