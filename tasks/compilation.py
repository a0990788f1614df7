"""What torch.compile has done so far in this process: seconds, graphs, breaks, cache hits."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Counts since the process began. `recompile_reasons` are Dynamo's own sentences."""

    seconds: float = 0.0
    graphs: int = 0
    graph_breaks: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    recompile_reasons: tuple[str, ...] = ()


def compilation() -> Compilation:
    """Read Dynamo's own records; all zero when nothing was compiled. Source: `torch._dynamo.utils`."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return Compilation()
    frames = [metric for metric in utils.get_compilation_metrics() if not getattr(metric, "is_runtime", False)]
    inductor = utils.counters["inductor"]
    return Compilation(
        seconds=sum((metric.duration_us or 0) / 1e6 for metric in frames),
        graphs=len(frames),
        graph_breaks=sum(utils.counters["graph_break"].values()),
        cache_hits=inductor["fxgraph_cache_hit"],
        cache_misses=inductor["fxgraph_cache_miss"],
        recompile_reasons=tuple(
            str(metric.recompile_reason) for metric in frames if getattr(metric, "recompile_reason", None)
        ),
    )
