"""From rows to pairs inside blocks, and to one line per cell over its rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.frames import column, numbers
from analysis.host_clock import POOL, at_one_host_clock, clocks
from tasks.row import Outcome
from tasks.statistics import effective_sample_size, percentile_or_none, t_interval

if TYPE_CHECKING:
    import pandas as pd

KEY = ["result_dir", "cell_id"]
# Findings that make a run unfit to decide which of two is faster; others are printed only. Names as rows flag them.
BARRING_FLAGS = frozenset(
    {
        "steal",
        "foreign_load",
        "foreign_gpu_process",
        "cpu_starved",
        "aa_failed",
        "passes_contradict",
        "throttled",  # by heat or the power brake; a software power cap is normal, and no flag
        "executed_instead",
    }
)
# Findings that widen the interval to what this machine shows between equals.
WIDENING_FLAGS = frozenset({"interference"})
# Most severe first: what went wrong unexpectedly, then what is a result.
SEVERITY = (
    Outcome.CRASHED,
    Outcome.ERROR,
    Outcome.TIMEOUT,
    Outcome.INVALID,
    Outcome.UNPLACED,
    Outcome.OOM,
    Outcome.UNSUPPORTED,
    Outcome.OK,
)
PERCENTILES = {"latency_ms_p95": 95.0, "latency_ms_p99": 99.0}
PRIMARY_LABELS = ("call", "token")  # of the segments that `latency_ms` is about
WITH_INTERVAL = ("latency_ms_p50", "latency_ms_mean", "throughput_per_s", "energy_j_per_unit")
IDENTITY = (
    "sweep", "baseline_id", "group_id", "model", "model_source", "weights", "optimization", "workload",
    "workload_point", "batch_size", "sequence_length", "new_tokens", "hardware", "hardware_requested", "device_kind",
    "device_name", "profile", "throughput_unit", "energy_source", "quality_reference", "sample_kind", "plan_order",
)  # fmt: skip
NOT_SUMMARISED = frozenset(
    {
        "schema_version", "round", "order_in_round", "attempt", "planned_rounds", "plan_order", "batch_size",
        "sequence_length", "new_tokens",
    }
)  # fmt: skip


def pairs(frame: pd.DataFrame, metric: str = "latency_ms_p50") -> pd.DataFrame:
    """Each measured row with the row of its own baseline in the same block.

    Columns: result_dir, cell_id, baseline_id, round, block_id, value, baseline_value, log_ratio (of value to baseline
    value), log_ratio_at_clock (the same at one clock of the host, where `host_clock` says that this helps: see
    `analysis.host_clock`), barred (why this pair may not decide, a list), widened, host_clock. Baselines are not paired
    with themselves; rows without a positive value, or not `ok`, form no pair.
    """
    import numpy as np
    import pandas as pd

    value = numbers(frame, metric)
    kept = ["result_dir", "cell_id", "baseline_id", "round", "block_id", "flags", "steady"]
    pool = {name: column(frame, name) for name in POOL}
    usable = frame[kept].assign(**pool, value=value, clock=clocks(frame, metric))
    usable = usable[(frame["outcome"] == Outcome.OK).fillna(False).astype(bool) & (value > 0)]
    references = usable[usable["cell_id"] == usable["baseline_id"]].drop_duplicates(
        ["result_dir", "block_id", "cell_id"], keep="last"
    )
    joined = usable[usable["cell_id"] != usable["baseline_id"]].merge(
        references[["result_dir", "block_id", "cell_id", "value", "flags", "steady", "clock"]],
        left_on=["result_dir", "block_id", "baseline_id"],
        right_on=["result_dir", "block_id", "cell_id"],
        suffixes=("", "_of_baseline"),
    )
    joined["log_ratio"] = np.log(joined["value"]) - np.log(joined["value_of_baseline"])
    joined["clock_ratio"] = joined["clock"] - joined["clock_of_baseline"]
    steady, other_steady = (
        joined[name].fillna(True).astype(bool).tolist() for name in ("steady", "steady_of_baseline")
    )
    sides = list(zip(joined["flags"], steady, joined["flags_of_baseline"], other_steady, strict=True))
    joined["barred"] = pd.Series([_barred(*side) for side in sides], index=joined.index, dtype="object")
    joined = at_one_host_clock(joined, metric)
    joined["widened"] = [bool(WIDENING_FLAGS & {*flags, *other}) for flags, _, other, _ in sides]
    joined = joined.rename(columns={"value_of_baseline": "baseline_value"})
    names = ["result_dir", "cell_id", "baseline_id", "round", "block_id", "value", "baseline_value", "log_ratio"]
    return (
        joined[[*names, "log_ratio_at_clock", "barred", "widened", "host_clock"]]
        .sort_values([*KEY, "round"], kind="stable")
        .reset_index(drop=True)
    )


def _barred(flags: Sequence[str], steady: bool, of_baseline: Sequence[str], baseline_steady: bool) -> list[str]:
    found = sorted(BARRING_FLAGS & set(flags)) + (["not steady"] if not steady else [])
    others = sorted(BARRING_FLAGS & set(of_baseline)) + (["not steady"] if not baseline_steady else [])
    return found + [f"baseline {reason}" for reason in others]


def cells(frame: pd.DataFrame, samples: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line per (result_dir, cell_id), in the order of the rows.

    Outcome: `ok` if every row is, or if as many rounds as planned are (then failures were measured again); otherwise
    the most severe of `SEVERITY` with the reason of its newest row. Numbers are medians over `ok` rows; `_lo`, `_hi`
    are t-intervals over rounds on the log scale, null for one round. Percentiles are of the rounds' pooled samples
    where `samples` are given (null where too few independent ones stand behind them), else medians over rounds.
    """
    import pandas as pd

    frame = frame.reset_index(drop=True)
    ok = (frame["outcome"] == Outcome.OK).fillna(False).astype(bool)
    groups = frame.groupby(KEY, sort=False)
    measured = frame[ok].groupby(KEY, sort=False)
    result = pd.DataFrame(index=pd.MultiIndex.from_frame(frame[KEY].drop_duplicates()))
    identity = [name for name in IDENTITY if name in frame]
    result[identity] = groups[identity].first()
    result["rounds"] = groups.size()
    result["rounds_ok"] = measured.size().reindex(result.index, fill_value=0)
    result["simulated"] = column(frame, "hardware_simulated").fillna(False).astype(bool).groupby(
        [frame[name] for name in KEY], sort=False
    ).any()  # fmt: skip
    summaries = [_outcome(rows) for rows in _by_cell(frame)]
    for position, name in enumerate(("outcome", "reason", "outcomes", "flags")):
        result[name] = pd.Series([summary[position] for summary in summaries], index=result.index, dtype="object")

    shown = [
        name
        for name in frame.select_dtypes("number").columns
        if name not in NOT_SUMMARISED and not name.endswith(("_lo", "_hi", "_n"))
    ]
    floats = frame.loc[ok, shown].astype("float64")
    medians = floats.groupby([frame.loc[ok, name] for name in KEY], sort=False).median().reindex(result.index)
    # The copy joins the single columns, of which pandas would warn at the next insertion.
    result = pd.concat([result, medians.drop(columns=[name for name in shown if name in result])], axis=1).copy()
    for name in WITH_INTERVAL:
        if name in frame:
            bounds = [_log_interval(values) for values in _values(frame, ok, name, result.index)]
            result[f"{name}_lo"], result[f"{name}_hi"] = zip(*bounds, strict=True) if bounds else ((), ())
    if samples is not None and not samples.empty:
        _pool_percentiles(result, frame[ok], samples)
    return result.reset_index().copy()


