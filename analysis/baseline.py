"""The same rows against another stack than the sweep's baseline: a question to the rows, not to the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.errors import AnalysisError
from tasks.stacks import StackError, nearest, parse_stack

if TYPE_CHECKING:
    import pandas as pd


def against(frame: pd.DataFrame, stack: str) -> pd.DataFrame:
    """The rows with `stack` as baseline of every group that has it, and none for groups that have not.

    Runs of one round and group were measured in one block, whatever they are compared with, so that pairs are as good
    as those with the sweep's baseline (which alone is measured again with whatever a later run adds).

    Raises:
        AnalysisError: no cell has this stack, with those that there are.
    """
    import pandas as pd

    known = [str(item) for item in frame["optimization"].dropna().unique()]
    chosen = frame[frame["optimization"] == _in_full(stack)]
    if chosen.empty:
        raise AnalysisError(f"--baseline: no cell here has the stack {stack!r}{nearest(stack, known)}")
    group = ["result_dir", "baseline_id"]
    of_group = chosen.drop_duplicates(group).set_index(group)["cell_id"].to_dict()
    places = zip(*(frame[name] for name in group), strict=True)
    found = [of_group.get(place, pd.NA) for place in places]
    return frame.assign(baseline_id=pd.Series(found, index=frame.index, dtype="string"))


def _in_full(stack: str) -> str:
    """As rows name it: techniques in their order, options that are the default's left out."""
    try:
        return str(parse_stack(stack))
    except StackError:
        return stack  # of a technique that is not known here: rows may know it
