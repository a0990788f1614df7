"""From a sweep to its cells: each once, group by group, the baseline of a group first."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.sweep import LOCAL, Only, Sweep, SweepError
from orchestrator.sweep_matrix import groups
from tasks.cell import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCell:
    """A cell as planned. `hardware_requested` is the sweep's word (it may be `local`), `cell.hardware` the tag.

    `rung` is the stack's place in its group as the sweep names them, where the baseline need not be the first.
    """

    cell: Cell
    hardware_requested: str
    rounds: int
    rung: int = 0


def expand(sweep: Sweep, local_tag: str, only: Only | None = None) -> list[PlannedCell]:
    """Every cell of the sweep, `local` resolved to `local_tag`.

    With `only`, the cells for which it holds and the baselines that they are compared with; `SweepError` if none, or
    if it names what no cell has.
    """
    baseline, rounds = sweep.baseline_stack, sweep.rounds_per_cell
    chosen = None if only is None else only.resolved(LOCAL, local_tag)
    planned: list[PlannedCell] = []
    everything: list[Cell] = []
    for group in groups(sweep, lambda word: local_tag if word == LOCAL else word):
        cells = [
            Cell(model=group.model, workload=group.point, stack=stack, hardware=group.hardware, baseline=baseline)
            for stack in group.stacks
        ]
        rungs = group.rungs()
        if chosen is not None:
            everything += cells
            kept = [cell for cell in cells if chosen(cell)]
            cells = [cells[0], *(cell for cell in kept if cell is not cells[0])] if kept else []
        planned += (
            PlannedCell(cell=cell, hardware_requested=group.hardware_requested, rounds=rounds, rung=rungs[cell.stack])
            for cell in cells
        )
    if chosen is not None:
        chosen.check(everything)
        if not planned:
            raise SweepError(f"--only {chosen.text}: matches none of the {len(everything)} cells")
    return planned
