"""Attention written out: scores in memory, softmax, product. Memory grows with the square of the sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tasks.optimization import Evidence
from tasks.optimizations._attention import AttentionKind, attention_operators

if TYPE_CHECKING:
    import torch

    from tasks.cell import Technique
    from tasks.session import Session
    from tasks.workloads.attention import AttentionShape, Kernel


class Eager(AttentionKind):
    name = "eager"
    summary = "attention written out, scores in memory"
    implementation = "eager"

    def kernel(self, shape: AttentionShape) -> Kernel:
        return written_out(shape)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        called = attention_operators(session)
        return Evidence(ok=set(called) == {"_softmax"}, facts={"attention_operators": dict(called)})


def written_out(shape: AttentionShape) -> Kernel:
    """softmax(QK^T / sqrt(d)) V with the scores in memory."""
    import torch

    length = shape.sequence_length
    mask = torch.ones(length, length, dtype=torch.bool, device=shape.device).triu(1) if shape.causal else None

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.matmul(torch.softmax(scores, dim=-1), v)

    return kernel
