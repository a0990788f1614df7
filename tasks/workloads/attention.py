"""Scaled dot-product attention as a kernel, without a model: written out, or through one of PyTorch's backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tasks.cell import WorkloadPoint
from tasks.workload import Mark, Step, Workload
from tasks.workloads._inputs import waiting_bytes

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

SETS = 4


class Attention(Workload):
    kind = "attention"
    summary = "scaled dot-product attention alone: batch 4, 12 heads of 64, as in the source article"
    axes = {"batch_size": 4, "heads": 12, "head_size": 64, "sequence_length": 2048, "causal": False}
    needs_model = False

    def columns(self, point: WorkloadPoint) -> dict[str, int | None]:
        return {**super().columns(point), "new_tokens": None}

    def prepare(self, session: Session) -> Step:
        import torch

        point = session.job.cell.workload
        dtype = getattr(torch, session.load_options.dtype or "float32")
        generator = torch.Generator(session.device).manual_seed(session.job.seed)
        shape = (point["batch_size"], point["heads"], point["sequence_length"], point["head_size"])
        inputs = [
            tuple(torch.randn(shape, generator=generator, device=session.device).to(dtype) for _ in range(3))
            for _ in range(SETS)
        ]
        causal = bool(point["causal"])
        implementation = written_out if session.settings.attention == "eager" else _fused
        return AttentionStep(session.compiled(lambda q, k, v: implementation(q, k, v, causal)), inputs)


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(QK^T / sqrt(d)) V with the scores in memory; shapes (batch, heads, sequence, head_size)."""
    import torch

    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if causal:
        length = q.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


class AttentionStep(Step):
    primary = "call"
    boundaries: Mapping[str, bool] = {}
    unit = "token"

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self._function, self._inputs = function, inputs
        batch, _, length, _ = inputs[0][0].shape
        self.waiting_bytes = waiting_bytes(inputs)
        self.units_per_call = batch * length
        self.output: Any = None

    def run(self, index: int, mark: Mark) -> None:
        # released before the next one is made, as a layer of a model would
        self.output = None
        self.output = self._function(*self._inputs[index % len(self._inputs)])
        mark("call")

    def problems(self) -> list[str]:
        """Every row of the output is a convex combination of values: finite, and shaped as the queries."""
        import torch

        if self.output.shape != self._inputs[0][0].shape:
            return ["wrong_output_shape"]
        return [] if bool(torch.isfinite(self.output).all()) else ["output_not_finite"]
