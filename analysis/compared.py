"""What every table of cells stands on: a line per cell with verdict, memory and remarks, in the order of the plan."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from analysis.frames import column, numbers
from analysis.host_clock import COMPARED, COMPARED_LOOP, HIGHER_IS_BETTER, host_loops
from analysis.pair import KEY, cells
from analysis.verdicts import NO_PAIR, verdicts
from tasks.flags import FLAGS
from tasks.row import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd

    from analysis.table import Field

LEGEND_HOST = (
    "at one host clock: steps that wait for their launches are as fast as the host's CPU, whose clock moved meanwhile; "
    "it was measured beside them, and this is the ratio without it. Verdicts are of the ratio as it was."
)
HOST_NOTE = "at one host clock"
GROWN = "memory_of_process"  # the flag
GROWN_NOTE = "memory: the growth of its process, kernels and all"
POINT = "workload_shown"  # `workload_point` as headings show it
# what a training step counts says which of its axes its model does not have
AXES_OF_OTHERS = {"token": ("image_size",), "image": ("sequence_length",), "sample": ("image_size", "sequence_length")}
CALL = "call_ms"  # the compared time of one call, see `with_compared_time`
NUMBERS = (
    "model_bytes", "latency_ms_p50", "latency_ms_p50_lo", "latency_ms_p50_hi", "latency_ms_p95", "throughput_per_s",
    "throughput_per_s_lo", "throughput_per_s_hi", "energy_j_per_unit", "perplexity", "kl_divergence", "accuracy",
    "top1_agreement", "mbu", "mfu", "graph_breaks", "recompilations", "device_fraction", "offload_bytes_per_token",
    "request_ms_mean", "request_ms_std", "request_ms_min", "request_ms_max", "decode_steps", "superfluous_steps",
    "kv_cache_bytes", "kv_cache_bytes_per_token", "kv_cache_host_bytes", "stop_check_ms", "stop_check_hidden_share",
    "peak_allocated_bytes", "peak_reserved_bytes", "fragmentation", "loss_first", "loss_last", "loss_at_step_8",
    "optimizer_steps", "optimizer_steps_skipped", "call_ms",
)  # fmt: skip


def with_compared_time(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the time that speed-ups compare, in ms, the host's loop of its pass, and `call_ms`.

    The compared time of decoding is that of one token of one sequence, from the throughput of whole requests; `call_ms`
    is that of a call: when decoding, of a step that gives every sequence of the batch one token. Where sequences end at
    different lengths the rate counts needed tokens only, and a step's time is that of a request over its steps.
    """
    import pandas as pd

    latency, rate = numbers(frame, "latency_ms_p50"), numbers(frame, "throughput_per_s")
    by_rate = decodes(frame) & (rate > 0)
    time = latency.mask(by_rate, 1e3 / rate)
    loop = host_loops(frame, "latency_ms_p50").mask(by_rate, host_loops(frame, "throughput_per_s"))
    call = latency.mask(by_rate, time * numbers(frame, "batch_size"))
    steps, request = numbers(frame, "decode_steps"), numbers(frame, "request_ms_mean")
    ragged = by_rate & column(frame, "workload_point").astype("string").str.contains("stop=", regex=False).fillna(False)
    call = call.mask(ragged, (request - numbers(frame, "time_to_first_token_ms")) / steps)
    return pd.concat([frame, time.rename(COMPARED), loop.rename(COMPARED_LOOP), call.rename(CALL)], axis=1)


def decodes(frame: pd.DataFrame) -> pd.Series[bool]:
    return (column(frame, "workload") == "decode").fillna(False).astype(bool)


def compared(
    frame: pd.DataFrame, metric: str, samples: pd.DataFrame | None, floor: float | Mapping[str, float]
) -> pd.DataFrame:
    """One line per cell with its verdict, columns guaranteed, baseline first in its group."""
    import pandas as pd

    table = cells(frame, samples)
    judged = verdicts(frame, metric, floor).drop(columns=["baseline_id", "metric", "rounds"])
    judged["clock_note"] = _clock_notes(judged, metric)
    table = table.merge(judged, on=KEY, how="left").copy()
    table["memory_bytes"] = _memory(table)
    for name in (*NUMBERS, "ratio", "lo", "hi"):
        table[name] = numbers(table, name)
    if "throughput_unit" not in table:
        table["throughput_unit"] = pd.Series(pd.NA, index=table.index, dtype="string")
    table["is_baseline"] = (table["cell_id"] == table["baseline_id"]).fillna(False).astype(bool)
    table["hardware"] = _hardware(table)
    table[POINT] = _points(table)
    # In the plan's order, or that in which models, workload points and hardware first appear; short stacks first.
    table["_techniques"] = [str(stack).count("+") for stack in table["optimization"]]
    table["_planned"] = numbers(table, "plan_order")
    table = table.sort_values("_planned", kind="stable")
    for name in ("model", "workload_point", "hardware"):
        table[f"_{name}"] = pd.factorize(table[name])[0]
    table["_other"] = ~table["is_baseline"]
    order = ["_model", "_workload_point", "_hardware", "_other", "_planned", "_techniques"]
    return table.sort_values(order, kind="stable").drop(columns=order).reset_index(drop=True)


