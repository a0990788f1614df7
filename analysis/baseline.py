"""The same rows against another stack than the sweep's baseline: a question to the rows, not to the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.errors import AnalysisError
from analysis.frames import column
from tasks.stacks import StackError, nearest, parse_stack

if TYPE_CHECKING:
    import pandas as pd


def against(frame: pd.DataFrame, stack: str) -> pd.DataFrame:
    """The rows with `stack` as baseline of every group that has it, and none for groups that have not.

    Runs of one round and group were measured in one block, whatever they are compared with, so that pairs are as good
    as those with the sweep's baseline. That one alone is measured again with what a later run adds or retries: such
    rows have no pair with another.

    Raises:
        AnalysisError: no cell has this stack, with those that there are.
    """
    known = [str(item) for item in frame["optimization"].dropna().unique()]
    chosen = frame[frame["optimization"] == (stack if stack in known else _in_full(stack))]
    if chosen.empty:
        raise AnalysisError(f"no cell here has the stack {stack!r}{nearest(stack, known)}")
    groups = frame["result_dir"].astype("string") + "/" + column(frame, "group_id").fillna(frame["baseline_id"])
    of_group = dict(zip(groups[chosen.index], chosen["cell_id"], strict=True))
    return frame.assign(baseline_id=groups.map(of_group, na_action="ignore").astype("string"))


def _in_full(stack: str) -> str:
    """As rows name it: techniques in their order, options that are the default's left out."""
    try:
        return str(parse_stack(stack))
    except StackError:
        return stack  # of a technique that is not known here: rows may know it
