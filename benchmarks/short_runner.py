"""Runners for benchmarks of the orchestrator itself: everything is real but the measuring."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.runner import Runner
from tasks.device import DeviceInfo
from tasks.identity import job_columns
from tasks.isolation import Completed, Isolation
from tasks.job import CellJob, SampleSeries
from tasks.row import Outcome, Row
from tasks.supervisor import Supervisor


class ShortRunner(Runner):
    """Each run is a real isolated process, with its limit and its post-mortem, that does nothing and ends."""

    def prepare(self, device: dict[str, Any], cpus: list[int], known: dict[str, Any] | None) -> dict[str, Any]:
        self._supervisor = ShortSupervisor(
            DeviceInfo.from_dict(device), cpus=(), log_path=self._log_path, work_dir=self._work
        )
        self._slot = {"device": device, "cpus": cpus, "ceilings": {}, "idle_power_w": None}
        return {"cpus": cpus}


class ShortSupervisor(Supervisor):
    def __init__(self, device: DeviceInfo, *, cpus: tuple[int, ...], log_path: Path, work_dir: Path) -> None:
        super().__init__(device, cpus=cpus, log_path=log_path, work_dir=work_dir)
        self._isolation.close()
        self._isolation = ShortIsolation(log_path=log_path, work_dir=work_dir, environment={})


class ShortIsolation(Isolation):
    """Executes the least duty in place of a cell, and gives it the row that a cell would have left."""

    def start(self) -> None:
        """No fork server: it would import torch."""

    def run(
        self, do: str, payload: dict[str, Any], *, timeout_s: float, executed: bool = False,
        environment: dict[str, str] | None = None,
    ) -> Completed:  # fmt: skip
        done = super().run("nothing", {}, timeout_s=timeout_s, executed=True, environment=environment)
        return done if done.result is None else replace(done, result=finished(CellJob.from_dict(payload)))


class EmptyRunner:
    """No process and no device: a run returns at once, with what identifies it."""

    def __init__(self, log_path: str | None, home: str, exchange: Any = None) -> None:
        del log_path, home, exchange

    def where(self, claim: str | None = None) -> dict[str, Any]:
        import ray

        return {"accelerators": ray.get_runtime_context().get_accelerator_ids().get("GPU", []), "pid": os.getpid()}

    def prepare(self, device: dict[str, Any], cpus: list[int], known: dict[str, Any] | None) -> dict[str, Any]:
        return {"cpus": []}

    def measure(self, jobs: bytes) -> bytes:
        return json.dumps([self._measure(job) for job in json.loads(jobs)]).encode()

    def _measure(self, job: dict[str, Any]) -> dict[str, Any]:
        named = ("cell_id", "sweep", "round", "block_id", "result_key", "run_id", "attempt")
        cell = job["cell"]
        row = {name: job[name] for name in named} | {
            "group_id": job["block_id"].rpartition("-")[0], "model": cell["model"]["id"], "hardware": cell["hardware"],
            "workload_point": cell["workload"]["kind"], "outcome": "ok",
            "optimization": "+".join(item["name"] for item in cell["stack"]),
        }  # fmt: skip
        return {"row": row, "samples": []}

    def close(self) -> None:
        """Nothing to tidy up."""


def finished(job: CellJob) -> dict[str, Any]:
    """`{"row", "samples"}` of a run that ended well and measured nothing but three made-up samples."""
    row = Row()
    row.set(**job_columns(job), outcome=Outcome.OK)
    series = SampleSeries(
        cell_id=job.cell.cell_id, round=job.round, result_key=job.result_key, measured_in="latency", label="call",
        values_ms=[1.0, 2.0, 3.0], ended_s=[0.001, 0.003, 0.006],
    )  # fmt: skip
    return json.loads(json.dumps({"row": row.to_dict(), "samples": [asdict(series)]}))
