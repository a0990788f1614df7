"""Which blocks are still to be run: every cell gets its rounds, in blocks with their own baseline."""

import time
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ledger import Block, decide, result_key
from tasks.cell import Cell, ModelSpec, Stack, Technique, WorkloadPoint

POCKET = ModelSpec(id="pocket", source="pocket", kind="language")
KEY = result_key('{"machine":1}', [("torch", "2.13.0")])
OTHER_TORCH = result_key('{"machine":1}', [("torch", "2.14.0")])
OTHER_MACHINE = result_key('{"machine":2}', [("torch", "2.13.0")])


@dataclass(frozen=True)
class PlannedCell:
    cell: Cell
    rounds: int = 3


def cell(stack: str = "", batch_size: int = 1) -> Cell:
    techniques = tuple(Technique(name=name) for name in stack.split("+") if name)
    point = WorkloadPoint(kind="prefill", parameters=(("batch_size", batch_size), ("sequence_length", 64)))
    return Cell(model=POCKET, workload=point, stack=Stack(techniques=techniques), hardware="cpu")


BASE, BF16, NF4 = cell(), cell("bf16"), cell("nf4")


def row(run: Cell, round_: int, outcome: str = "ok", key: str | None = KEY, block_id: str = "group-{:03d}") -> dict:
    return {
        "kind": "row",
        "row": {
            "cell_id": run.cell_id,
            "group_id": run.group_id,
            "round": round_,
            "block_id": block_id.format(round_),
            "outcome": outcome,
            "result_key": key,
        },
    }


def execute(block: Block, **options) -> list[dict]:
    return [row(run, block.round, block_id=block.block_id, **options) for run in block.cells]


def remaining(planned, records, key=KEY, **options) -> list[Block]:
    ledger = decide(planned, records, lambda _: key, **options)
    return [block for blocks in ledger.blocks.values() for block in blocks]


def names(block: Block) -> set[str]:
    return {str(run.stack) for run in block.cells}


def test_a_fresh_plan_gives_every_round_as_a_whole_block():
    blocks = remaining([PlannedCell(BASE), PlannedCell(BF16), PlannedCell(NF4)], [])
    assert [block.round for block in blocks] == [0, 1, 2]
    assert all(names(block) == {"baseline", "bf16", "nf4"} for block in blocks)
    assert len({block.block_id for block in blocks}) == 3


def test_the_order_inside_a_block_is_seeded():
    planned = [PlannedCell(cell(f"t{number}"), 10) for number in range(8)]
    first = remaining(planned, [], seed=1)
    assert first == remaining(planned, [], seed=1)
    assert first != remaining(planned, [], seed=2)
    assert len({block.cells for block in first}) > 1


def test_a_broken_block_is_finished_as_a_new_one_with_its_own_baseline():
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1), PlannedCell(NF4, 1)]
    blocks = remaining(planned, [row(BASE, 0), row(BF16, 0)])
    assert [(block.round, names(block)) for block in blocks] == [(1, {"baseline", "nf4"})]


def test_a_run_whose_baseline_never_ran_is_repeated_with_one():
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1)]
    ledger = decide(planned, [row(BF16, 0)], lambda _: KEY)
    assert [(run.cell_id, run.round) for run in ledger.repeated] == [(BF16.cell_id, 0)]
    assert [names(block) for block in remaining(planned, [row(BF16, 0)])] == [{"baseline", "bf16"}]


def test_a_group_without_a_baseline_needs_none():
    assert remaining([PlannedCell(BF16, 1)], [row(BF16, 0)]) == []


def test_a_stack_added_later_is_measured_beside_a_fresh_baseline():
    records = [item for block in remaining([PlannedCell(BASE), PlannedCell(BF16)], []) for item in execute(block)]
    blocks = remaining([PlannedCell(BASE), PlannedCell(BF16), PlannedCell(NF4)], records)
    assert [(block.round, names(block)) for block in blocks] == [(round_, {"baseline", "nf4"}) for round_ in (3, 4, 5)]


@pytest.mark.parametrize("outcome", ["ok", "oom", "invalid", "timeout", "error", "crashed"])
def test_every_recorded_outcome_counts(outcome):
    records = [row(BASE, 0), row(BF16, 0, outcome)]
    assert remaining([PlannedCell(BASE, 1), PlannedCell(BF16, 1)], records) == []


def test_unplaced_is_always_run_again():
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1)]
    records = [row(BASE, 0), row(BF16, 0, "unplaced", key=None)]
    assert [(block.round, names(block)) for block in remaining(planned, records)] == [(1, {"baseline", "bf16"})]