def _points(table: pd.DataFrame) -> list[str]:
    """`workload_point`, of a training step without the axes of other kinds of model, where points stay told apart."""
    places = list(zip(table["model"].astype(str), table["workload_point"].astype(str), strict=True))
    trained = [point.startswith("train_step[") for _, point in places]
    counts = zip(places, trained, table["throughput_unit"], strict=True)
    unit_of = {model: unit for (model, _), yes, unit in counts if yes and unit in AXES_OF_OTHERS}
    shown = {
        (model, point): without_axes(point, *AXES_OF_OTHERS[unit_of[model]]) if yes and model in unit_of else point
        for (model, point), yes in zip(places, trained, strict=True)
    }
    told = Counter((model, text) for (model, _), text in shown.items())
    return [shown[place] if told[place[0], shown[place]] == 1 else place[1] for place in places]


def without_axes(point: str, *axes: str) -> str:
    """The text of a workload point without these of its parameters."""
    kind, _, parameters = point.removesuffix("]").partition("[")
    kept = [text for text in parameters.split(",") if text.partition("=")[0] not in axes]
    return f"{kind}[{','.join(kept)}]"


def _memory(table: pd.DataFrame) -> pd.Series[Any]:
    """Peak bytes where the cell ran: allocated on a CUDA device, resident on a CPU.

    Of what allocates for itself on a device, the growth of its process, which is another measure (`grown`).
    """
    device, host = numbers(table, "peak_allocated_bytes"), numbers(table, "peak_host_bytes")
    device = device.where(device.notna(), numbers(table, "runtime_bytes"))
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


def grown(row: Mapping[str, Any]) -> bool:
    """Whether the memory of a cell is what its process grew by, kernels and free blocks included."""
    return GROWN in (row["flags"] or {})


def notes(row: dict[str, Any], flags: bool = True) -> list[str]:
    """Remarks on one cell, most important first."""
    found = []
    outcome, rounds = row["outcome"], row["rounds"]
    if outcome != Outcome.OK:
        some = "" if row["rounds_ok"] == 0 else f" in {row['outcomes'].get(outcome, 0)} of {rounds} rounds"
        found.append(f"{outcome}{some}: {row['reason'] or 'no reason given'}")
    if flags:
        for flag, count in sorted((row["flags"] or {}).items()):
            found.append(flag if count == rounds else f"{flag} in {count} of {rounds} rounds")
    elif grown(row):
        found.append(GROWN_NOTE)
    for name, noun in (("graph_breaks", "graph break"), ("recompilations", "recompilation")):
        if (count := row.get(name) or 0) > 0:
            found.append(f"{count:g} {noun}{'s' if count > 1 else ''} before measuring")
    barred = row["barred"] if isinstance(row["barred"], list) else []
    if row["rounds_ok"] and outcome == Outcome.OK:
        if barred:
            found.append(f"no verdict: {', '.join(barred)}")
        elif row["left_out"] == row["left_out"] and row["left_out"] > 0:
            found.append(f"{int(row['left_out'])} flagged round(s) left out of the ratio")
        if isinstance(row.get("clock_note"), str):
            found.append(row["clock_note"])
    elif row["rounds_ok"]:
        found += [reason for reason in barred if reason.startswith(NO_PAIR)]
    if not isinstance(row["baseline_id"], str):
        found.append("nothing to compare it with was measured here")
    return found


def _clock_notes(table: pd.DataFrame, metric: str) -> list[str | None]:
    """The speed-up at one clock of the host in words, where it is known."""
    found: list[str | None] = []
    for middle, low, high in zip(*(table[f"clock_{name}"] for name in ("ratio", "lo", "hi")), strict=True):
        ends = [low, high] if metric in HIGHER_IS_BETTER else [1 / high, 1 / low]
        speed = middle if metric in HIGHER_IS_BETTER else 1 / middle
        found.append(f"{HOST_NOTE} {speed:.2f}x +- {(ends[1] - ends[0]) / 2:.2f}" if middle == middle else None)
    return found


def legend_flags(table: pd.DataFrame) -> tuple[str, ...]:
    """What the flags of these rows mean, in one remark."""
    found = {str(flag).partition(":")[0] for counts in table["flags"] for flag in counts or {}}
    meanings = [f"{name}: {meaning}" for name, meaning in FLAGS.items() if name in found]
    return (f"{'; '.join(meanings)}.",) if meanings else ()


def legend_host(notes: Iterable[list[str]]) -> tuple[str, ...]:
    return (LEGEND_HOST,) if any(HOST_NOTE in note for found in notes for note in found) else ()


def interval(name: str) -> tuple[str, str, str]:
    return name, f"{name}_lo", f"{name}_hi"


def present(table: pd.DataFrame, fields: list[Field]) -> tuple[Field, ...]:
    """Without the columns that no row has a value for; a verdict is judged by its ratio, the last of its sources."""

    def has_values(field: Field) -> bool:
        name = field.sources[-1 if field.form == "verdict" else 0]
        return name in table and bool(table[name].notna().any())

    return tuple(field for field in fields if field.word or field.form in ("text", "marked_ratio") or has_values(field))
