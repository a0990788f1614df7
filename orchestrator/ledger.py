"""What a result folder holds of a plan, and which blocks are still to be run. Pure: records in, blocks out.

A block is one run of each of its cells, back to back on one machine; only cells of one block are compared. So a run
counts towards its cell's rounds only together with its baseline's run in the same block, and whatever is missing is
measured in new blocks, each with a fresh baseline.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from tasks.cell import Cell, digest, text_digest
from tasks.row import Outcome

Reuse = Literal["exact", "versions"]
# What a cell's key is expected to be: one, one of several (machines with the same tag), or unknown (no such node now).
Keys = Callable[[Cell], str | Collection[str] | None]

FAILED = frozenset({Outcome.ERROR, Outcome.CRASHED, Outcome.TIMEOUT, Outcome.INVALID, Outcome.UNPLACED})


class Planned(Protocol):
    """A cell of the plan; `orchestrator.expand.PlannedCell` is one."""

    @property
    def cell(self) -> Cell: ...
    @property
    def rounds(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """One recorded run of a planned cell. `timeout_s` is the limit it ran under, None where the journal lacks it."""

    cell_id: str
    round: int
    block_id: str
    outcome: str
    result_key: str | None
    judged: bool = False
    timeout_s: float | None = None

    def outgrown(self, timeout_s: float | None) -> bool:
        """Whether it ran into a limit that is lower than this one."""
        if self.outcome != Outcome.TIMEOUT or self.timeout_s is None or timeout_s is None:
            return False
        return self.timeout_s < timeout_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Cells of one group to be run once each, back to back in this order, as this round."""

    group_id: str
    block_id: str
    round: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The state of a plan.

    Attributes:
        done: cell_id -> its runs that are reused, oldest first.
        standing: of those, the runs that say what became of the cell: where as many rounds as planned are `ok`, what
            went wrong besides was measured again and says nothing.
        failed: of those, the runs that ended in error, crashed, timeout or invalid, and recorded unplaced ones.
        stale: recorded runs whose result key is not the expected one; kept in the results, never reused.
        repeated: rows that are measured again: unplaced or otherwise decided without a run (they have no block), asked
            for with `retry`, stopped by a lower time limit, or run without their baseline.
        blocks: group_id -> blocks still to be run, in order. Groups with nothing to do are left out.
    """

    done: Mapping[str, tuple[Done, ...]]
    standing: Mapping[str, tuple[Done, ...]]
    failed: tuple[Done, ...]
    stale: tuple[Done, ...]
    repeated: tuple[Done, ...]
    blocks: Mapping[str, tuple[Block, ...]]

    @property
    def remaining_runs(self) -> int:
        return sum(len(block.cells) for blocks in self.blocks.values() for block in blocks)

    @property
    def done_runs(self) -> int:
        return sum(map(len, self.done.values()))

    @property
    def outcomes(self) -> Counter[str]:
        """Outcome -> number of standing runs."""
        return Counter(run.outcome for runs in self.standing.values() for run in runs)

    @property
    def judged(self) -> set[str]:
        """Cells whose reused runs hold a reading of quality."""
        return {cell_id for cell_id, runs in self.done.items() if any(run.judged for run in runs)}

    def history(self) -> str | None:
        """What the folder holds already, in one line; None when that is nothing."""
        if not self.done_runs and not self.stale:
            return None
        text = f"{_runs(self.done_runs, 'is', 'are')} there already"
        if self.stale:
            text += f", {_runs(len(self.stale), 'no longer matches', 'no longer match')} and must be measured again"
        failed = {str(outcome): number for outcome, number in self.outcomes.items() if outcome in FAILED}
        if failed:
            text += f"; {sum(failed.values())} failed: measure them again with --retry {','.join(failed)}"
        return text


def result_key(identity: str, versions: Iterable[tuple[str, str | None]]) -> str:
    """The key of a reusable result: `<digest of identity>-<digest of versions>`.

    Args:
        identity: canonical JSON of cell_id, profile, seed, memory budget, quality settings, checkpoint hash, protocol
            version and machine_key.
        versions: names and versions of torch, transformers and the backends.
    """
    return f"{text_digest(identity)}-{_versions_digest(tuple(versions))}"


@lru_cache(maxsize=1024)
def _versions_digest(versions: tuple[tuple[str, str | None], ...]) -> str:
    return digest(dict(versions))


def decide(
    planned: Sequence[Planned],
    records: Iterable[dict[str, Any]],
    keys: Keys,
    *,
    reuse: Reuse = "exact",
    retry: Collection[str] = (),
    seed: int = 0,
    timeout_s: float | None = None,
) -> Ledger:
    """Compare a plan with a journal.

    Args:
        planned: the cells that can be run, without those excluded or unsupported at planning.
        records: the journal, oldest first.
        keys: the result key expected of a cell; None accepts the key of its newest run.
        reuse: `versions` reuses runs that were measured with other library versions.
        retry: outcomes that are measured again, once per call.
        timeout_s: the time limit of a run now; a run that was stopped by a lower one is measured again.
        seed: for the order of cells inside a block; the same seed, group and round give the same order.

    Every outcome of a block counts as a run, `unplaced` apart; one `unsupported` run settles its cell. A cell has its
    rounds when it has as many counted runs, each in one block with a counted run of its baseline, where the plan has
    one that is supported. New blocks take round numbers that no row of the group has used.
    """
    groups: dict[str, dict[str, Planned]] = defaultdict(dict)
    for item in planned:
        groups[item.cell.group_id].setdefault(item.cell.cell_id, item)
    runs, next_round = _recorded(records, {cell_id: name for name, group in groups.items() for cell_id in group})

    done: dict[str, tuple[Done, ...]] = {}
    standing: dict[str, tuple[Done, ...]] = {}
    stale: list[Done] = []
    repeated: list[Done] = []
    blocks: dict[str, tuple[Block, ...]] = {}
    for group_id, group in groups.items():
        usable: dict[str, list[Done]] = {}
        for cell_id, item in group.items():
            fits = _fits(keys(item.cell), runs[cell_id], reuse) if cell_id in runs else None
            usable[cell_id] = []
            for run in runs.get(cell_id, ()):
                if run.outcome == Outcome.UNPLACED or not run.block_id:  # decided without a run, perhaps otherwise now
                    repeated.append(run)
                elif fits is None or not fits(run):
                    stale.append(run)
                else:
                    again = run.outcome in retry or run.outgrown(timeout_s)
                    (repeated if again else usable[cell_id]).append(run)
        baseline_id = next(iter(group.values())).cell.baseline_id
        if baseline_id in group and not _settled(usable[baseline_id]):
            baseline_blocks = {run.block_id for run in usable[baseline_id]}
            for cell_id, found in usable.items():
                if not _settled(found):
                    repeated += [run for run in found if run.block_id not in baseline_blocks]
                    usable[cell_id] = [run for run in found if run.block_id in baseline_blocks]
        done.update((cell_id, tuple(found)) for cell_id, found in usable.items() if found)
        standing.update(_standing(group, usable, baseline_id))
        if planned_blocks := _blocks(group_id, group, usable, baseline_id, next_round.get(group_id, 0), seed):
            blocks[group_id] = planned_blocks
    failed = tuple(run for found in (*done.values(), repeated) for run in found if run.outcome in FAILED)
    return Ledger(
        done=done, standing=standing, failed=failed, stale=tuple(stale), repeated=tuple(repeated), blocks=blocks
    )


def _standing(
    group: Mapping[str, Planned], usable: Mapping[str, Sequence[Done]], baseline_id: str
) -> dict[str, tuple[Done, ...]]:
    """For each cell the runs that say what became of it.

    What went wrong says nothing where there are as many good runs as rounds; of the baseline only where each of the
    others that has those finds a good run of the baseline beside as many of them.
    """
    good = {cell_id: tuple(run for run in found if run.outcome == Outcome.OK) for cell_id, found in usable.items()}
    whole = {cell_id for cell_id, found in good.items() if len(found) >= group[cell_id].rounds}
    beside = {run.block_id for run in good.get(baseline_id, ())}
    for cell_id in whole - {baseline_id} if baseline_id in group else ():
        if sum(run.block_id in beside for run in good[cell_id]) < group[cell_id].rounds:
            whole.discard(baseline_id)
    return {cell_id: good[cell_id] if cell_id in whole else tuple(found) for cell_id, found in usable.items() if found}


def _recorded(
    records: Iterable[dict[str, Any]], planned: Mapping[str, str]
) -> tuple[dict[str, list[Done]], dict[str, int]]:
    """Runs of the `planned` (cell_id -> group_id), and for each group the first round number its rows have not used."""
    runs: dict[tuple[str, int], Done] = {}
    next_round: dict[str, int] = {}
    limits: dict[str, float] = {}  # run_id -> the time limit of its runs
    for record in records:
        if record.get("kind") == "run" and isinstance(record.get("timeout_s"), int | float):
            limits[str(record.get("run_id"))] = float(record["timeout_s"])
        row = record.get("row")
        if record.get("kind") != "row" or not isinstance(row, dict):
            continue
        group_id, round_ = row.get("group_id") or planned.get(row["cell_id"]), row["round"]
        if group_id is not None:
            next_round[group_id] = max(next_round.get(group_id, 0), round_ + 1)
        if row["cell_id"] in planned:
            runs.setdefault(
                (row["cell_id"], round_),
                Done(
                    cell_id=row["cell_id"],
                    round=round_,
                    block_id=row.get("block_id") or "",
                    outcome=str(row.get("outcome")),
                    result_key=row.get("result_key"),
                    judged=row.get("quality_reference") is not None,
                    timeout_s=limits.get(str(row.get("run_id"))),
                ),
            )
    by_cell: dict[str, list[Done]] = defaultdict(list)
    for run in runs.values():
        by_cell[run.cell_id].append(run)
    return dict(by_cell), next_round


def _fits(expected: str | Collection[str] | None, runs: Sequence[Done], reuse: Reuse) -> Callable[[Done], bool]:
    if expected is None:
        expected = next((run.result_key for run in reversed(runs) if run.result_key), None)
        if expected is None:
            return lambda run: True
    wanted = {_compared(key, reuse) for key in ([expected] if isinstance(expected, str) else expected)}
    return lambda run: run.result_key is not None and _compared(run.result_key, reuse) in wanted


def _runs(number: int, one: str, many: str) -> str:
    return f"1 run {one}" if number == 1 else f"{number} runs {many}"


def _compared(key: str, reuse: Reuse) -> str:
    return key.partition("-")[0] if reuse == "versions" else key


def _settled(runs: Sequence[Done]) -> bool:
    """A combination that a node found unsupported stays so in every round."""
    return any(run.outcome == Outcome.UNSUPPORTED for run in runs)


def _blocks(
    group_id: str,
    group: Mapping[str, Planned],
    usable: Mapping[str, Sequence[Done]],
    baseline_id: str,
    first_round: int,
    seed: int,
) -> tuple[Block, ...]:
    missing = {
        cell_id: 0 if _settled(usable[cell_id]) else max(0, item.rounds - len(usable[cell_id]))
        for cell_id, item in group.items()
    }
    has_baseline = baseline_id in group and not _settled(usable[baseline_id])
    blocks = []
    for number in range(max(missing.values())):
        round_ = first_round + number
        cells = [
            item.cell
            for cell_id, item in group.items()
            if missing[cell_id] > number or (has_baseline and cell_id == baseline_id)
        ]
        random.Random(f"{seed}/{group_id}/{round_}").shuffle(cells)
        blocks.append(Block(group_id=group_id, block_id=f"{group_id}-{round_:03d}", round=round_, cells=tuple(cells)))
    return tuple(blocks)
