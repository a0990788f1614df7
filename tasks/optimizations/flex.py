"""Flex attention: a fused kernel generated for the mask at hand by torch.compile; skips blocks that a mask empties."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.compilation import generated_code
from tasks.optimization import Evidence, Needs, out_of_memory
from tasks.optimizations._attention import FLEX, AttentionKind, attention_operators, needs_gradients
from tasks.trace import HOST, KERNEL, traced_step

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session
    from tasks.workloads.attention import AttentionShape, Kernel


class Flex(AttentionKind):
    name = "flex"
    summary = "flex_attention, compiled; causal through a block mask"
    needs = Needs(compute_capability=(7, 0))
    implementation = "flex_attention"

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if device.kind == "cpu" and needs_gradients(cell):
            return f"{self.name} has no backward pass on a cpu, which {cell.workload.kind} needs"
        return super().unsupported(cell, device)

    def kernel(self, shape: AttentionShape) -> Kernel:
        from torch.nn.attention.flex_attention import create_block_mask

        length = shape.sequence_length
        mask = (
            create_block_mask(_causal, None, None, length, length, device=str(shape.device)) if shape.causal else None
        )
        attend = _compiled()

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return attend(q, k, v, block_mask=mask)

        return kernel

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Flex is what attention calls, and a call runs generated code that holds it, not its slow eager form."""
        graphs, kernels = _generated(session)
        facts: dict[str, Any] = {"compiled_graphs_run": graphs, "flex_kernels": kernels}
        try:
            called = attention_operators(session)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # run eagerly, it keeps all scores: where these do not fit, the kernels that were launched are the proof
            return Evidence(
                ok=graphs > 0 and bool(kernels), facts={**facts, "attention_operators": "do not fit eagerly"}
            )
        facts["attention_operators"] = dict(called)
        return Evidence(ok=set(called) == {FLEX} and graphs > 0 and bool(kernels), facts=facts)


def _causal(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
    return query >= key


@cache
def _compiled() -> Callable[..., Any]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _generated(session: Session) -> tuple[int, list[str]]:
    """Compiled graphs that one call runs, and the flex kernels seen: on CUDA launched, on a CPU in generated code."""
    events = traced_step(session, device=session.on_cuda)
    graphs = sum("CompiledFxGraph" in event.name for event in events if event.category in HOST)
    if session.on_cuda:
        kernels = {event.name for event in events if event.category == KERNEL}
        return graphs, sorted(name for name in kernels if name.startswith("triton") and "flex" in name)
    return graphs, sorted(name for name, text in generated_code().items() if FLEX in text)
