"""The supervisor of one bench slot: hands jobs to isolated processes and turns whatever happens into a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.device import DeviceInfo
from tasks.identity import job_columns
from tasks.isolation import Completed, Isolation
from tasks.job import PROFILES, CellJob, RunResult
from tasks.registry import optimizations, workloads
from tasks.row import Outcome, Row

TIME_COLUMNS = ("load_s", "first_call_s", "compile_s", "warmup_s", "measure_s", "quality_s", "idle_s")


class Supervisor:
    """Owns the isolated processes of ONE bench slot. Never imports torch itself."""

    def __init__(self, device: DeviceInfo, *, cpus: tuple[int, ...], log_path: Path, work_dir: Path) -> None:
        self.device = device
        self.cpus = cpus
        self._references: set[tuple[object, ...]] = set()  # made, or found impossible, by this supervisor
        environment = {}
        if device.kind == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif device.uuid:
            environment["CUDA_VISIBLE_DEVICES"] = device.uuid
        self._isolation = Isolation(log_path=log_path, work_dir=work_dir, environment=environment)

    def start(self) -> None:
        """Start the fork server in the background."""
        self._isolation.start()

    def facts(self, timeout_s: float = 180.0) -> dict[str, Any]:
        """Ceilings and idle power of this device, measured in an isolated process; `{"error": ...}` if that failed."""
        payload = {"device": self.device.to_dict(), "cpus": list(self.cpus)}
        done = self._isolation.run("facts", payload, timeout_s=timeout_s)
        return done.result if done.result is not None else {"error": _what_happened(done, timeout_s)}

    def measure(self, job: CellJob) -> RunResult:
        """One run of one cell. Never raises for the cell's own fault: every end becomes a row."""
        environment: dict[str, str] = {}
        known = optimizations()
        for technique in job.cell.stack.techniques:
            environment |= known[technique.name].environment(technique)
        if job.quality:
            self._ensure_reference(job)
        executed = job.executed or PROFILES[job.profile].executed
        executed = executed or any(known[name].executed for name in job.cell.stack.names())
        done = self._isolation.run(
            "cell", job.to_dict(), timeout_s=job.timeout_s, executed=executed, environment=environment
        )
        if done.result is None:
            return RunResult(row=_obituary(job, done).to_dict())
        row = _with_wall(done.result["row"], done)
        if done.kind == "exec" and not executed:
            row["flags"] = [*row["flags"], "executed_instead"]  # the server refused to fork: unlike the others
        return RunResult(row=row, samples=done.result["samples"])

    def _ensure_reference(self, job: CellJob) -> None:
        """The fp32 reference in a process of its own: never two models on the device at once."""
        wanted = (job.quality_tokens, job.quality_choices, job.quality_choices_file)
        key = (job.cell.model, *wanted, job.cell.workload.get("image_size"))
        if key not in self._references and workloads()[job.cell.workload.kind].needs_model:
            self._references.add(key)
            self._isolation.run("reference", job.to_dict(), timeout_s=job.timeout_s)

    def close(self) -> None:
        self._isolation.close()


def _with_wall(data: dict[str, Any], done: Completed) -> dict[str, Any]:
    row = Row.from_dict(data)
    accounted = sum(row[name] or 0.0 for name in TIME_COLUMNS)  # a phase not reached took no time
    row.set(wall_s=done.wall_s, overhead_s=max(done.wall_s - accounted, 0.0), process_kind=done.kind)
    return row.to_dict()


def _obituary(job: CellJob, done: Completed) -> Row:
    row = Row()
    row.set(**job_columns(job), wall_s=done.wall_s, overhead_s=done.wall_s, process_kind=done.kind)
    outcome = Outcome.CRASHED
    if done.timed_out:
        outcome = Outcome.TIMEOUT
    elif done.out_of_memory:
        outcome = Outcome.OOM
    elif done.exit_code == 1:
        outcome = Outcome.ERROR
    row.set(outcome=outcome, reason=_what_happened(done, job.timeout_s), error_type=done.signal)
    return row


def _what_happened(done: Completed, timeout_s: float) -> str:
    if done.timed_out:
        return f"exceeded its limit of {timeout_s:g} s in the phase {done.phase}"
    if done.out_of_memory:
        return f"killed by the kernel for host memory in the phase {done.phase}"
    if done.signal:
        return f"killed by {done.signal} in the phase {done.phase}{_last_line(done)}"
    if done.exit_code is None:
        return f"the isolated process was lost in the phase {done.phase}"
    return f"ended with status {done.exit_code} without a result in the phase {done.phase}{_last_line(done)}"


def _last_line(done: Completed) -> str:
    lines = [line for line in done.stderr_tail.splitlines() if line.strip()]
    return f": {lines[-1].strip()[:300]}" if lines else ""
