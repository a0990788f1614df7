"""What torch.compile did before measuring: how often it left the graph, and how often it had to compile again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing

if TYPE_CHECKING:
    from tasks.session import Session


class CompilationCounts(Metric):
    name = "compilation"
    columns = (
        Column(name="graph_breaks", type="int", doc="times that tracing gave up and went on in Python"),
        Column(
            name="recompilations", type="int", doc="frames compiled again before measuring: their guards had failed"
        ),
    )

    def collect(self, session: Session) -> dict[str, Any]:
        timings = session.timings
        if timings is None or not timings.warmup_calls:
            return {column.name: Missing(reason="warm-up was not reached") for column in self.columns}
        if not timings.before.graphs:
            return {column.name: Missing(reason="nothing was compiled") for column in self.columns}
        return {
            "graph_breaks": timings.before.graph_breaks,
            "recompilations": len(timings.before.recompile_reasons),
        }
