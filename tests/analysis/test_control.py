from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.control import FAILED, controlled_stack, floors, gate, gate_table, with_gate
from analysis.render import render
from analysis.verdicts import verdicts, waited_on


@pytest.mark.parametrize(
    ("stack", "repeats"),
    [("bf16+again", "bf16"), ("again", "baseline"), ("bf16+compile+again", "bf16+compile"), ("bf16", None)],
)
def test_a_control_names_what_it_repeats(stack: str, repeats: str | None) -> None:
    assert controlled_stack(stack) == repeats


def _frame(loaded, build, effect: float, noise: float = 0.003, rounds: int = 5) -> pd.DataFrame:
    """Groups of bf16, bf16+again and nf4 (20 % faster); the control is slower by `effect`."""
    draw = np.random.default_rng(7)
    rows = []
    for batch in range(1, 5):
        for round_ in range(rounds):
            for stack, factor in (("baseline", 1.0), ("again", 1 + effect), ("nf4", 0.8)):
                cell = build.cell(stack, batch=batch)
                latency = 10.0 * factor * float(np.exp(draw.normal(0, noise)))
                rows.append(build.row(cell, round_, latency))
    return loaded(rows)


def test_equal_labels_pass_and_give_a_small_floor(loaded, build) -> None:
    frame = _frame(loaded, build, effect=0.0)
    lines = gate(frame)
    assert len(lines) == 4
    assert lines["passed"].all(), lines["why"].tolist()
    floor = floors(frame)
    assert 0 < floor["h200"] < 0.01
    assert with_gate(frame) is frame


def test_a_planted_difference_fails_the_gate_and_bars_the_group(loaded, build) -> None:
    frame = _frame(loaded, build, effect=0.05)
    lines = gate(frame)
    assert not lines["passed"].any()
    assert lines["why"].str.contains("slower").all()
    barred = with_gate(frame)
    assert all(FAILED in flags for flags in barred["flags"])
    judged = verdicts(barred)
    assert judged["verdict"].isna().all()
    assert floors(frame) == {}


def test_a_control_that_a_flag_bars_fails_the_gate(loaded, build) -> None:
    """Its verdict is null then, which pandas gives as NA where other verdicts are text."""
    frame = _frame(loaded, build, effect=0.0)
    of_one_group = frame["group_id"] == frame["group_id"].iloc[0]
    flags = [["passes_contradict"] if here else had for here, had in zip(of_one_group, frame["flags"], strict=True)]
    frame = frame.assign(flags=pd.Series(flags, index=frame.index, dtype="object"))
    lines = gate(frame)
    assert lines["passed"].sum() == 3
    assert "passes_contradict" in lines.loc[~lines["passed"], "why"].item()
    barred = with_gate(frame)
    assert [FAILED in had for had in barred["flags"]] == of_one_group.tolist()


def test_the_table_renders_passed_and_failed_controls(loaded, build) -> None:
    frame = _frame(loaded, build, effect=0.0)
    slow = (frame["group_id"] == frame["group_id"].iloc[0]) & (frame["optimization"] == "again")
    text = render(gate_table(frame.assign(latency_ms_p50=frame["latency_ms_p50"].mask(slow, 20.0))), "md")
    assert text.count("passed") == 3
    assert text.count("failed") == 1
    assert "called slower" in text


def test_rounds_that_disagree_fail_the_gate(loaded, build) -> None:
    lines = gate(_frame(loaded, build, effect=0.0, noise=0.06))
    assert not lines["passed"].all()
    assert lines.loc[~lines["passed"], "why"].str.contains("rounds vary|ratio off|called").all()


def test_the_table_renders(loaded, build) -> None:
    text = render(gate_table(_frame(loaded, build, effect=0.0)), "text")
    assert "resolves" in text
    assert "passed" in text


def test_the_gate_compares_what_the_table_compares(loaded, build) -> None:
    """Decoding is compared by the throughput of whole requests: a control that differs there alone fails."""
    frame = _frame(loaded, build, effect=0.0)
    decode = frame.assign(workload="decode")
    faster = decode["throughput_per_s"].mask(decode["optimization"] == "again", 1.06 * decode["throughput_per_s"])
    assert gate(decode)["passed"].all()
    assert gate(frame.assign(throughput_per_s=faster))["passed"].all(), "other workloads are compared by latency"
    lines = gate(decode.assign(throughput_per_s=faster))
    assert not lines["passed"].any()
    assert lines["why"].str.contains("called faster").all()
    assert not gate(frame.assign(throughput_per_s=faster), "throughput_per_s")["passed"].any()


def test_steps_that_wait_for_their_host_have_a_gate_and_a_floor_of_their_own(loaded, build) -> None:
    frame = _frame(loaded, build, effect=0.0, noise=0.012, rounds=10)
    flags = pd.Series([["launch_bound"]] * len(frame), index=frame.index, dtype="object")
    strict, wide = gate(frame), gate(frame.assign(flags=flags))
    assert wide["variation"].max() < 0.05
    assert wide["passed"].all()
    assert strict["passed"].sum() <= wide["passed"].sum()
    (name,) = floors(frame.assign(flags=flags))
    assert name == waited_on("h200")
    group = frame["group_id"] == frame["group_id"].iloc[0]
    mixed = frame.assign(flags=flags.where(group, pd.Series([[]] * len(frame), index=frame.index, dtype="object")))
    margins = {"h200": 0.0, waited_on("h200"): 0.5}
    judged = verdicts(mixed, floor=margins).merge(mixed[["cell_id", "group_id", "optimization"]].drop_duplicates())
    fast = judged[judged["optimization"] == "nf4"].set_index("group_id")["verdict"]
    assert fast.pop(frame["group_id"].iloc[0]) == "indistinguishable"
    assert (fast == "faster").all()


def test_throttled_rounds_decide_nothing(loaded, build) -> None:
    frame = _frame(loaded, build, effect=0.0)
    flags = pd.Series([["throttled"]] * len(frame), index=frame.index, dtype="object")
    judged = verdicts(frame.assign(flags=flags))
    assert judged["verdict"].isna().all()
    assert all("throttled" in reasons for reasons in judged["barred"])
