"""The two tables a sweep ends with: rows into numbers, without a word about how they look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.break_even import with_break_even
from analysis.fits import LEGEND as LEGEND_FITS
from analysis.fits import fits
from analysis.frames import column, numbers, records
from analysis.host_clock import COMPARED, COMPARED_LOOP, host_loops
from analysis.pair import KEY, cells
from analysis.table import Field, Table
from analysis.verdicts import verdicts
from tasks.cell import NO_MODEL
from tasks.row import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd

LEGEND_INTERVAL = "+-: 95 % interval over rounds (isolated processes), not over samples."
LEGEND_VERDICT = (
    "faster, slower: beyond the margin and significant after Holm's correction over this table; same: within the "
    "margin; ~ N %: indistinguishable, a true difference of N % would be found in 80 %; ?: no verdict, see the note."
)
LEGEND_MARKS = (
    "x: throughput relative to the same hardware's own baseline; + faster, - slower, = the same within the margin, "
    "~ indistinguishable, ? no verdict."
)
LEGEND_BREAK_EVEN = (
    "compile s: in the compiler with an empty cache; break-even: calls (when decoding, tokens) after which they are "
    "won back against the same stack without compile, empty where it saves nothing or was not measured."
)
LEGEND_DECODE = (
    "speed-up when decoding: of whole requests, where nothing waits for a single token (throughput); latency: of a "
    "token that is waited for."
)
LEGEND_HOST = (
    "at one host clock: steps that wait for their launches are as fast as the host's CPU, whose clock moved meanwhile; "
    "it was measured beside them and taken out of the ratio, not out of times and rates."
)
HOST_NOTE = "ratio at one host clock"
QUALITY = (("kl_divergence", "KL"), ("perplexity", "ppl"), ("accuracy", "accuracy"), ("top1_agreement", "top-1"))
_NUMBERS = (
    "model_bytes", "latency_ms_p50", "latency_ms_p50_lo", "latency_ms_p50_hi", "latency_ms_p95", "throughput_per_s",
    "throughput_per_s_lo", "throughput_per_s_hi", "energy_j_per_unit", "perplexity", "kl_divergence", "accuracy",
    "top1_agreement", "mbu", "mfu", "graph_breaks", "recompilations", "device_fraction", "offload_bytes_per_token",
    "request_ms_mean", "kv_cache_bytes", "kv_cache_bytes_per_token", "stop_check_ms", "stop_check_hidden_share",
)  # fmt: skip
_COMPARED = ("verdict", "equivalent", "mde", "p_holm", "own_variance")


def comparison_table(
    frame: pd.DataFrame, samples: pd.DataFrame | None = None, floor: float | Mapping[str, float] = 0.0
) -> Table:
    """Every cell with memory, latency, throughput, speed-up against its baseline, energy and quality.

    The speed-up is baseline over cell in time, from pairs within blocks: the median latency of a call, or of a decoded
    token its mean time in requests that run through, since a loop that hides work behind the next step shows nothing
    while every token is waited for. A cell without numbers shows its outcome in their place, the reason in its notes.
    """
    table = _compared(with_compared_time(frame), COMPARED, samples, floor)
    inverse = {"speedup": "ratio", "speedup_lo": "hi", "speedup_hi": "lo"}
    for name, source in inverse.items():
        table[name] = 1 / table[source]
    table = with_break_even(table, frame)
    table["fits"] = fits(table)
    decodes, on_cards = bool(_decodes(table).any()), bool((table["fits"] != "").any())
    table["notes"] = [_notes(row) for row in records(table)]
    order = [
        "model", "workload_point", "hardware", "optimization", "outcome", "rounds_ok", "memory_bytes", "fits",
        *_NUMBERS, "throughput_unit", *inverse, *_COMPARED, "cold_compile_s", "break_even_calls", "is_baseline",
        "simulated", "notes", *KEY,
    ]  # fmt: skip
    table = table[[name for name in order if name in table]].reset_index(drop=True)
    units = table["throughput_unit"].dropna().unique()
    shared = units[0] if len(units) == 1 else None
    kernels = bool((table["model"] == NO_MODEL.id).all())  # how near they come to the ceiling is what is asked there
    fields = [
        Field(header="optimization", form="text", sources=("optimization",)),
        Field(header="memory", form="bytes", sources=("memory_bytes",), word="outcome"),
        *([Field(header="fits", form="text", sources=("fits",))] if on_cards else []),
        Field(header="weights", form="bytes", sources=("model_bytes",), rank=2),
        Field(header="latency ms", form="interval", sources=_interval("latency_ms_p50")),
        Field(header="p95 ms", form="number", sources=("latency_ms_p95",), rank=1),
        Field(
            header=f"{shared}/s" if shared else "per second",
            form="number",
            sources=("throughput_per_s",),
            unit=None if shared else "throughput_unit",
        ),
        Field(header="request ms", form="number", sources=("request_ms_mean",), rank=1),
        Field(header="speed-up", form="ratio", sources=("speedup", "speedup_lo", "speedup_hi", "is_baseline")),
        Field(header="verdict", form="verdict", sources=("verdict", "equivalent", "mde", "is_baseline", "speedup")),
        Field(header=f"J/{shared or 'unit'}", form="number", sources=("energy_j_per_unit",)),
        Field(header="ppl", form="number", sources=("perplexity",), rank=1),
        Field(header="KL", form="number", sources=("kl_divergence",)),
        Field(header="accuracy", form="percent", sources=("accuracy",), rank=1),
        Field(header="on device", form="percent", sources=("device_fraction",)),
        Field(header="moved", form="bytes", sources=("offload_bytes_per_token",)),
        Field(header="compile s", form="number", sources=("cold_compile_s",)),
        Field(header="break-even", form="number", sources=("break_even_calls",)),
        Field(header="breaks", form="number", sources=("graph_breaks",), rank=6),
        Field(header="recompiled", form="number", sources=("recompilations",), rank=5),
        Field(header="KV cache", form="bytes", sources=("kv_cache_bytes",), rank=2),
        Field(header="KV B/token", form="number", sources=("kv_cache_bytes_per_token",), rank=5),
        Field(header="stop check ms", form="number", sources=("stop_check_ms",), rank=2),
        Field(header="hidden", form="percent", sources=("stop_check_hidden_share",), rank=2),
        Field(header="MBU", form="percent", sources=("mbu",), rank=3),
        Field(header="MFU", form="percent", sources=("mfu",), rank=0 if kernels else 4),
    ]
    shown = _present(table, fields)
    return Table(
        title="Comparison",
        frame=table,
        fields=shown,
        sections=("model", "workload_point", "hardware"),
        notes="notes",
        footnotes=(
            *((LEGEND_INTERVAL, LEGEND_VERDICT) if any(field.form == "verdict" for field in shown) else ()),
            *((LEGEND_DECODE,) if decodes else ()),
            *_legend_host(table["notes"]),
            *((LEGEND_BREAK_EVEN,) if any(field.header == "compile s" for field in shown) else ()),
            *((LEGEND_FITS,) if on_cards else ()),
        ),
    )


def tradeoff_table(frame: pd.DataFrame, floor: float | Mapping[str, float] = 0.0) -> Table:
    """Optimizations down, hardware across: memory, throughput over that hardware's own baseline, quality.

    Simulated hardware says so in its heading and has no verdicts.
    """
    import pandas as pd

    table = _compared(frame, "throughput_per_s", None, floor)
    lines = ["model", "workload_point", "optimization"]
    quality = next(((name, header) for name, header in QUALITY if name in table and table[name].notna().any()), None)
    wide = table[lines].drop_duplicates().reset_index(drop=True)
    fields = [Field(header="optimization", form="text", sources=("optimization",))]
    notes: dict[tuple[Any, ...], list[str]] = {}
    for hardware in table["hardware"].drop_duplicates():
        part = table[table["hardware"] == hardware].drop_duplicates(lines, keep="last")
        for row in records(part):
            found = [f"{hardware}: {note}" for note in _notes(row, flags=False)]
            notes.setdefault(tuple(row[name] for name in lines), []).extend(found)
        names = {
            "memory_bytes": "memory_bytes", "ratio": "ratio", "ratio_lo": "lo", "ratio_hi": "hi", "verdict": "verdict",
            "equivalent": "equivalent", "is_baseline": "is_baseline", "outcome": "outcome", "simulated": "simulated",
        }  # fmt: skip
        if quality:
            names[quality[0]] = quality[0]
        renamed = pd.DataFrame({f"{hardware}.{name}": part[source] for name, source in names.items()})
        wide = wide.merge(pd.concat([part[lines], renamed], axis=1), on=lines, how="left")

        def of(*sources: str, hardware: str = hardware) -> tuple[str, ...]:
            return tuple(f"{hardware}.{source}" for source in sources)

        fields += [
            Field(header="memory", form="bytes", sources=of("memory_bytes"), group=hardware, word=of("outcome")[0]),
            Field(header="speed", form="marked_ratio", sources=of("ratio", "verdict", "equivalent", "is_baseline"),
                  group=hardware),
        ]  # fmt: skip
        if quality:
            fields.append(Field(header=quality[1], form="number", sources=of(quality[0]), group=hardware))
    wide["notes"] = pd.Series([notes.get(tuple(row), []) for row in wide[lines].to_numpy()], dtype="object")
    return Table(
        title="Trade-off across hardware",
        frame=wide,
        fields=_present(wide, fields),
        sections=("model", "workload_point"),
        notes="notes",
        footnotes=(LEGEND_MARKS, *_legend_host(notes.values())),
    )


def with_compared_time(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the time that speed-ups compare, in ms, and the host's loop of its pass, as two more columns."""
    import pandas as pd

    latency, rate = numbers(frame, "latency_ms_p50"), numbers(frame, "throughput_per_s")
    by_rate = _decodes(frame) & (rate > 0)
    compared = latency.mask(by_rate, 1e3 / rate)
    loop = host_loops(frame, "latency_ms_p50").mask(by_rate, host_loops(frame, "throughput_per_s"))
    return pd.concat([frame, compared.rename(COMPARED), loop.rename(COMPARED_LOOP)], axis=1)


