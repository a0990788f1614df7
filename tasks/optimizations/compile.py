"""torch.compile of the step: fused kernels, and CUDA graphs in the modes that use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.compilation import compilation
from tasks.optimization import Evidence, Optimization
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class Compile(Optimization):
    name = "compile"
    family = "compile"
    summary = "torch.compile of the measured step"
    options = {"mode": "default"}
    choices = {"mode": ("default", "reduce-overhead", "max-autotune")}

    def apply(self, technique: Technique, session: Session) -> None:
        mode = str(option(technique, "mode"))
        session.settings.compile = {"mode": None if mode == "default" else mode}

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        seen = compilation()
        facts = {"graphs": seen.graphs, "graph_breaks": seen.graph_breaks, "mode": option(technique, "mode")}
        ok = seen.graphs > 0
        if session.on_cuda and option(technique, "mode") != "default":
            graphs = graph_launches(session)
            facts["cuda_graph_launches"] = graphs
            ok = ok and graphs > 0
        return Evidence(ok=ok, facts=facts)


def graph_launches(session: Session) -> int:
    """`cudaGraphLaunch` calls that the profiler sees in one call of the step."""
    from torch.profiler import ProfilerActivity, profile

    assert session.step is not None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        session.step.run_short()
        session.synchronize()
    return sum(event.count for event in seen.key_averages() if event.key == "cudaGraphLaunch")
