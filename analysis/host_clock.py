"""Figures that waited for the host, brought to one clock of it (`analysis.inference.at_one_clock` has the reasons)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames import column, numbers
from analysis.pair import KEY
from tasks.row import Outcome

if TYPE_CHECKING:
    import pandas as pd

HIGHER_IS_BETTER = frozenset({"throughput_per_s"})
COMPARED, COMPARED_LOOP = "compared_ms", "compared_host_loop_ms"  # see `analysis.tables.with_compared_time`
LOOPS = {"throughput_per_s": "host_loop_throughput_ms", COMPARED: COMPARED_LOOP}
WAITED = "launch_bound"  # the flag of rows whose device waited for its launches
CORRECTED = "host_clock"
POOL = ("result_dir", "sweep", "hardware", "hostname", "workload")


def host_loops(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Milliseconds of the fixed loop that belong to `metric`: for rates, those of the throughput pass where known."""
    loop = numbers(frame, "host_loop_ms")
    if metric in LOOPS and LOOPS[metric] in frame:
        found = numbers(frame, LOOPS[metric])
        return found.where(found > 0, loop)
    return loop


def with_one_host_clock(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The frame with `metric` of rows flagged `launch_bound` at the median clock of their host in their sweep.

    The column `host_clock` says which figures were changed: those of a host, sweep and workload where that halves the
    variance between rounds at least. CPU rows, rows without `host_loop_ms` and those that waited for the device stay.

    Args:
        frame: rows as `load` gives them.
        metric: a time, or `throughput_per_s`.
    """
    import numpy as np
    import pandas as pd

    from analysis.inference import at_one_clock

    if CORRECTED in frame:
        return frame
    value, loop = numbers(frame, metric), host_loops(frame, metric)
    changed = pd.Series(False, index=frame.index)
    waited = pd.Series([WAITED in (flags or ()) for flags in column(frame, "flags").tolist()], index=frame.index)
    usable = waited & (value > 0) & (loop > 0) & (frame["outcome"] == Outcome.OK).fillna(False).astype(bool)
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    rows = frame[usable]
    hosts = [column(rows, name).astype("string") for name in POOL]
    for _, found in rows.groupby(hosts, sort=False, dropna=False):
        times = sign * np.log(value[found.index].to_numpy())
        cells = np.asarray(found.groupby(KEY, sort=False).ngroup(), dtype=np.int64)
        brought, used = at_one_clock(times, np.log(loop[found.index].to_numpy()), cells)
        if used:
            value[found.index] = np.exp(sign * brought)
            changed[found.index] = True
    others = frame.drop(columns=metric, errors="ignore")
    return pd.concat([others, value.rename(metric), changed.rename(CORRECTED)], axis=1)