def _decodes(frame: pd.DataFrame) -> pd.Series[bool]:
    return (column(frame, "workload") == "decode").fillna(False).astype(bool)


def _compared(
    frame: pd.DataFrame, metric: str, samples: pd.DataFrame | None, floor: float | Mapping[str, float]
) -> pd.DataFrame:
    """One line per cell with its verdict, columns guaranteed, baseline first in its group."""
    import pandas as pd

    table = cells(frame, samples)
    judged = verdicts(frame, metric, floor).drop(columns=["baseline_id", "metric", "rounds"])
    table = table.merge(judged, on=KEY, how="left").copy()
    table["memory_bytes"] = _memory(table)
    for name in (*_NUMBERS, "ratio", "lo", "hi"):
        table[name] = numbers(table, name)
    if "throughput_unit" not in table:
        table["throughput_unit"] = pd.Series(pd.NA, index=table.index, dtype="string")
    table["is_baseline"] = (table["cell_id"] == table["baseline_id"]).fillna(False).astype(bool)
    table["hardware"] = _hardware(table)
    # In the plan's order, or that in which models, workload points and hardware first appear; short stacks first.
    table["_techniques"] = [str(stack).count("+") for stack in table["optimization"]]
    table["_planned"] = numbers(table, "plan_order")
    table = table.sort_values("_planned", kind="stable")
    for name in ("model", "workload_point", "hardware"):
        table[f"_{name}"] = pd.factorize(table[name])[0]
    table["_other"] = ~table["is_baseline"]
    order = ["_model", "_workload_point", "_hardware", "_other", "_planned", "_techniques"]
    return table.sort_values(order, kind="stable").drop(columns=order).reset_index(drop=True)


