"""Faster, slower or indistinguishable: one verdict per cell against its baseline, from pairs over rounds.

The statistics and their reasons are in `analysis.inference`; `python -m analysis.simulate` shows what they are worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from analysis.frames import records
from analysis.host_clock import COMPARED, HIGHER_IS_BETTER, WAITED
from analysis.inference import MARGIN, Floats, Variance, baseline_correlation, judge, moderated_variance
from analysis.pair import KEY, cells, pairs
from tasks.row import Outcome

if TYPE_CHECKING:
    import pandas as pd

_Line = dict[str, Any]

NO_PAIR = "no pair"
FASTER, SLOWER, INDISTINGUISHABLE = "faster", "slower", "indistinguishable"


def verdicts(
    frame: pd.DataFrame, metric: str = "latency_ms_p50", floor: float | Mapping[str, float] = 0.0
) -> pd.DataFrame:
    """One line per cell that has a baseline other than itself; the frame is the family of Holm's correction.

    Columns:
        result_dir, cell_id, baseline_id, metric
        rounds: pairs behind the figures
        ratio, lo, hi: cell over baseline, geometric mean and 95 % interval, unadjusted, without the margin
        p, p_holm: two-sided, against no difference
        verdict: faster, slower, indistinguishable; null when barred or when there is no interval
        equivalent: the interval lies within the margin on both sides
        mde: smallest true difference that such a sweep finds in 80 %, as a fraction
        degrees, own_variance: of the t-distribution; whether the cell's own rounds alone gave the variance
        barred: why there is no verdict, a list
        left_out: pairs not used, because a flag bars them
        clock_ratio, clock_lo, clock_hi: the ratio and its interval at one clock of the host, where that visibly helps
            (`analysis.host_clock`), else null; no verdict rests on it

    Pairs that a flag bars are left out while more than half of them, and at least two, remain; otherwise all are used
    and the verdict is barred.

    Args:
        frame: rows as `load` gives them.
        metric: a time (less is faster), or `throughput_per_s`.
        floor: what the machine shows between equals (A/A gate), as a fraction, or as `analysis.control.floors` has it.
    """
    found, summaries = pairs(frame, metric), cells(frame)
    result = _judged(summaries, found, metric, floor)
    brought = found.assign(log_ratio=found["log_ratio_at_clock"])
    at_clock = _judged(summaries, brought, metric, floor) if found["host_clock"].any() else result
    for name in ("ratio", "lo", "hi"):
        result[f"clock_{name}"] = at_clock[name].where(at_clock["host_clock"])
    return result.drop(columns="host_clock")


def _judged(
    summaries_of: pd.DataFrame, found: pd.DataFrame, metric: str, floor: float | Mapping[str, float]
) -> pd.DataFrame:
    import pandas as pd

    by_cell = {key: group for key, group in found.groupby(KEY, sort=False)}  # noqa: C416
    summaries = {(row["result_dir"], row["cell_id"]): row for row in records(summaries_of)}
    lines = []
    for key, row in summaries.items():
        if not isinstance(row["baseline_id"], str) or row["cell_id"] == row["baseline_id"]:
            continue
        baseline = summaries.get((row["result_dir"], row["baseline_id"]))
        lines.append(_line(row, baseline, by_cell.get(key), metric, floor))
    result = pd.DataFrame(lines, columns=_COLUMNS)
    _fill(result, metric)
    return result.drop(columns=_INTERNAL)


_INTERNAL = ["pool", "group_id", "log_mean", "log_variance", "logs", "floor", "widened"]
_COLUMNS = [
    "result_dir", "cell_id", "baseline_id", "metric", "rounds", "ratio", "lo", "hi", "p", "p_holm", "verdict",
    "equivalent", "mde", "degrees", "own_variance", "barred", "left_out", "host_clock", *_INTERNAL,
]  # fmt: skip


def _line(
    row: _Line, baseline: _Line | None, found: pd.DataFrame | None, metric: str, floor: float | Mapping[str, float]
) -> dict[str, Any]:
    barred = _cell_reasons(row, baseline)
    used, left_out = found, 0
    if found is not None:
        clean = found[[not reasons for reasons in found["barred"]]]
        if len(clean) >= 2 and 2 * len(clean) > len(found):
            used, left_out = clean, len(found) - len(clean)
        else:
            barred += sorted({reason for reasons in found["barred"] for reason in reasons})
    values = np.array([] if used is None else used["log_ratio"], dtype=np.float64)
    if values.size == 0 and row["rounds_ok"] and baseline is not None and baseline["rounds_ok"]:
        time = "its time" if metric == COMPARED else metric
        barred.append(f"{NO_PAIR}: {time} is missing, or the baseline was not measured in its blocks")
    if values.size == 1:
        barred.append("1 round: no interval")
    return {
        "result_dir": row["result_dir"],
        "cell_id": row["cell_id"],
        "baseline_id": row["baseline_id"],
        "metric": metric,
        "rounds": values.size,
        "ratio": float(np.exp(values.mean())) if values.size else float("nan"),
        "barred": barred,
        "left_out": left_out,
        "host_clock": bool(used is not None and used["host_clock"].any()),
        "pool": (row["result_dir"], row["sweep"], row["hardware"]),
        "group_id": (row["result_dir"], row["group_id"] if isinstance(row["group_id"], str) else row["baseline_id"]),
        "log_mean": values.mean() if values.size else float("nan"),
        "log_variance": values.var(ddof=1) if values.size > 1 else float("nan"),
        "logs": {} if used is None else dict(zip(used["block_id"], values, strict=True)),
        "floor": floor if isinstance(floor, int | float) else _floor(row, baseline, floor),
        "widened": bool(used is not None and used["widened"].any()),
    }


def _floor(row: _Line, baseline: _Line | None, floors: Mapping[str, float]) -> float:
    """What equals show on this hardware; among cells that wait for their host, what such equals do."""
    waited = any(WAITED in (side["flags"] or {}) for side in (row, baseline) if side is not None)
    names = [row["hardware"], waited_on(row["hardware"])] if waited else [row["hardware"]]
    return max(floors.get(name, 0.0) for name in names)


def waited_on(hardware: str) -> str:
    """Name of the floor of cells of `hardware` that wait for their launches."""
    return f"{hardware} {WAITED}"


def _cell_reasons(row: _Line, baseline: _Line | None) -> list[str]:
    """Why the cell as a whole may not be ranked."""
    reasons = ["simulated hardware"] if row["simulated"] else []
    if row["outcome"] != Outcome.OK:
        reasons.append(_not_ok(row))
    if baseline is None:
        reasons.append("the baseline has no row")
    elif baseline["outcome"] != Outcome.OK:
        reasons.append(f"baseline {_not_ok(baseline)}")
    return reasons


def _not_ok(row: _Line) -> str:
    if row["rounds_ok"] == 0:
        return str(row["outcome"])
    return f"{row['outcome']} in {row['outcomes'][row['outcome']]} of {row['rounds']} rounds"


def _fill(result: pd.DataFrame, metric: str) -> None:
    """Variances per device and sweep, then one family of intervals and verdicts."""
    result["own_variance"] = result["own_variance"].astype("boolean")
    result["equivalent"] = result["equivalent"].astype("boolean")
    result["verdict"] = result["verdict"].astype("string")
    numbers = ["lo", "hi", "p", "p_holm", "mde", "degrees"]
    result[numbers] = result[numbers].astype("float64")
    tested = result.index[(result["rounds"] >= 2)]
    if tested.empty:
        return
    for _, pool in result.loc[tested].groupby("pool", sort=False):
        groups = np.asarray(pool.groupby("group_id", sort=False).ngroup(), dtype=np.int64)
        rounds = pool["rounds"].to_numpy(dtype=np.float64)
        shared = baseline_correlation(_by_block(pool["logs"], groups), groups)
        moderated = moderated_variance(pool["log_variance"].to_numpy(dtype=np.float64), rounds, groups, shared)
        result.loc[pool.index, "log_variance"] = moderated.variance
        result.loc[pool.index, "degrees"] = moderated.degrees
        result.loc[pool.index, "own_variance"] = moderated.own
    for barred in (False, True):  # those without a verdict get their interval, but do not burden the family
        index = tested[[bool(reasons) == barred for reasons in result.loc[tested, "barred"]]]
        if len(index):
            _judge(result, index, metric, barred)


def _by_block(logs: pd.Series[Any], groups: npt.NDArray[np.int64]) -> Floats:
    """Log-ratios (cells, blocks of a cell's own group), NaN where a cell has none: no two groups share a block."""
    places: dict[int, dict[str, int]] = {}
    for group, of_cell in zip(groups.tolist(), logs, strict=True):
        known = places.setdefault(group, {})
        for block in of_cell:
            known.setdefault(block, len(known))
    table = np.full((len(logs), max(map(len, places.values()))), np.nan)
    for number, (group, of_cell) in enumerate(zip(groups.tolist(), logs, strict=True)):
        table[number, [places[group][block] for block in of_cell]] = list(of_cell.values())
    return table


def _judge(result: pd.DataFrame, index: pd.Index[Any], metric: str, barred: bool) -> None:
    part = result.loc[index]

    def array(name: str) -> Any:
        return part[name].to_numpy(dtype=np.float64)

    floor = array("floor")
    variance = Variance(variance=array("log_variance"), degrees=array("degrees"), own=array("own_variance") > 0)
    judged = judge(
        array("log_mean"),
        variance,
        array("rounds"),
        margin=np.maximum(MARGIN, floor),
        least_half_width=np.where(part["widened"], floor, 0.0),
    )
    result.loc[index, "lo"], result.loc[index, "hi"] = np.exp(judged.lo), np.exp(judged.hi)
    result.loc[index, "p"], result.loc[index, "mde"] = judged.p, np.expm1(judged.mde)
    if barred:
        return
    result.loc[index, "p_holm"], result.loc[index, "equivalent"] = judged.p_holm, judged.equivalent
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    words = {0: INDISTINGUISHABLE, sign: FASTER, -sign: SLOWER}
    result.loc[index, "verdict"] = [words[int(direction)] for direction in judged.direction]
