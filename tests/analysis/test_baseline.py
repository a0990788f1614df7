"""The same rows against another baseline than the sweep's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis import against, comparison_table, verdicts
from analysis.errors import AnalysisError

Loaded = Callable[..., pd.DataFrame]
SPEED = {"bf16": 2.0, "bf16+sdpa-flash": 2.0, "nf4": 1.0}


def test_everything_is_compared_with_the_stack(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed=SPEED))
    judged = verdicts(against(frame, "bf16")).set_index("cell_id")
    assert build.cell("bf16").cell_id not in judged.index
    for stack, ratio, verdict in (
        ("baseline", 2.0, "slower"),
        ("bf16+sdpa-flash", 1.0, "indistinguishable"),
        ("nf4", 2.0, "slower"),
    ):
        line = judged.loc[build.cell(stack).cell_id]
        assert line["ratio"] == pytest.approx(ratio, rel=0.02)
        assert line["verdict"] == verdict
        assert line["rounds"] == 5 and not line["barred"]
    assert verdicts(frame)["ratio"].min() == pytest.approx(0.5, rel=0.02), "the rows given stay as they are"


def test_the_sweeps_own_baseline_changes_nothing(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed=SPEED))
    pd.testing.assert_frame_equal(verdicts(against(frame, "baseline")), verdicts(frame))


def test_it_stands_first_and_says_so(build: SimpleNamespace, loaded: Loaded) -> None:
    table = comparison_table(against(loaded(build.sweep(speed=SPEED)), "nf4")).frame
    assert table["optimization"].tolist()[0] == "nf4"
    assert table["is_baseline"].tolist() == [True, False, False, False]


def test_each_hardware_has_its_own_and_may_have_none(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = [*build.sweep(speed=SPEED), *build.sweep(stacks=("baseline", "bf16"), hardware=("cpu",))]
    table = comparison_table(against(loaded(rows), "bf16+sdpa-flash")).frame
    there, here = table[table["hardware"] == "h200"], table[table["hardware"] == "cpu"]
    assert there["is_baseline"].sum() == 1 and there["speedup"].notna().sum() == 3
    assert here["is_baseline"].sum() == 0 and here["speedup"].isna().all() and len(here) == 2


def test_order_of_techniques_and_defaults_do_not_matter(build: SimpleNamespace, loaded: Loaded) -> None:
    frame = loaded(build.sweep(speed=SPEED))
    for text in ("sdpa-flash + bf16", "bf16+sdpa-flash"):
        pd.testing.assert_frame_equal(against(frame, text), against(frame, "bf16+sdpa-flash"))


def test_a_technique_that_only_the_rows_know(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(speed=SPEED)
    for row in rows:
        row["optimization"] = row["optimization"].replace("nf4", "theirs")
    assert verdicts(against(loaded(rows), "theirs"))["rounds"].tolist() == [5, 5, 5]


@pytest.mark.parametrize(("stack", "help_"), [("bf16+sdpa-flas", "did you mean 'bf16"), ("gptq", "known: ")])
def test_no_such_stack(build: SimpleNamespace, loaded: Loaded, stack: str, help_: str) -> None:
    with pytest.raises(AnalysisError, match=help_):
        against(loaded(build.sweep()), stack)