def _memory(table: pd.DataFrame) -> pd.Series[Any]:
    """Peak bytes where the cell ran: allocated on a CUDA device, resident on a CPU."""
    device, host = numbers(table, "peak_allocated_bytes"), numbers(table, "peak_host_bytes")
    if "device_kind" in table:
        return host.where((table["device_kind"] == "cpu").fillna(False).astype(bool), device)
    return device.where(device.notna(), host)


def _hardware(table: pd.DataFrame) -> list[str]:
    """The tag, told apart by result folder where two folders have the same, and marked where simulated."""
    folders = table.groupby("hardware")["result_dir"].nunique()
    labels = []
    for tag, folder, simulated in zip(table["hardware"], table["result_dir"], table["simulated"], strict=True):
        label = f"{tag} ({str(folder).rstrip('/').rpartition('/')[2]})" if folders.get(tag, 1) > 1 else str(tag)
        labels.append(f"{label} (simulated)" if simulated else label)
    return labels


def _notes(row: dict[str, Any], flags: bool = True) -> list[str]:
    """Remarks on one cell, most important first."""
    notes = []
    outcome, rounds = row["outcome"], row["rounds"]
    if outcome != Outcome.OK:
        some = "" if row["rounds_ok"] == 0 else f" in {row['outcomes'].get(outcome, 0)} of {rounds} rounds"
        notes.append(f"{outcome}{some}: {row['reason'] or 'no reason given'}")
    if flags:
        for flag, count in sorted((row["flags"] or {}).items()):
            notes.append(flag if count == rounds else f"{flag} in {count} of {rounds} rounds")
    for name, noun in (("graph_breaks", "graph break"), ("recompilations", "recompilation")):
        if (count := row.get(name) or 0) > 0:
            notes.append(f"{count:g} {noun}{'s' if count > 1 else ''} before measuring")
    barred = row["barred"] if isinstance(row["barred"], list) else []
    if row["rounds_ok"] and outcome == Outcome.OK:
        if barred:
            notes.append(f"no verdict: {', '.join(barred)}")
        elif row["left_out"] == row["left_out"] and row["left_out"] > 0:
            notes.append(f"{int(row['left_out'])} flagged round(s) left out of the ratio")
        if row["host_clock"] is True:
            notes.append(HOST_NOTE)
    return notes


def _legend_host(notes: Iterable[list[str]]) -> tuple[str, ...]:
    return (LEGEND_HOST,) if any(note.endswith(HOST_NOTE) for found in notes for note in found) else ()


def _interval(name: str) -> tuple[str, str, str]:
    return name, f"{name}_lo", f"{name}_hi"


def _present(table: pd.DataFrame, fields: list[Field]) -> tuple[Field, ...]:
    """Without the columns that no row has a value for; a verdict is judged by its ratio, the last of its sources."""

    def has_values(field: Field) -> bool:
        name = field.sources[-1 if field.form == "verdict" else 0]
        return name in table and bool(table[name].notna().any())

    return tuple(field for field in fields if field.word or field.form in ("text", "marked_ratio") or has_values(field))
