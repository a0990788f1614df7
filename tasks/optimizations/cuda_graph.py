"""One CUDA graph of the whole one-token step: a single launch per token, the token fed back on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, Needs, Optimization, Unsupported
from tasks.optimizations.compile import graph_launches
from tasks.registry import optimizations
from tasks.stacks import option
from tasks.workloads._decode_compared import TIE

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session
    from tasks.workloads._decode_compared import Comparison

WARM_UPS = 3
ROUNDINGS = 8  # of a number, which are tolerated however little rounding was found
KEPT = 0.25  # relative difference of keys or values: beyond it they are others, whatever rounds
OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture the step themselves


class CudaGraph(Optimization):
    """Choice of the token, stop condition and padding are inside the graph; nothing returns to the host."""

    name = "cuda-graph"
    family = "graphs"
    summary = "the whole decode step, token fed back, as one CUDA graph"
    needs = Needs(devices=("cuda",), workloads=("decode",), model_kinds=("language",))

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is not None:
            return refusal
        known = optimizations()
        if not any(getattr(known[item.name], "fixed", False) for item in cell.stack.techniques):
            return f"{self.name} replays fixed addresses and shapes: the stack needs static-cache"
        for item in cell.stack.techniques:
            if item.name == "compile" and option(item, "mode") in OWN_GRAPHS:
                return f"{self.name} captures the step, and so does {item}: choose one"
            if why := known[item.name].synchronises:
                return f"{self.name} cannot hold a step of {item.name}: {why}"
        return None

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.capture = capture

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        if not session.on_cuda:
            return Evidence(ok=False, facts={"device": session.device.type})
        launches = graph_launches(session)
        step: Any = session.step
        steps = step.steps
        found: Comparison = step.compared()
        facts = {
            "cuda_graph_launches": launches, "steps": steps, "same_tokens_as_launched": found.same,
            "cache_from_launched": _finite(found.cache), "rounding_of_cache": _finite(found.rounding),
        }  # fmt: skip
        if not found.same:
            facts["from_the_best_score"] = _finite(found.distance)
        return Evidence(ok=launches == steps > 0 and accepted(found), facts=facts)


def accepted(found: Comparison) -> bool:
    """Whether no more than rounding lies between a graph and its launched steps.

    Two kernels of one product may round a tie between two tokens differently; a token may be that far below the best.
    """
    least, rounding = ROUNDINGS * found.eps, found.rounding or 0.0
    kept = found.cache <= min(max(3 * rounding, least), KEPT)
    return kept and (found.same or found.distance <= min(max(10 * rounding, least), TIE))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Callable[[], None]:
    """`advance` as a graph. `restart` makes a state from which it can run; calls before the capture are real ones.

    In these, on the side stream on which the capture will be, compilers and libraries set themselves up.
    """
    import torch

    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for _ in range(WARM_UPS):
        restart()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            advance()
        main.wait_stream(side)
    restart()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    _record(torch.cuda.graph(graph, stream=side), advance)
    return lambda: graph.replay()  # looked up at each call, for those who count them


def _record(recording: AbstractContextManager[Any], advance: Callable[[], None]) -> None:
    """`advance` inside `recording`; raises `Unsupported` with the first thing that it did and no graph can hold."""
    import torch

    try:
        with recording:
            advance()
    except RuntimeError as error:
        # the end of a broken recording fails too, and says less than what broke it
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        raise Unsupported(f"cuda-graph cannot capture this step: {' '.join(str(first).split())[:300]}") from error
