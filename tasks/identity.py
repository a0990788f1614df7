"""The identity columns of a row, filled alike by the isolated process and by whoever writes its obituary."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tasks.cell import Cell
from tasks.environment import this_machine_key
from tasks.job import CellJob
from tasks.registry import workloads


def cell_columns(cell: Cell) -> dict[str, Any]:
    """The columns that follow from the cell alone; None where meaningless."""
    workload = workloads()[cell.workload.kind]
    kernel = not workload.needs_model
    return {
        "cell_id": cell.cell_id,
        "baseline_id": cell.baseline_id,
        "group_id": cell.group_id,
        "model": cell.model.id,
        "model_source": None if kernel else cell.model.source,
        "optimization": str(cell.stack),
        "workload": cell.workload.kind,
        "workload_point": str(cell.workload),
        "hardware": cell.hardware,
        **workload.columns(cell.workload),
    }


def job_columns(job: CellJob) -> dict[str, Any]:
    """Identity and bookkeeping columns of one run."""
    return {
        **cell_columns(job.cell),
        "sweep": job.sweep,
        "hardware_requested": job.hardware_requested,
        "hardware_simulated": job.device.simulated,
        "round": job.round,
        "block_id": job.block_id,
        "order_in_round": job.order_in_round,
        "result_key": job.result_key,
        "run_id": job.run_id,
        "attempt": job.attempt,
        "profile": job.profile,
        "machine_key": this_machine_key(),
        "device_kind": job.device.kind,
        "device_name": job.device.name,
        "device_uuid": job.device.uuid,
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
