"""What torch.compile has done so far in this process: seconds, graphs, breaks, recompilations, generated code."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Counts since the process began. `recompile_reasons` are Dynamo's own sentences, one for each recompilation.

    `seconds` hold what generated code does for itself when it first runs: tuning Triton kernels, recording CUDA graphs.
    `dynamic_graphs` were compiled for any shape from the start (`dynamic=True`).
    """

    seconds: float = 0.0
    graphs: int = 0
    dynamic_graphs: int = 0
    graph_breaks: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    recompile_reasons: tuple[str, ...] = ()


RECORDS = 100_000  # Dynamo keeps 64 by default and forgets the oldest: counts would stand still, seconds fall


def keep_all_records() -> None:
    """From now on every record counts; for processes that are about to compile, since Dynamo is slow to import."""
    from torch._dynamo import utils

    if utils._compilation_metrics.maxlen != RECORDS:
        utils.set_compilation_metrics_limit(RECORDS)


def compilation() -> Compilation:
    """Read Dynamo's own records; all zero when nothing was compiled. Source: `torch._dynamo.utils`.

    A record's `duration_us` is that of its outermost timer, so that nothing in it counts twice, and what happens at run
    time has records of its own.
    """
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:
        return Compilation()
    keep_all_records()  # whoever compiles behind the session's back, as flex attention does
    records = utils.get_compilation_metrics()
    frames = [record for record in records if not getattr(record, "is_runtime", False)]
    inductor = utils.counters["inductor"]
    return Compilation(
        seconds=sum((record.duration_us or 0) / 1e6 for record in records),
        graphs=len(frames),
        dynamic_graphs=sum(_any_shape(metric) for metric in frames),
        graph_breaks=sum(utils.counters["graph_break"].values()),
        cache_hits=inductor["fxgraph_cache_hit"],
        cache_misses=inductor["fxgraph_cache_miss"],
        recompile_reasons=tuple(
            str(metric.recompile_reason) for metric in frames if getattr(metric, "recompile_reason", None)
        ),
    )


def _any_shape(metric: Any) -> bool:
    settings = json.loads(getattr(metric, "dynamo_config", None) or "{}")
    return settings.get("assume_static_by_default") is False


def generated_code() -> dict[str, str]:
    """File name -> text of what Inductor has generated and this process has loaded: graphs and Triton kernels."""
    inductor = sys.modules.get("torch._inductor.codecache")
    if inductor is None:
        return {}
    files = {Path(file) for module in inductor.PyCodeCache.modules if (file := getattr(module, "__file__", None))}
    return {file.stem: file.read_text() for file in files if file.exists()}