def _by_cell(frame: pd.DataFrame) -> Iterable[list[tuple[str, str | None, list[str], int | None]]]:
    """Per cell, its rows from old to new as (outcome, reason, flags, planned rounds)."""
    found: dict[tuple[str, str], list[tuple[str, str | None, list[str], int | None]]] = {}
    names = (*KEY, "outcome", "reason", "flags", "planned_rounds")
    columns = [column(frame, name).astype("object").where(column(frame, name).notna(), None).tolist() for name in names]
    for directory, cell_id, outcome, reason, flags, planned in zip(*columns, strict=True):
        found.setdefault((directory, cell_id), []).append((outcome, reason, list(flags or []), planned))
    return found.values()


def _outcome(
    rows: list[tuple[str, str | None, list[str], int | None]],
) -> tuple[str, str | None, dict[str, int], dict[str, int]]:
    """Outcome, reason, number of rows per outcome, number of rows per flag."""
    counts = Counter(str(outcome) for outcome, *_ in rows)
    flags = Counter(flag for _, _, found, _ in rows for flag in found)
    planned = rows[-1][3]
    if counts[Outcome.OK] == len(rows) or (planned and counts[Outcome.OK] >= planned):
        return Outcome.OK.value, None, dict(counts), dict(flags)
    worst = next((outcome.value for outcome in SEVERITY if counts[outcome]), str(rows[-1][0]))
    reason = next((reason for outcome, reason, *_ in reversed(rows) if outcome == worst and reason), None)
    return worst, reason, dict(counts), dict(flags)


def _values(frame: pd.DataFrame, ok: pd.Series[bool], name: str, index: Iterable[Any]) -> list[list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    rows = frame[ok & frame[name].notna()]
    for directory, cell_id, value in zip(rows["result_dir"], rows["cell_id"], rows[name], strict=True):
        found.setdefault((directory, cell_id), []).append(float(value))
    return [found.get(key, []) for key in index]


def _log_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the geometric mean; NaN for fewer than two values or where one is not positive."""
    if len(values) < 2 or min(values) <= 0:
        return float("nan"), float("nan")
    interval = t_interval([math.log(value) for value in values])
    assert interval is not None
    return math.exp(interval.lo), math.exp(interval.hi)


def _pool_percentiles(result: pd.DataFrame, measured: pd.DataFrame, samples: pd.DataFrame) -> None:
    """Replace percentiles by those of the pooled latency samples of the rounds in `measured`."""
    import numpy as np

    wanted = measured[["result_dir", "cell_id", "round", "result_key"]]
    if "result_dir" not in samples:
        samples = samples.assign(result_dir=measured["result_dir"].iloc[0] if len(measured) else "")
    series = samples[(samples["measured_in"] == "latency") & samples["label"].isin(PRIMARY_LABELS)]
    series = series.merge(wanted, on=["result_dir", "cell_id", "round", "result_key"])
    key: Any
    for key, group in series.groupby(KEY, sort=False):
        blocks = str(result.loc[key].get("sample_kind")) == "block_mean"
        runs = [np.asarray(values, dtype=np.float64) for values in group["values_ms"] if len(values)]
        if not runs:
            continue
        pooled, effective = np.concatenate(runs), sum(effective_sample_size(run) for run in runs)
        for name, percentile in PERCENTILES.items():
            value = None if blocks else percentile_or_none(pooled, percentile, effective)
            result.loc[key, name] = float("nan") if value is None else value
