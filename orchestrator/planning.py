"""From a sweep's name to its placed cells, with the forecast of memory and time; starts nothing unless asked to."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.expand import PlannedCell, expand
from orchestrator.forecast import run_seconds
from orchestrator.placement import Placed, devices_of, place
from orchestrator.sweep import LOCAL, Sweep, load_sweep, parse_only
from orchestrator.sweep_quality import without_harness
from tasks.artifacts import makers
from tasks.device import HEAD_TAG, DeviceInfo, tag_matches
from tasks.probe import NodeReport, installed_packages, probe


@dataclass(frozen=True, kw_only=True)
class Planning:
    """A sweep placed on the devices that were looked at. `slots` says how many of them each tag has.

    `messages` are sentences for the person.
    """

    sweep: Sweep
    placed: list[Placed]
    slots: dict[str, int]
    messages: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        return sum(item.planned.rounds for item in self.placed if item.to_run)

    @cached_property
    def estimated_s(self) -> float:
        """The longest hardware's share, its slots working side by side."""
        seconds: dict[str, float] = defaultdict(float)
        for item in self.placed:
            if item.to_run and item.device is not None:
                seconds[item.device.tag] += _estimate(self.sweep, item.device, item)
        return max((total / max(self.slots.get(tag, 1), 1) for tag, total in seconds.items()), default=0.0)

    def document(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        return {
            "sweep": self.sweep.name,
            "cells": [
                {
                    "cell_id": item.planned.cell.cell_id,
                    "baseline_id": item.planned.cell.baseline_id,
                    "model": item.planned.cell.model.id,
                    "workload": str(item.planned.cell.workload),
                    "optimization": str(item.planned.cell.stack),
                    "hardware": item.planned.cell.hardware,
                    "rounds": item.planned.rounds,
                    "decision": item.decision.value,
                    "reason": item.reason,
                }
                for item in self.placed
            ],
            "estimated_s": round(self.estimated_s, 1),
            "not_counted": made_before(self.placed),
        }


def read_sweep(sweep: str, overrides: Sequence[str]) -> Sweep:
    """The validated sweep; raises `SweepError`."""
    return load_sweep(sweep, overrides)


def planned_cells(sweep: Sweep, only: str | None, tag: str) -> list[PlannedCell]:
    return expand(sweep, tag, None if only is None else parse_only(only))


def read_plan(
    sweep: str, overrides: Sequence[str], only: str | None, address: str | None = None, cluster: Path | None = None
) -> Planning:
    """Expand and place a sweep on this machine's devices, on those of the cluster at `address` or of a cluster file."""
    loaded = read_sweep(sweep, overrides)
    chosen = None if only is None else parse_only(only)
    report = probe()
    devices: list[DeviceInfo] = list(report.devices)
    if address is not None:
        devices = _cluster_devices(address)
    elif cluster is not None:
        devices = _promised_devices(cluster)
    cells = expand(loaded, local_tag(report), chosen)
    placed = place(cells, devices, loaded.limits.memory_budget_bytes)
    slots = Counter(device.tag for device in devices)
    return Planning(sweep=loaded, placed=placed, slots=dict(slots), messages=tuple(local_messages(cells, slots)))


def local_messages(planned: Iterable[PlannedCell], tags: Iterable[str]) -> list[str]:
    """A sentence where a sweep's `local` leaves hardware of these tags unused, which it names."""
    asked = {item.cell.hardware for item in planned}
    local = sorted({item.cell.hardware for item in planned if item.hardware_requested == LOCAL})
    unused = sorted(tag for tag in set(tags) - {HEAD_TAG} if not any(tag_matches(word, tag) for word in asked))
    if not local or not unused:
        return []
    return [
        f"the sweep's hardware is {LOCAL}, which is {local[0]} where this command runs, and leaves {', '.join(unused)} "
        f"unused: name the hardware, such as --set 'hardware=[{','.join(unused)}]'"
    ]


def local_tag(report: NodeReport) -> str:
    """The tag of the first accelerator, else of the CPU."""
    return report.devices[0].tag


def print_plan(planning: Planning) -> None:
    """Cells by group, what is not run and why, and the forecast."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.progress import duration
    from orchestrator.quiet import console_for

    console = console_for(sys.stdout)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "workload", "optimization", "hardware", "rounds", "at least", "decision"):
        table.add_column(name, overflow="fold")
    for item in planning.placed:
        cell = item.planned.cell
        decision = item.decision.value if item.reason is None else f"{item.decision.value}: {item.reason}"
        table.add_row(
            escape(cell.model.id), escape(str(cell.workload)), escape(str(cell.stack)), cell.hardware,
            str(item.planned.rounds) if item.to_run else "-", _least_memory(item), escape(decision),
        )  # fmt: skip
    console.print(table)
    decisions = Counter(item.decision.value for item in planning.placed)
    counts = ", ".join(f"{number} {name}" for name, number in decisions.items())
    print(f"{len(planning.placed)} cells ({counts}), {planning.runs} runs, about {duration(planning.estimated_s)}")
    lacking = without_harness(planning.sweep.quality, devices_of(planning.placed))
    if made := made_before(planning.placed):
        print(f"not counted: making what {', '.join(made)} need, once, unless it is stored already")
    for message in [*planning.messages, *lacking]:
        print(message)


def made_before(placed: Iterable[Placed]) -> list[str]:
    """Names of the techniques that have something made once before their cells run, which no forecast knows."""
    return sorted({name for item in placed if item.to_run for name in makers(item.planned.cell.stack)})


def _least_memory(item: Placed) -> str:
    from tasks.footprint import lower_bound

    footprint = lower_bound(item.planned.cell)
    return f"{footprint.total_bytes / 2**20:,.0f} MiB" if footprint.total_bytes else "?"


def _estimate(sweep: Sweep, device: DeviceInfo, item: Placed) -> float:
    """Seconds of all rounds of a cell: quality is judged in the first, which mostly is the one that compiles, too."""
    cell, rounds, limit_s = item.planned.cell, item.planned.rounds, sweep.limits.cell_timeout_s
    first = run_seconds(cell, device, sweep.measuring, judged=sweep.quality.enabled, cold=True)
    later = run_seconds(cell, device, sweep.measuring, judged=False, cold=sweep.compile_each_round)
    return min(first, limit_s) + (rounds - 1) * min(later, limit_s)


def _promised_devices(path: Path) -> list[DeviceInfo]:
    """The devices of a cluster file's nodes, taken to have this project's packages as they are installed here."""
    from orchestrator.cluster import load_cluster

    packages = installed_packages()
    return [
        replace(node_class.device(), index=index, packages=packages)
        for node_class in load_cluster(path)
        for index in range(node_class.nodes * max(node_class.accelerators, 1))
    ]


def _cluster_devices(address: str) -> list[DeviceInfo]:
    import os

    from orchestrator.connection import connect
    from orchestrator.inventory import Inventory, bench_devices
    from orchestrator.quiet import quiet

    with quiet(Path(os.devnull)) as terminal, connect(address):
        inventory = Inventory()
        for message in inventory.settle().messages:
            print(message, file=terminal)
        return [device for _, device in bench_devices(inventory.nodes.values())]
