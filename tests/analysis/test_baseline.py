"""The same rows against another baseline than the sweep's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis import against, comparison_table, tradeoff_table, verdicts
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
    assert all("nothing to compare it with was measured here" in notes for notes in here["notes"])


def test_what_was_measured_elsewhere_has_no_pair(build: SimpleNamespace, loaded: Loaded) -> None:
    """A retry runs in a block with the sweep's own baseline: with another one there is no ratio, and a note says so."""
    rows = build.sweep(speed=SPEED, stacks=("baseline", "bf16"))
    failed = [build.row(build.cell("nf4"), round_, outcome="invalid") for round_ in range(2)]
    again = [build.row(build.cell(stack), 5, 10.0) for stack in ("baseline", "nf4")]
    for name, ratio in (("baseline", True), ("bf16", False)):
        table = comparison_table(against(loaded([*rows, *failed, *again], name), name)).frame
        line = table[table["optimization"] == "nf4"].iloc[0]
        assert (line["speedup"] == line["speedup"]) == ratio
        assert any("no pair" in note for note in line["notes"]) != ratio


def test_two_folders(build: SimpleNamespace, loaded: Loaded) -> None:
    one = loaded(build.sweep(speed=SPEED), "one")
    two = loaded(build.sweep(speed={"bf16": 4.0}, stacks=("baseline", "bf16")), "two")
    judged = verdicts(against(pd.concat([one, two], ignore_index=True), "bf16"))
    found = judged[judged["cell_id"] == build.cell().cell_id].set_index("result_dir")["ratio"]
    assert sorted(found) == pytest.approx([2.0, 4.0], rel=0.02)


def test_rows_without_a_group_stay_without(build: SimpleNamespace, loaded: Loaded) -> None:
    rows = build.sweep(speed=SPEED)
    for row in rows:
        if row["optimization"] == "nf4":
            row |= {"group_id": None, "baseline_id": None}
    frame = against(loaded(rows), "bf16")
    assert frame["baseline_id"].isna().tolist() == (frame["optimization"] == "nf4").tolist()


def test_tradeoff(build: SimpleNamespace, loaded: Loaded) -> None:
    table = tradeoff_table(against(loaded(build.sweep(speed=SPEED, hardware=("h200", "cpu"))), "bf16")).frame
    ratios = table.set_index("optimization").loc["baseline", ["h200.ratio", "cpu.ratio"]]
    assert ratios.tolist() == pytest.approx([0.5, 0.5], rel=0.02)


def test_order_of_techniques_does_not_matter(build: SimpleNamespace, loaded: Loaded) -> None:
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
