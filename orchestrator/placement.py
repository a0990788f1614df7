"""Where each planned cell can run, decided from plain facts about the devices, and why where it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from orchestrator.expand import PlannedCell
from tasks.cell import Cell
from tasks.device import DeviceInfo, tag_matches
from tasks.footprint import lower_bound
from tasks.identity import cell_columns
from tasks.stacks import unsupported

GIB = 2**30


class Decision(StrEnum):
    """`does_not_fit` is a forecast: such a cell is still run, since running out of memory is a result."""

    RUN = "run"
    UNSUPPORTED = "unsupported"
    DOES_NOT_FIT = "does_not_fit"
    UNPLACED = "unplaced"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """`device` is the first of those that could take the cell; None when unplaced. `reason` is None for `run`."""

    planned: PlannedCell
    decision: Decision
    reason: str | None = None
    device: DeviceInfo | None = None

    @property
    def to_run(self) -> bool:
        return self.decision in (Decision.RUN, Decision.DOES_NOT_FIT)


def place(
    planned: Sequence[PlannedCell], devices: Sequence[DeviceInfo], memory_budget_bytes: int | None = None
) -> list[Placed]:
    """One decision for each planned cell, in the same order."""
    kinds = _distinct(devices)
    tags = ", ".join(sorted({device.tag for device in kinds})) or "none"
    matching: dict[str, list[DeviceInfo]] = {}
    result = []
    for item in planned:
        tag = item.cell.hardware
        if tag not in matching:
            matching[tag] = [device for device in kinds if tag_matches(tag, device.tag)]
        if not matching[tag]:
            reason = f"no device is tagged {tag!r}; tags here: {tags}"
            result.append(Placed(planned=item, decision=Decision.UNPLACED, reason=reason))
        else:
            result.append(_place_on(item, matching[tag], memory_budget_bytes))
    return result


def devices_of(placed: Iterable[Placed]) -> list[DeviceInfo]:
    """The devices on which something is to be run."""
    return [item.device for item in placed if item.to_run and item.device is not None]


def _place_on(planned: PlannedCell, devices: Sequence[DeviceInfo], budget: int | None) -> Placed:
    reasons, able = [], []
    for device in devices:
        reason = unsupported(planned.cell, device)
        if reason is None:
            able.append(device)
        else:
            reasons.append(reason)
    if not able:
        return Placed(planned=planned, decision=Decision.UNSUPPORTED, reason=reasons[0], device=devices[0])
    too_large = _does_not_fit(planned.cell, max(able, key=lambda device: device.memory_bytes), budget)
    decision = Decision.RUN if too_large is None else Decision.DOES_NOT_FIT
    return Placed(planned=planned, decision=decision, reason=too_large, device=able[0])


def _does_not_fit(cell: Cell, device: DeviceInfo, budget: int | None) -> str | None:
    footprint = lower_bound(cell)
    limit = device.memory_bytes if budget is None else min(budget, device.memory_bytes)
    if footprint.total_bytes <= limit:
        return None
    whose = f"the budget is {limit / GIB:.1f} GiB" if limit == budget else f"{device.tag} has {limit / GIB:.1f} GiB"
    parts = f"weights {(footprint.weight_bytes or 0) / GIB:.1f}, cache {(footprint.cache_bytes or 0) / GIB:.1f}"
    return f"needs at least {footprint.total_bytes / GIB:.1f} GiB ({parts}), {whose}"


def _distinct(devices: Sequence[DeviceInfo]) -> list[DeviceInfo]:
    """One device of each sort: slots that differ in index and UUID only decide alike."""
    found: list[tuple[DeviceInfo, DeviceInfo]] = []
    for device in devices:
        sort = replace(device, index=0, uuid=None)
        if all(sort != known for known, _ in found):
            found.append((sort, device))
    return [device for _, device in found]


def plan_row(sweep: str, item: Placed, result_key: str | None) -> dict[str, Any]:
    """One row of `plan.parquet`."""
    cell = item.planned.cell
    columns = cell_columns(cell)
    names = ("cell_id", "baseline_id", "group_id", "model", "workload", "workload_point", "optimization", "hardware")
    return {
        **{name: columns[name] for name in names},
        "sweep": sweep,
        "result_key": result_key,
        "hardware_requested": item.planned.hardware_requested,
        "rounds": item.planned.rounds,
        "rung": item.planned.rung,
        "decision": item.decision.value,
        "reason": item.reason,
    }


def unplaced_messages(placed: Sequence[Placed]) -> list[str]:
    """For the person: what has no home, one sentence per reason."""
    counts = Counter(item.reason for item in placed if item.decision is Decision.UNPLACED and item.reason)
    return [f"{reason}: {number} cell{'s' if number > 1 else ''} unplaced" for reason, number in counts.items()]
