"""Pairs of which a side waited for the host, at one clock of it (`analysis.inference.at_one_clock` has the reasons)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.frames import column, numbers
from tasks.row import Outcome

if TYPE_CHECKING:
    import pandas as pd

HIGHER_IS_BETTER = frozenset({"throughput_per_s"})
COMPARED, COMPARED_LOOP = "compared_ms", "compared_host_loop_ms"  # see `analysis.tables.with_compared_time`
LOOPS = {"throughput_per_s": "host_loop_throughput_ms", COMPARED: COMPARED_LOOP}
WAITED = "launch_bound"  # the flag of rows whose device waited for its launches
POOL = ("result_dir", "sweep", "hardware", "hostname", "workload")


def host_loops(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Milliseconds of the fixed loop that belong to `metric`: for rates, those of the throughput pass where known."""
    loop = numbers(frame, "host_loop_ms")
    if metric in LOOPS and LOOPS[metric] in frame:
        found = numbers(frame, LOOPS[metric])
        return found.where(found > 0, loop)
    return loop


def clocks(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Per row, the logarithm of its host's loop over the median one of that host in that sweep and workload.

    Zero for cells of which at most half of the rounds are flagged `launch_bound`: they follow the device. NaN where
    such a cell has no loop beside it, as on CPUs.
    """
    import numpy as np
    import pandas as pd

    rows = pd.DataFrame({name: column(frame, name).astype("string").to_numpy() for name in (*POOL, "cell_id")})
    ok = (frame["outcome"] == Outcome.OK).fillna(False).to_numpy(dtype=bool)
    flagged = np.array([WAITED in list(flags) for flags in frame["flags"]], dtype=bool)
    share = pd.Series(np.where(ok, flagged, np.nan)).groupby([rows["result_dir"], rows["cell_id"]]).transform("mean")
    waited = (share > 0.5).to_numpy(dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        loop = pd.Series(np.where(waited & ok, np.log(host_loops(frame, metric).to_numpy()), np.nan))
    middle = loop.groupby([rows[name] for name in POOL], dropna=False).transform("median")
    return pd.Series(np.where(waited, loop - middle, 0.0), index=frame.index)


def at_one_host_clock(pairs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Pairs with `log_ratio_at_clock`, at one clock where that helps, and `host_clock`, which says where.

    Whether it helps is asked of the pairs that nothing bars; the others follow.

    Args:
        pairs: with `clock_ratio`, the difference of the two sides' `clocks`, `barred` and the columns of `POOL`.
        metric: a time, or `throughput_per_s`.
    """
    import numpy as np

    from analysis.inference import at_one_clock

    raw, used = pairs["log_ratio"].to_numpy(dtype=np.float64), np.zeros(len(pairs), dtype=bool)
    free = np.array([not reasons for reasons in pairs["barred"]], dtype=bool)
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    clock = pairs["clock_ratio"].to_numpy(dtype=np.float64)
    brought = raw - sign * clock
    positions = pairs.assign(position=np.arange(len(pairs)))[~np.isnan(clock)]
    pools = [positions[name].astype("string") for name in POOL]
    for _, pool in positions.groupby(pools, sort=False, dropna=False):
        where = pool["position"].to_numpy()
        asked = where[free[where]]
        if not clock[asked].any():
            continue
        comparisons = np.asarray(pool.groupby("cell_id", sort=False).ngroup(), dtype=np.int64)
        of_asked = comparisons[free[where]]
        _, helped = at_one_clock(raw[asked], brought[asked], of_asked)
        used[where] = np.isin(comparisons, of_asked[helped])
    return pairs.assign(log_ratio_at_clock=np.where(used, brought, raw), host_clock=used)
