"""torch.compile of the step: fused kernels, and CUDA graphs in the modes that use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.compilation import compilation, generated_code
from tasks.optimization import Evidence, Optimization
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
DYNAMIC = {"auto": None, "true": True, "false": False}


class Compile(Optimization):
    """`dynamic` auto is torch's default: static at first, symbolic where a shape has changed.

    `coordinate_descent` tunes the block sizes of generated kernels one step at a time, in any mode (the max-autotune
    ones include it). With it products with a single row become generated kernels too, which come nearer to the memory
    bandwidth than a library's: what decoding one sequence is made of.
    """

    name = "compile"
    family = "compile"
    summary = "torch.compile of the measured step"
    options = {"mode": "default", "fullgraph": False, "dynamic": "auto", "coordinate_descent": False}
    choices = {
        "mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "dynamic": tuple(DYNAMIC),
    }

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        chosen = next((item for item in cell.stack.techniques if item.name == self.name), None)
        if chosen is not None and option(chosen, "coordinate_descent") and device.kind == "cpu":
            return f"coordinate_descent of {self.name} tunes Triton kernels, a cpu has none"
        return super().unsupported(cell, device)

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.compile = arguments(technique)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        seen, mode = compilation(), str(option(technique, "mode"))
        facts: dict[str, Any] = {"graphs": seen.graphs, "graph_breaks": seen.graph_breaks, "mode": mode}
        ok = seen.graphs > 0
        if option(technique, "fullgraph"):
            ok = ok and seen.graph_breaks == 0
        if option(technique, "dynamic") == "true":
            facts["graphs_of_any_shape"] = seen.dynamic_graphs
            ok = ok and seen.dynamic_graphs > 0
        if session.on_cuda and mode in CUDA_GRAPHS:
            facts["cuda_graph_launches"] = graph_launches(session)
            ok = ok and facts["cuda_graph_launches"] > 0
        if option(technique, "coordinate_descent"):
            # every generated kernel carries the settings of its tuning
            facts["kernels_tuned"] = sum(
                "coordinate_descent_tuning': True" in text for text in generated_code().values()
            )
            ok = ok and facts["kernels_tuned"] > 0
        return Evidence(ok=ok, facts=facts)


def arguments(technique: Technique) -> dict[str, Any]:
    """Keyword arguments of `torch.compile`, which takes a mode or single options, not both."""
    mode = str(option(technique, "mode"))
    found: dict[str, Any] = {
        "fullgraph": bool(option(technique, "fullgraph")),
        "dynamic": DYNAMIC[str(option(technique, "dynamic"))],
    }
    if not option(technique, "coordinate_descent"):
        return {**found, "mode": None if mode == "default" else mode}
    from torch._inductor import list_mode_options

    return {**found, "options": {**list_mode_options(mode), "coordinate_descent_tuning": True}}


def graph_launches(session: Session) -> int:
    """`cudaGraphLaunch` calls that the profiler sees in one call of the step."""
    from torch.profiler import ProfilerActivity, profile

    assert session.step is not None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        session.step.run_short()
        session.synchronize()
    return sum(event.count for event in seen.key_averages() if event.key == "cudaGraphLaunch")
