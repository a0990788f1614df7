"""What a sweep has still to measure, as the dispatcher asks for it: placed, decided by the ledger, group by group."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.expand import PlannedCell
from orchestrator.inventory import Node
from orchestrator.keys import KeyMaker, distinct_machines
from orchestrator.ledger import Block, Ledger, Reuse, decide
from orchestrator.patience import PatientStore
from orchestrator.placement import Decision, Placed, devices_of, place, plan_row, unplaced_messages
from orchestrator.recorded import Recorded
from orchestrator.slots import BenchSlot
from orchestrator.store import Records
from orchestrator.sweep import Sweep
from orchestrator.sweep_quality import without_harness
from tasks.cell import Cell
from tasks.device import DeviceInfo, tag_matches
from tasks.identity import cell_columns, job_columns
from tasks.job import CellJob, RunResult
from tasks.registry import optimizations
from tasks.row import Outcome, Row


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run of this call of `benchmatrix run` shares."""

    sweep: Sweep
    run_id: str
    ray_version: str
    reuse: Reuse = "exact"
    retry: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _GroupWork:
    """One comparison group: its cells that can be run, and its blocks still to come."""

    order: int
    hardware: str
    planned: dict[str, PlannedCell] = field(default_factory=dict)
    blocks: deque[Block] = field(default_factory=deque)

    @cached_property
    def executed(self) -> bool:
        """Whether one of its cells must run in an executed process: then all do, since forks differ from these."""
        known = optimizations()
        return any(known[name].executed for item in self.planned.values() for name in item.cell.stack.names())