@pytest.mark.parametrize("outcome", ["unsupported", "crashed"])
def test_a_row_that_was_written_without_a_run_settles_nothing(outcome):
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1)]
    records = [row(BASE, 0), row(BF16, 0, outcome, block_id="")]
    assert [names(block) for block in remaining(planned, records)] == [{"baseline", "bf16"}]


def test_unsupported_settles_a_cell_in_one_round():
    planned = [PlannedCell(BASE), PlannedCell(BF16), PlannedCell(NF4)]
    blocks = remaining(planned, [row(BASE, 0), row(BF16, 0), row(NF4, 0, "unsupported")])
    assert [names(block) for block in blocks] == [{"baseline", "bf16"}] * 2


def test_an_unsupported_baseline_is_not_waited_for():
    blocks = remaining([PlannedCell(BASE), PlannedCell(BF16)], [row(BASE, 0, "unsupported"), row(BF16, 0)])
    assert [(block.round, names(block)) for block in blocks] == [(1, {"bf16"}), (2, {"bf16"})]


def test_retry_names_outcomes_to_run_again():
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1), PlannedCell(NF4, 1)]
    records = [row(BASE, 0), row(BF16, 0, "crashed"), row(NF4, 0, "oom")]
    assert [names(block) for block in remaining(planned, records, retry=("crashed", "error"))] == [{"baseline", "bf16"}]


def test_what_was_measured_again_with_success_has_not_failed():
    planned = [PlannedCell(BASE, 2), PlannedCell(BF16, 2)]
    records = [row(BASE, 0), row(BF16, 0), row(BASE, 1), row(BF16, 1, "invalid")]
    failing = decide(planned, records, lambda _: KEY)
    assert failing.outcomes == {"ok": 3, "invalid": 1} and "1 failed" in (failing.history() or "")
    (block,) = remaining(planned, records, retry=("invalid",))
    again = decide(planned, [*records, *execute(block)], lambda _: KEY)
    assert again.blocks == {} and again.outcomes == {"ok": 5}
    assert again.history() == "6 runs are there already"
    worse = decide(planned, [*records, *execute(block, outcome="invalid")], lambda _: KEY)
    assert worse.outcomes == {"ok": 3, "invalid": 2}, "the baseline has its rounds"
    lonely = decide(planned, [*records, row(BASE, 2, "crashed"), row(BF16, 2)], lambda _: KEY)
    assert lonely.outcomes == {"ok": 4, "crashed": 1}, "one of two has no partner"
    records = [row(BASE, 0), row(BF16, 0), row(BASE, 1, "invalid"), row(BF16, 1)]
    (block,) = remaining(planned, records, retry=("invalid",))
    assert decide(planned, [*records, *execute(block)], lambda _: KEY).outcomes == {"ok": 5}


@pytest.mark.parametrize(("ran_under", "now", "again"), [(60, 120, True), (60, 60, False), (60, 30, False)])
def test_a_timeout_is_measured_again_under_a_higher_limit(ran_under, now, again):
    records = [{"kind": "run", "run_id": "r1", "timeout_s": ran_under}, row(BASE, 0), row(BF16, 0, "timeout")]
    records[2]["row"]["run_id"] = "r1"
    planned = [PlannedCell(BASE, 1), PlannedCell(BF16, 1)]
    blocks = remaining(planned, records, timeout_s=now)
    assert [names(block) for block in blocks] == ([{"baseline", "bf16"}] if again else [])


def test_a_timeout_under_an_unknown_limit_counts():
    records = [row(BASE, 0), row(BF16, 0, "timeout")]
    assert remaining([PlannedCell(BASE, 1), PlannedCell(BF16, 1)], records, timeout_s=1e6) == []


def test_only_a_reading_counts_as_judged():
    records = [row(BASE, 0), row(BF16, 0)]
    records[1]["row"]["quality_reference"] = "abc"
    assert decide([PlannedCell(BASE), PlannedCell(BF16)], records, lambda _: KEY).judged == {BF16.cell_id}


def test_history_is_one_line():
    planned = [PlannedCell(BASE), PlannedCell(BF16)]
    assert decide(planned, [], lambda _: KEY).history() is None
    records = [row(BASE, 0), row(BF16, 0, "error"), row(BASE, 1), row(BF16, 1, "timeout")]
    records += [row(BASE, 2, key=OTHER_TORCH), row(BF16, 2, key=OTHER_TORCH)]
    assert decide(planned, records, lambda _: KEY).history() == (
        "4 runs are there already, 2 runs no longer match and must be measured again; "
        "2 failed: measure them again with --retry error,timeout"
    )


