"""The table that a sweep ends with: rows into numbers, without a word about how they look."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.break_even import with_break_even
from analysis.compared import (
    NUMBERS,
    POINT,
    compared,
    decodes,
    interval,
    legend_flags,
    legend_host,
    notes,
    present,
    with_compared_time,
)
from analysis.fits import LEGEND as LEGEND_FITS
from analysis.fits import fits
from analysis.frames import numbers, records
from analysis.host_clock import COMPARED
from analysis.pair import KEY
from analysis.table import Field, Table
from tasks.cell import NO_MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

LEGEND_INTERVAL = "+-: 95 % interval over rounds (isolated processes), not over samples."
LEGEND_VERDICT = (
    "faster, slower: beyond the margin and significant after Holm's correction over this table; same: within the "
    "margin; ~ N %: indistinguishable, a true difference of N % would be found in 80 %; ?: no verdict, see the note."
)
LEGEND_COMPILE = "compile s: in the compiler with an empty cache."
LEGEND_BREAK_EVEN = (
    "break-even: calls after which these are won back against the same stack without compile, by the time that the "
    "speed-up compares, empty where it saves nothing or was not measured; a call when decoding is a step of the batch, "
    "one token for each of its sequences."
)
LEGEND_DECODE = (
    "token/s, and speed-up when decoding: of the tokens after the first, where nothing waits for a single one; "
    "latency: of a token that is waited for."
)
LEGEND_REQUESTS = (
    "request ms, std, min, max: over the requests of a round, which are synchronised at first token and end; each the "
    "median over rounds."
)
LEGEND_CEILING = (
    "of ceiling: FLOPs that must be executed, of causal attention only the half that its mask leaves, over time and "
    "the measured matrix product of this device."
)
LEGEND_LOSS = (
    "loss@8: training loss in the eighth step, skipped ones counted, so that it is of equally many steps in every cell."
)
LOSS_APART = 0.02  # beyond this, relative to the fp32 cell's, a cell is not seen to train as that one does
FULL_PRECISION = "fp32"
_COMPARED = ("verdict", "equivalent", "mde", "p_holm", "own_variance")


def comparison_table(
    frame: pd.DataFrame, samples: pd.DataFrame | None = None, floor: float | Mapping[str, float] = 0.0
) -> Table:
    """Every cell with memory, latency, throughput, speed-up against its baseline, energy and quality.

    The speed-up is baseline over cell in time, from pairs within blocks: the median latency of a call, or of a decoded
    token its mean time in requests that run through, since a loop that hides work behind the next step shows nothing
    while every token is waited for. A cell without numbers shows its outcome in their place, the reason in its notes.
    """
    table = compared(with_compared_time(frame), COMPARED, samples, floor)
    inverse = {"speedup": "ratio", "speedup_lo": "hi", "speedup_hi": "lo"}
    for name, source in inverse.items():
        table[name] = 1 / table[source]
    table = _with_ceiling_share(with_break_even(table, frame))
    table["fits"], table["loss_apart"] = fits(table), _loss_apart(table)
    table["notes"] = [notes(row) + _remarks(row) for row in records(table)]
    order = [
        "model", "workload_point", POINT, "hardware", "optimization", "outcome", "rounds_ok", "memory_bytes", "fits",
        *NUMBERS, "ceiling_share", "loss_apart", "throughput_unit", *inverse, *_COMPARED, "cold_compile_s",
        "break_even_calls", "is_baseline", "simulated", "plan_order", "notes", *KEY,
    ]  # fmt: skip
    fields, any_decodes, flags = present(table, _fields(table)), bool(decodes(table).any()), legend_flags(table)
    table = table[[name for name in order if name in table]].reset_index(drop=True)
    return Table(
        title="Comparison",
        frame=table,
        fields=fields,
        sections=("model", POINT, "hardware"),
        notes="notes",
        footnotes=(*((LEGEND_DECODE,) if any_decodes else ()), *legend_host(table["notes"]), *flags),
    )


def _fields(table: pd.DataFrame) -> list[Field]:
    units = table["throughput_unit"].dropna().unique()
    shared = units[0] if len(units) == 1 else None
    kernels = bool((table["model"] == NO_MODEL.id).all())  # how near they come to the ceiling is what is asked there
    on_cards = bool((table["fits"] != "").any())
    return [
        Field(header="optimization", form="text", sources=("optimization",)),
        Field(header="memory", form="bytes", sources=("memory_bytes",), word="outcome"),
        *([Field(header="fits", form="text", sources=("fits",), legend=LEGEND_FITS)] if on_cards else []),
        Field(header="reserved", form="bytes", sources=("peak_reserved_bytes",), rank=5),
        Field(header="fragmented", form="percent", sources=("fragmentation",), rank=5),
        Field(header="weights", form="bytes", sources=("model_bytes",), rank=2),
        Field(header="latency ms", form="interval", sources=interval("latency_ms_p50")),
        Field(header="p95 ms", form="number", sources=("latency_ms_p95",), rank=1),
        Field(
            header=f"{shared}/s" if shared else "per second",
            form="number",
            sources=("throughput_per_s",),
            unit=None if shared else "throughput_unit",
        ),
        Field(header="request ms", form="number", sources=("request_ms_mean",), rank=1),
        Field(header="request std", form="number", sources=("request_ms_std",), rank=3, legend=LEGEND_REQUESTS),
        Field(header="request min", form="number", sources=("request_ms_min",), rank=3),
        Field(header="request max", form="number", sources=("request_ms_max",), rank=3),
        Field(
            header="speed-up",
            form="ratio",
            sources=("speedup", "speedup_lo", "speedup_hi", "is_baseline"),
            legend=LEGEND_INTERVAL,
        ),
        Field(
            header="verdict",
            form="verdict",
            sources=("verdict", "equivalent", "mde", "is_baseline", "speedup"),
            legend=LEGEND_VERDICT,
        ),
        Field(header=f"J/{shared or 'unit'}", form="number", sources=("energy_j_per_unit",), rank=1),
        Field(header="ppl", form="number", sources=("perplexity",), rank=1),
        Field(header="KL", form="number", sources=("kl_divergence",)),
        Field(header="accuracy", form="percent", sources=("accuracy",), rank=1),
        Field(header="loss@8", form="number", sources=("loss_at_step_8",), rank=1, legend=LEGEND_LOSS),
        Field(header="skipped", form="number", sources=("optimizer_steps_skipped",), rank=2),
        Field(header="on device", form="percent", sources=("device_fraction",)),
        Field(header="moved", form="bytes", sources=("offload_bytes_per_token",)),
        Field(header="compile s", form="number", sources=("cold_compile_s",), legend=LEGEND_COMPILE),
        Field(header="break-even", form="number", sources=("break_even_calls",), legend=LEGEND_BREAK_EVEN),
        Field(header="breaks", form="number", sources=("graph_breaks",), rank=6),
        Field(header="recompiled", form="number", sources=("recompilations",), rank=5),
        Field(header="KV cache", form="bytes", sources=("kv_cache_bytes",), rank=2),
        Field(header="KV B/token", form="number", sources=("kv_cache_bytes_per_token",), rank=5),
        Field(header="stop check ms", form="number", sources=("stop_check_ms",), rank=2),
        Field(header="hidden", form="percent", sources=("stop_check_hidden_share",), rank=2),
        Field(header="MBU", form="percent", sources=("mbu",), rank=3),
        Field(header="MFU", form="percent", sources=("mfu",), rank=4),
        Field(
            header="of ceiling",
            form="percent",
            sources=("ceiling_share",),
            rank=0 if kernels else 4,
            legend=LEGEND_CEILING,
        ),
    ]


def _with_ceiling_share(table: pd.DataFrame) -> pd.DataFrame:
    """`ceiling_share` in the place of `mfu` where that would mislead: for kernels, and above the ceiling.

    MFU counts causal attention as full, as is usual for models. A kernel that skips the masked half then seems to run
    at up to twice its true share of the ceiling, and above it. Null where what must be executed is not known.
    """
    table = table.copy()
    executed = numbers(table, "flops_least") / numbers(table, "flops")
    kernel = (table["model"] == NO_MODEL.id).fillna(False).astype(bool)
    causal = table["workload_point"].str.contains("causal=true").fillna(False).astype(bool)
    executed = executed.mask(executed.isna() & kernel & ~causal, 1.0)
    instead = kernel | (table["mfu"] > 1)
    table["ceiling_share"] = (table["mfu"] * executed).where(instead)
    table["mfu"] = table["mfu"].mask(instead)
    return table


def _loss_apart(table: pd.DataFrame) -> pd.Series[float]:
    """By which share a cell's loss in its eighth step differs from the fp32 cell's of its section; NaN without one."""
    import pandas as pd

    places = list(zip(*(table[name] for name in ("result_dir", "model", "workload_point", "hardware")), strict=True))
    losses = zip(places, table["optimization"], table["loss_at_step_8"], strict=True)
    known = {place: float(loss) for place, stack, loss in losses if stack == FULL_PRECISION}
    reference = pd.Series([known.get(place, math.nan) for place in places], index=table.index, dtype="float64")
    return (table["loss_at_step_8"] / reference - 1).abs()


def _remarks(row: dict[str, Any]) -> list[str]:
    """What only this table's own columns say about a cell."""
    found = []
    if (row.get("graphs_compiled") or 0) > 0 and row["cold_compile_s"] != row["cold_compile_s"]:
        found.append("compile s and break-even unknown: no measured round began with an empty compiler cache")
    if row["model"] != NO_MODEL.id and row["ceiling_share"] == row["ceiling_share"]:
        found.append("share of the ceiling by what must be executed: with causal attention as full, MFU is above 100 %")
    if row["loss_apart"] > LOSS_APART:
        skipped = row["optimizer_steps_skipped"]
        why = f", having skipped {skipped:g} steps" if skipped > 0 else ""
        found.append(f"loss_apart: {row['loss_apart']:.1%} from the loss of {FULL_PRECISION} in the eighth step{why}")
    return found
