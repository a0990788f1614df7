"""The A/A gate: one stack under two labels in the same blocks. What differs there is what this machine makes up.

A control is a cell whose stack is another cell's plus `again`. The gate passes where the two are indistinguishable,
their ratio is near one, and the runs of each agree; a group whose control fails is not ranked. The greatest ratio of a
device's passing controls is the floor below which no difference is called one; controls that wait for their launches
give the floor of such cells only. What is compared is what the table compares: the time of `COMPARED`, or the rate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.compared import with_compared_time
from analysis.frames import numbers, records
from analysis.host_clock import COMPARED, WAITED
from analysis.pair import KEY
from analysis.table import Field, Table
from analysis.verdicts import INDISTINGUISHABLE, verdicts, waited_on
from tasks.row import Outcome
from tasks.statistics import coefficient_of_variation

if TYPE_CHECKING:
    import pandas as pd

SUFFIX = "again"
FAILED = "aa_failed"
LIMITS = {"cuda": 0.02, "cpu": 0.03}  # of the ratio's distance from one, and of the variation between rounds
WAITED_LIMIT = 0.05  # the same where steps wait for their launches, and so for the clock of a shared host
GATE_COLUMNS = [
    "model", "workload_point", "hardware", "optimization", "rounds", "median_ms", "variation", "ratio", "lo", "hi",
    "mde", "verdict", "passed", "why", "waited", "result_dir", "group_id",
]  # fmt: skip


def controlled_stack(optimization: str) -> str | None:
    """The stack that a control repeats, None for other stacks: `bf16+again` -> `bf16`, `again` -> `baseline`."""
    parts = optimization.split("+")
    if SUFFIX not in parts:
        return None
    return "+".join(part for part in parts if part != SUFFIX) or "baseline"


def gate(frame: pd.DataFrame, metric: str = COMPARED) -> pd.DataFrame:
    """One line per control: ratio to what it repeats, variation between rounds, and whether the gate is passed.

    Columns: `GATE_COLUMNS`. `variation` is the greater of the two cells' coefficients of variation between rounds.
    """
    import pandas as pd

    if metric == COMPARED and COMPARED not in frame:
        frame = with_compared_time(frame)
    lines = []
    for control, repeated in _controls(frame):
        both = frame[frame["cell_id"].isin([control["cell_id"], repeated]) & (frame["outcome"] == Outcome.OK)]
        both = both[both["result_dir"] == control["result_dir"]]
        both = both.assign(baseline_id=repeated)
        judged = records(verdicts(both, metric))
        values = {cell: numbers(rows, metric).dropna().tolist() for cell, rows in both.groupby("cell_id")}
        flagged = [WAITED in list(flags) for flags in both["flags"]]
        waited = 2 * sum(flagged) > len(flagged)
        lines.append(_line(control, judged[0] if judged else {}, values, waited))
    return pd.DataFrame(lines, columns=GATE_COLUMNS)


def _controls(frame: pd.DataFrame) -> list[tuple[dict[str, Any], str]]:
    """Each control's identity, and the cell_id that it repeats."""
    identity = frame[[*KEY, "group_id", "optimization", "model", "workload_point", "hardware", "device_kind"]]
    cells = records(identity.drop_duplicates(KEY))
    by_stack = {(row["result_dir"], row["group_id"], row["optimization"]): row["cell_id"] for row in cells}
    found = []
    for row in cells:
        stack = controlled_stack(row["optimization"])
        repeated = by_stack.get((row["result_dir"], row["group_id"], stack)) if stack else None
        if repeated is not None:
            found.append((row, repeated))
    return found


def _line(
    control: dict[str, Any], judged: dict[str, Any], values: dict[str, list[float]], waited: bool
) -> dict[str, Any]:
    limit = WAITED_LIMIT if waited else LIMITS.get(str(control["device_kind"]), LIMITS["cpu"])
    variations = [coefficient_of_variation(of_cell) for of_cell in values.values()]
    variation = max((value for value in variations if value is not None), default=math.nan)
    ratio = judged.get("ratio", math.nan)
    why = []
    if not values or math.isnan(ratio):
        why.append("no pair of measured rounds")
    verdict = judged.get("verdict")
    if isinstance(verdict, str) and verdict != INDISTINGUISHABLE:
        why.append(f"called {verdict}")
    barred = judged.get("barred")
    if isinstance(barred, list) and barred:
        why.append(f"no verdict: {', '.join(barred)}")
    if abs(ratio - 1) > limit:
        why.append(f"ratio off by {abs(ratio - 1):.1%}, limit {limit:.0%}")
    if variation > limit:
        why.append(f"rounds vary by {variation:.1%}, limit {limit:.0%}")
    own = values.get(control["cell_id"], [])
    names = ("model", "workload_point", "hardware", "optimization", "result_dir", "group_id")
    return {
        **{name: control[name] for name in names},
        **{name: judged.get(name) for name in ("rounds", "lo", "hi", "mde", "verdict")},
        "median_ms": sorted(own)[len(own) // 2] if own else None,
        "waited": waited,
        "variation": variation,
        "ratio": ratio,
        "passed": not why,
        "why": "; ".join(why) or None,
    }


def floors(frame: pd.DataFrame, metric: str = COMPARED) -> dict[str, float]:
    """Per hardware tag, the greatest |ratio - 1| of its passing controls; absent without controls.

    Those that wait for their launches stand apart, under `analysis.verdicts.waited_on`.
    """
    lines = records(gate(frame, metric)) if len(frame) else []
    result: dict[str, float] = {}
    for line in lines:
        if line["passed"]:
            name = waited_on(line["hardware"]) if line["waited"] else line["hardware"]
            result[name] = max(result.get(name, 0.0), abs(line["ratio"] - 1))
    return result


def with_gate(frame: pd.DataFrame, metric: str = COMPARED) -> pd.DataFrame:
    """The frame with the flag `aa_failed` on every row of a group whose control failed: barred from verdicts."""
    import pandas as pd

    failed = {(line["result_dir"], line["group_id"]) for line in records(gate(frame, metric)) if not line["passed"]}
    if not failed:
        return frame
    groups = zip(frame["result_dir"], frame["group_id"], frame["flags"], strict=True)
    flags = [[*had, FAILED] if (where, group) in failed else had for where, group, had in groups]
    return frame.assign(flags=pd.Series(flags, index=frame.index, dtype="object"))


def gate_table(frame: pd.DataFrame) -> Table:
    """The gate as a table: what `doctor --calibrate` prints."""
    lines = gate(frame)
    lines["is_baseline"] = False
    lines["gate"] = ["passed" if passed else "failed" for passed in lines["passed"]]
    lines["notes"] = [[why] if isinstance(why, str) else [] for why in lines["why"]]
    return Table(
        title="A/A gate",
        frame=lines,
        fields=(
            Field(header="model", form="text", sources=("model",)),
            Field(header="workload", form="text", sources=("workload_point",)),
            Field(header="median ms", form="number", sources=("median_ms",)),
            Field(header="between rounds", form="percent", sources=("variation",)),
            Field(header="again / first", form="ratio", sources=("ratio", "lo", "hi", "is_baseline")),
            Field(header="resolves", form="percent", sources=("mde",)),
            Field(header="gate", form="text", sources=("gate",)),
        ),
        sections=("hardware",),
        notes="notes",
        footnotes=("resolves: smallest true difference that such a sweep finds in 80 % of runs.",),
    )