def test_another_result_key_is_stale_and_keeps_its_round_number():
    planned = [PlannedCell(BASE, 1)]
    ledger = decide(planned, [row(BASE, 0, key=OTHER_TORCH)], lambda _: KEY)
    assert [run.round for run in ledger.stale] == [0]
    assert [block.round for block in ledger.blocks[BASE.group_id]] == [1]


def test_reuse_versions_ignores_versions_only():
    assert remaining([PlannedCell(BASE, 1)], [row(BASE, 0, key=OTHER_TORCH)], reuse="versions") == []
    assert len(remaining([PlannedCell(BASE, 1)], [row(BASE, 0, key=OTHER_MACHINE)], reuse="versions")) == 1


def test_several_machines_of_one_tag_may_hold_the_rounds():
    records = [row(BASE, 0), row(BASE, 1, key=OTHER_MACHINE)]
    assert remaining([PlannedCell(BASE, 2)], records, key={KEY, OTHER_MACHINE}) == []


def test_an_unknown_key_accepts_the_newest_runs():
    records = [row(BASE, 0, key=OTHER_TORCH), row(BASE, 1), row(BASE, 2)]
    assert remaining([PlannedCell(BASE, 2)], records, key=None) == []
    assert len(remaining([PlannedCell(BASE, 3)], records, key=None)) == 1


def test_a_cell_taken_out_of_the_sweep_still_blocks_its_round_numbers():
    records = [row(BASE, 0), row(NF4, 0), row(NF4, 7)]
    assert [block.round for block in remaining([PlannedCell(BASE, 2)], records)] == [8]


def test_counts():
    records = [row(BASE, 0), row(BF16, 0, "error"), {"kind": "note"}, {"kind": "discarded", "row": {}}]
    ledger = decide([PlannedCell(BASE), PlannedCell(BF16)], records, lambda _: KEY)
    assert ledger.done_runs == 2
    assert ledger.remaining_runs == 4
    assert ledger.outcomes == {"ok": 1, "error": 1}
    assert [run.outcome for run in ledger.failed] == ["error"]


GROUP = [cell(name, batch) for batch in (1, 8) for name in ("", "bf16", "nf4", "compile")]
PLANS = st.lists(st.tuples(st.sampled_from(GROUP), st.integers(1, 3)), min_size=1, max_size=8)


@given(
    plans=st.lists(PLANS, min_size=1, max_size=3),
    faults=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_killed_every_cell_gets_its_rounds_once(plans, faults, data):
    """Sweeps change between runs, runs end after any number of cells with any outcome; the last one runs through."""
    outcomes = st.sampled_from(["ok", "ok", "ok", "oom", "crashed", "unsupported"])
    records: list[dict] = []
    schedule = [(data.draw(st.sampled_from(plans)), limit) for limit in faults] + [(plans[-1], None)]
    for plan, limit in schedule:
        planned = [PlannedCell(run, rounds) for run, rounds in plan]
        started = 0
        for block in remaining(planned, records):
            for run in block.cells:
                if started == limit:
                    break
                started += 1
                outcome = data.draw(outcomes) if limit is not None else "ok"
                records.append(row(run, block.round, outcome, block_id=block.block_id))

    used = Counter((item["row"]["cell_id"], item["row"]["round"]) for item in records)
    assert max(used.values()) == 1
    planned = {run.cell_id: PlannedCell(run, rounds) for run, rounds in reversed(plans[-1])}
    ledger = decide(list(planned.values()), records, lambda _: KEY)
    assert not ledger.blocks
    blocks_of = {name: {run.block_id for run in runs} for name, runs in ledger.done.items()}
    for cell_id, item in planned.items():
        runs = ledger.done[cell_id]
        settled = any(run.outcome == "unsupported" for run in runs)
        assert settled or len(runs) >= item.rounds
        baseline = ledger.done.get(item.cell.baseline_id, ())
        if not settled and item.cell.baseline_id in planned and all(run.outcome != "unsupported" for run in baseline):
            assert blocks_of[cell_id] <= blocks_of[item.cell.baseline_id]


def test_ten_thousand_cells_ninety_percent_done_are_decided_in_three_seconds():
    planned = [PlannedCell(cell(f"t{stack}" if stack else "", batch)) for batch in range(500) for stack in range(20)]
    blocks = remaining(planned, [])
    records = [item for block in blocks for item in execute(block)]
    records = records[: len(records) * 9 // 10]
    started = time.process_time()
    ledger = decide(planned, records, lambda _: KEY)
    assert time.process_time() - started < 12  # catches quadratic growth
    assert 3000 <= ledger.remaining_runs < 3100