class SweepWork:
    """A plan, its ledger and its store, as the dispatcher asks for them. All of a group's blocks go to one slot."""

    def __init__(
        self, planned: Sequence[PlannedCell], store: PatientStore, records: Records, settings: RunSettings, *,
        settled: Callable[[dict[str, Any]], None], write_plan: Callable[[list[dict[str, Any]]], None],
        only: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        """`settled` is told of the rows that are written here, of cells that no runner sees.

        With `only`, these cells alone are measured; the rest stands in the plan and nowhere else.
        """
        self._settings, self._store = settings, store
        self._settled, self._write_plan = settled, write_plan
        self._keys = KeyMaker(settings.sweep)
        self._plan = {item.cell.cell_id: item for item in planned}
        self._homeless = [item for item in planned if only is None or item.cell.cell_id in only]
        self._others = [item for item in planned if only is not None and item.cell.cell_id not in only]
        self._order = {cell_id: index for index, cell_id in enumerate(dict.fromkeys(i.cell.group_id for i in planned))}
        self._groups: dict[str, _GroupWork] = {}
        self._free: dict[str, deque[str]] = defaultdict(deque)
        self._bound: dict[str, deque[str]] = defaultdict(deque)
        self._machines: list[tuple[Node, DeviceInfo]] = []
        self._recorded = Recorded(records)
        self._attempts: dict[str, int] = {}  # cell_id -> runs that its lost slots had begun
        self._quality_known: set[str] = set()
        self._planned = False
        self._excluded: list[Placed] = []
        self.placed: dict[str, Placed] = {}
        self._bystanders: dict[str, Placed] = {}
        self.measured = 0
        self.reused_runs = 0
        self.written = 0
        self._under_way = 0
        # by group and kind of device: how much of the group it can run
        self._worths: dict[str, dict[tuple[Any, ...], int]] = defaultdict(dict)
        self._incomplete: set[str] = set()  # cells that were given up with some of their rounds

    def offer(self, devices: list[tuple[Node, DeviceInfo]]) -> list[str]:
        """Place what had no home on the devices that exist now, and ask the ledger what of it is left."""
        self._machines = distinct_machines(devices)
        asked = [device for _, device in devices], self._settings.sweep.limits.memory_budget_bytes
        placed = place(self._homeless, *asked)
        newcomers = [item for item in placed if item.decision is not Decision.UNPLACED]
        for item in placed:
            self.placed[item.planned.cell.cell_id] = item
        self._homeless = [item.planned for item in placed if item.decision is Decision.UNPLACED]
        for item in newcomers:
            if item.to_run:
                self._group(item.planned.cell).planned[item.planned.cell.cell_id] = item.planned
        if newcomers or not self._planned:
            self._bystanders = {item.planned.cell.cell_id: item for item in place(self._others, *asked)}
            self._write_plan(self.plan_rows())
            self._planned = True
        self._excluded += [
            item
            for item in newcomers
            if not item.to_run and self._recorded.needs(item.planned.cell.cell_id, Outcome.UNSUPPORTED)
        ]
        groups = dict.fromkeys(item.planned.cell.group_id for item in newcomers if item.to_run)
        messages = unplaced_messages(placed)
        messages += without_harness(self._settings.sweep.quality, devices_of(newcomers))
        if groups:
            self._worths.clear()  # a group may have more cells now
            ledger = self._decide(groups, self._settings.retry)
            self.reused_runs += ledger.done_runs
            messages += [text] if (text := ledger.history()) else []
        for group_id in groups:
            if self._groups[group_id].blocks:
                self._free[self._groups[group_id].hardware].append(group_id)
        return messages

    def settle(self) -> None:
        """Write the rows of what no device can run."""
        for item in self._excluded:
            self._settle(item.planned, Outcome.UNSUPPORTED, item.reason or "")
        self._excluded = []

    def wants(self, slot: BenchSlot) -> int | None:
        """Position of the first group that this slot should serve next, None when there is none."""
        bound = self._bound.get(slot.slot_id)
        if bound:
            return self._groups[bound[0]].order
        return min((self._groups[group_id].order for _, group_id in self._suited(slot.device)), default=None)

    def take(self, slot: BenchSlot) -> list[CellJob]:
        """The runs of the next block for this slot, in order; empty when there is none."""
        bound = self._bound[slot.slot_id]
        if not bound:
            suited = min(self._suited(slot.device), key=lambda item: self._groups[item[1]].order, default=None)
            if suited is None:
                return []
            queue, group_id = suited
            queue.remove(group_id)
            bound.append(group_id)
        group = self._groups[bound[0]]
        block = group.blocks.popleft()
        if not group.blocks:
            bound.popleft()
        self._store.note(
            "block", block_id=block.block_id, group_id=block.group_id, round=block.round, slot=slot.slot_id,
            machine_key=slot.node.report.machine_key, cells=len(block.cells),
            group=f"{block.cells[0].model.id} {block.cells[0].workload}",
        )  # fmt: skip
        self._under_way += len(block.cells)
        return [self._job(group, block, cell, order, slot) for order, cell in enumerate(block.cells)]

    def done(self, job: CellJob, result: RunResult) -> None:
        """A run has its row: fill what only the driver knows, and store it.

        Raises:
            KeyError, TypeError, ValueError: it is not a row of this run; nothing was stored.
        """
        if (result.row.get("cell_id"), result.row.get("round")) != (job.cell.cell_id, job.round):
            raise ValueError(f"a row of cell {result.row.get('cell_id')} round {result.row.get('round')} came back")
        result.row["ray"] = self._settings.ray_version
        self._add(result)
        self._attempts.pop(job.cell.cell_id, None)
        self._under_way -= 1
        self.measured += 1

    def obituary(self, slot: BenchSlot, job: CellJob, reason: str, outcome: Outcome = Outcome.CRASHED) -> RunResult:
        """The row of a run that no runner survived; the machine is the slot's, not the driver's."""
        row = Row()
        row.set(**job_columns(job), outcome=outcome, reason=reason, error_type="RunnerLost")
        row.set(machine_key=slot.node.report.machine_key)
        return RunResult(row=row.to_dict())

    def broken(self, slot: BenchSlot, running: CellJob | None, queued: Sequence[CellJob]) -> None:
        """The slot is lost: its groups are free for others, what its block had not finished is decided anew."""
        unfinished = [*([running] if running else []), *queued]
        for job in unfinished:  # a cell that takes its node down with it is not tried for ever on others
            self._attempts[job.cell.cell_id] = job.attempt if job is running else job.attempt - 1
        groups = dict.fromkeys([*(job.cell.group_id for job in unfinished), *self._bound.pop(slot.slot_id, ())])
        self._under_way -= len(unfinished)
        self._decide(groups, ())
        for group_id in reversed(groups):
            group = self._groups[group_id]
            if group.blocks:
                self._free[group.hardware].appendleft(group_id)

    def left(self) -> bool:
        """Whether a slot that can exist would have something to do."""
        return bool(self._homeless) or any(self._free.values()) or any(self._bound.values())

    def runs(self) -> int:
        """Rows that this call will have written when all is done; one for a cell that has no node yet."""
        return (
            self.written
            + len(self._excluded)
            + sum(self._recorded.needs(item.cell.cell_id, Outcome.UNPLACED) for item in self._homeless)
            + self._under_way
            + sum(len(block.cells) for group in self._groups.values() for block in group.blocks)
        )

    def left_by_hardware(self) -> Counter[str]:
        """Hardware tag -> runs that no slot has taken yet; cells without a node count with all their rounds."""
        left: Counter[str] = Counter()
        for group in self._groups.values():
            left[group.hardware] += sum(len(block.cells) for block in group.blocks)
        for planned in self._homeless:
            left[planned.cell.hardware] += planned.rounds
        return left

    def give_up(self, reason: str) -> None:
        """Cells without any row get one; cells that have some rounds keep them, and count as missing."""
        for group_id in [group_id for queue in self._free.values() for group_id in queue]:
            group = self._groups[group_id]
            self._incomplete.update(cell.cell_id for block in group.blocks for cell in block.cells)
            for planned in group.planned.values():
                self._settle(planned, Outcome.CRASHED, reason)
            group.blocks.clear()
        self._free.clear()
        for planned in self._homeless:
            self._settle(planned, Outcome.UNPLACED, self.placed[planned.cell.cell_id].reason or reason)
        self._homeless = []

    def plan_rows(self) -> list[dict[str, Any]]:
        """The plan as it is stored: the denominator of every coverage figure."""
        known = self.placed | self._bystanders
        items = [known[cell_id] for cell_id in self._plan]
        return [plan_row(self._settings.sweep.name, item, self._keys.one(item, self._machines)) for item in items]

    def outcomes(self) -> Counter[str]:
        """One outcome for each planned cell that has its rows: `ok` if all its runs are, or as many as its rounds."""
        planned = [item for group in self._groups.values() for item in group.planned.values()]
        runs = self._ask(planned, ()).standing
        found: Counter[str] = Counter()
        for cell_id in self.placed:
            counted = [run.outcome for run in runs.get(cell_id, ())]
            if not counted and (newest := self._recorded.outcome(cell_id)):
                counted = [newest]
            if all(outcome == Outcome.OK for outcome in counted) and cell_id in self._incomplete:
                continue
            if counted:
                found[next((outcome for outcome in counted if outcome != Outcome.OK), Outcome.OK.value)] += 1
        return found

    def _group(self, cell: Cell) -> _GroupWork:
        if cell.group_id not in self._groups:
            self._groups[cell.group_id] = _GroupWork(order=self._order[cell.group_id], hardware=cell.hardware)
        return self._groups[cell.group_id]

    def _suited(self, device: DeviceInfo) -> Iterator[tuple[deque[str], str]]:
        """For each queue that the device's tag matches, the first group that no other device there can run better."""
        for hardware, queue in self._free.items():
            if tag_matches(hardware, device.tag):
                rivals = [other for _, other in self._machines if tag_matches(hardware, other.tag)]
                group_id = next((group_id for group_id in queue if self._is_best(group_id, device, rivals)), None)
                if group_id is not None:
                    yield queue, group_id

    def _is_best(self, group_id: str, device: DeviceInfo, rivals: Sequence[DeviceInfo]) -> bool:
        """Whether as many of the group's cells can run on it as on any: tags do not tell memory and packages."""
        if len(rivals) < 2:
            return True
        return self._worth(group_id, device) >= max(self._worth(group_id, other) for other in rivals)

    def _worth(self, group_id: str, device: DeviceInfo) -> int:
        """More for each cell that it can run, still more where that fits in its memory."""
        known = self._worths[group_id]
        if device.kind_key not in known:
            cells, limits = list(self._groups[group_id].planned.values()), self._settings.sweep.limits
            placed = place(cells, [device], limits.memory_budget_bytes)
            known[device.kind_key] = sum(item.to_run + (item.decision is Decision.RUN) for item in placed)
        return known[device.kind_key]

    def _decide(self, groups: Iterable[str], retry: Sequence[str]) -> Ledger:
        planned = [item for group_id in groups for item in self._groups[group_id].planned.values()]
        ledger = self._ask(planned, retry)
        for group_id in groups:
            self._groups[group_id].blocks = deque(ledger.blocks.get(group_id, ()))
        self._quality_known |= ledger.judged
        return ledger

    def _ask(self, planned: Sequence[PlannedCell], retry: Sequence[str]) -> Ledger:
        limit_s = self._settings.sweep.limits.cell_timeout_s
        return decide(
            planned, self._recorded.records, lambda cell: self._keys.all(cell, self._machines),
            reuse=self._settings.reuse, retry=retry, seed=self._settings.sweep.seed, timeout_s=limit_s,
        )  # fmt: skip

    def _job(self, group: _GroupWork, block: Block, cell: Cell, order: int, slot: BenchSlot) -> CellJob:
        return CellJob(
            cell=cell, hardware_requested=group.planned[cell.cell_id].hardware_requested, device=slot.device,
            round=block.round, block_id=block.block_id, order_in_round=order,
            result_key=self._keys.key(cell, slot.node, slot.device),
            attempt=self._attempts.get(cell.cell_id, 0) + 1, executed=group.executed,
            quality=self._settings.sweep.quality.enabled and cell.cell_id not in self._quality_known,
            **self._same_in_all_jobs,
        )  # fmt: skip

    @cached_property
    def _same_in_all_jobs(self) -> dict[str, Any]:
        sweep = self._settings.sweep
        return {
            "sweep": sweep.name, "profile": sweep.profile, "run_id": self._settings.run_id, "seed": sweep.seed,
            "timeout_s": sweep.limits.cell_timeout_s, "artifact_timeout_s": sweep.limits.artifact_timeout_s,
            "memory_budget_bytes": sweep.limits.memory_budget_bytes, "search_path": sweep.search_path,
            "compile_cold": sweep.compile_each_round,
            **sweep.quality.job_fields(),
        }  # fmt: skip

    def _settle(self, planned: PlannedCell, outcome: Outcome, reason: str) -> None:
        """The row of a cell that is not run, unless its rows say so already."""
        if not self._recorded.needs(planned.cell.cell_id, outcome):
            return
        round_ = self._recorded.next_round(planned.cell.cell_id)
        row = Row()
        row.set(
            **cell_columns(planned.cell), sweep=self._settings.sweep.name, round=round_, outcome=outcome, reason=reason,
            hardware_requested=planned.hardware_requested, run_id=self._settings.run_id, attempt=1,
            profile=self._settings.sweep.profile, ray=self._settings.ray_version,
        )  # fmt: skip
        row.set(result_key=self._keys.one(self.placed[planned.cell.cell_id], self._machines))
        self._add(RunResult(row=row.to_dict()))
        self._settled(row.to_dict())

    def _add(self, result: RunResult) -> None:
        self._store.add(result)
        if result.row.get("quality_reference") is not None:
            self._quality_known.add(result.row["cell_id"])
        self.written += 1
        self._recorded.add(result.row)
