"""The supervisor of one bench slot: hands jobs to isolated processes and turns whatever happens into a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.artifacts import ArtifactSpec, Wanted, clear_interrupted, find, makers, wanted
from tasks.cell import Technique
from tasks.device import DeviceInfo
from tasks.identity import job_columns
from tasks.isolation import Completed, Isolation
from tasks.job import PROFILES, CellJob, RunResult
from tasks.metric import Missing
from tasks.models.identity import checkpoint_hash
from tasks.quality import on_the_host, reference_serves_all, reference_spec, why_not_judged
from tasks.registry import optimizations, workloads
from tasks.row import Outcome, Row
from tasks.sharing import Alone, disturbing, undisturbed

TIME_COLUMNS = ("load_s", "first_call_s", "compile_s", "warmup_s", "measure_s", "quality_s", "idle_s")


class Supervisor:
    """Owns the isolated processes of ONE bench slot. Never imports torch itself."""

    def __init__(
        self,
        device: DeviceInfo,
        *,
        cpus: tuple[int, ...],
        log_path: Path,
        work_dir: Path,
        sharing: Alone | None = None,
    ) -> None:
        self.device = device
        self.cpus = cpus
        self._sharing = sharing or Alone()
        self._verified: set[str] = set()  # keys of artifacts whose content was compared by this supervisor
        self._built: set[str] = set()  # names of what this supervisor has had compiled, or has tried to
        self._impossible: dict[str, Row] = {}  # keys of artifacts that could not be made, and what became of it
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

    def at_once(self, job: CellJob) -> RunResult | None:
        """The result of a run that needs no process: what it is made from is not there, or could not be made before."""
        try:
            job = _with_checkpoint(job)
            needed, _ = wanted(job), _reference(job)
        except Exception as error:  # a checkpoint or calibration text that is not there
            return RunResult(row=_unreadable(job, error).to_dict())
        for item in needed:
            failure = self._ensure(item.spec, job, item.technique) if item.spec.key in self._impossible else None
            if failure is not None:
                return RunResult(row=_verdict(job, failure, item.technique).to_dict())
        return None

    def measure(self, job: CellJob) -> RunResult:
        """One run of one cell. Never raises for the cell's own fault: every end becomes a row."""
        result = self.at_once(job)
        if result is not None:
            return result
        environment: dict[str, str] = {}
        known = optimizations()
        for technique in job.cell.stack.techniques:
            environment |= known[technique.name].environment(technique)
        job = _with_checkpoint(job)
        failure = self._have_made(job, wanted(job), _reference(job))
        if failure is not None:
            return RunResult(row=failure.to_dict())
        built_s = self._have_built(job)
        executed = job.executed or PROFILES[job.profile].executed
        executed = executed or any(known[name].executed for name in job.cell.stack.names())
        with undisturbed():
            done = self._isolation.run(
                "cell", job.to_dict(), timeout_s=job.timeout_s, executed=executed, environment=environment
            )
        if done.result is None:
            return RunResult(row=_obituary(job, done, built_s).to_dict())
        row = _with_wall(done.result["row"], done, built_s)
        if done.kind == "exec" and not executed:
            row["flags"] = [*row["flags"], "executed_instead"]  # the server refused to fork: unlike the others
        return RunResult(row=row, samples=done.result["samples"])

    def _have_made(self, job: CellJob, needed: list[Wanted], reference: ArtifactSpec | None) -> Row | None:
        """Have what the stack needs made, and the quality reference; the row of a cell that can have no artifact."""
        for item in needed:
            failure = self._ensure(item.spec, job, item.technique)
            if failure is not None:
                return _verdict(job, failure, item.technique)
        if reference is not None:
            self._ensure(reference, job)  # without it the row's quality is null and says so
        return None

    def _have_built(self, job: CellJob) -> float | Missing:
        """Have compiled what the stack's kernels lack on this node, which may take minutes that are not the cell's.

        The seconds that took. Once in this supervisor's life: a cell that lacks it then finds out for itself.
        """
        seconds, reason = 0.0, "nothing was to be compiled before this run"
        for technique in job.cell.stack.techniques:
            known = optimizations()[technique.name]
            what = known.kernels_to_build(technique, job)
            if what is None or what in self._built:
                continue
            self._built.add(what)
            with disturbing():  # a compiler keeps every core busy
                done = self._isolation.run(
                    "build",
                    {"job": replace(job, memory_budget_bytes=None).to_dict(), "builder": technique.name},
                    timeout_s=job.artifact_timeout_s,
                    executed=known.executed,
                    environment=known.environment(technique),
                )
            found = done.result or {"reason": _what_happened(done, job.artifact_timeout_s)}
            seconds += found.get("built_s", 0.0)
            reason = f"could not be compiled: {found['reason']}" if "reason" in found else reason
        return seconds if seconds > 0 else Missing(reason=reason)

    def _ensure(self, spec: ArtifactSpec, job: CellJob, technique: Technique | None = None) -> Row | None:
        """Have it whole in the store: it is there, it comes from another node, or it is made; else what became of it.

        Without `technique` it is the quality reference.
        """
        if spec.key in self._verified and find(spec, Path(job.artifact_dir)) is not None:
            return None
        failure = self._impossible.get(spec.key)
        if not self._found(spec, job, technique, able=failure is None):
            failure = failure or self._make(spec, job, technique)
            if failure is not None:
                self._impossible[spec.key] = failure
                return failure
        self._impossible.pop(spec.key, None)
        self._verified.add(spec.key)
        if technique is not None or reference_serves_all(job):
            self._sharing.made(spec)
        return None

    def _found(self, spec: ArtifactSpec, job: CellJob, technique: Technique | None, *, able: bool) -> bool:
        """Whether it is whole in this node's store, if need be after another node has sent it."""
        root = Path(job.artifact_dir)
        if find(spec, root, content=True) is None and (technique is not None or reference_serves_all(job)):
            self._sharing.obtain(spec, root, job.artifact_timeout_s if technique else job.timeout_s, able=able)
        return find(spec, root, content=True) is not None

    def _make(self, spec: ArtifactSpec, job: CellJob, technique: Technique | None) -> Row | None:
        """Make it on this slot's device; a reference that is too large for that on the host, unless another comes."""
        failure = self._try(spec, replace(job, memory_budget_bytes=None), technique)
        if failure is None:
            return None
        self._sharing.failed(spec)
        small = failure["outcome"] == Outcome.OOM and job.device.kind != "cpu"
        if technique is not None or not small or not reference_serves_all(job):
            return failure
        if self._found(spec, job, None, able=False):
            return None
        with disturbing():
            return self._try(spec, on_the_host(job), None)

    def _try(self, spec: ArtifactSpec, job: CellJob, technique: Technique | None) -> Row | None:
        """Make it in a process of its own; the row of what became of it where that failed."""
        known = optimizations()[technique.name] if technique else None
        limit_s = job.artifact_timeout_s if technique else job.timeout_s
        done = self._isolation.run(
            "artifact",
            {"job": job.to_dict(), "maker": spec.maker},
            timeout_s=limit_s,
            executed=known is not None and known.executed,
            environment=known.environment(technique) if known and technique else {},
        )
        if done.result is not None and "outcome" not in done.result:
            return None
        clear_interrupted(spec, Path(job.artifact_dir))
        row = _obituary(replace(job, timeout_s=limit_s), done)
        row.set(**(done.result or {}))
        return row

    def close(self) -> None:
        self._isolation.close()


def _with_wall(data: dict[str, Any], done: Completed, built_s: float | Missing) -> dict[str, Any]:
    row = Row.from_dict(data)
    accounted = sum(row[name] or 0.0 for name in TIME_COLUMNS)  # a phase not reached took no time
    row.set(wall_s=done.wall_s, overhead_s=max(done.wall_s - accounted, 0.0), process_kind=done.kind)
    row.set(kernels_built_s=built_s)
    return row.to_dict()


def _with_checkpoint(job: CellJob) -> CellJob:
    """The job with the hash of its model, where artifacts are named by it: read once here, not in every process."""
    if job.checkpoint or not (job.quality or makers(job.cell.stack)) or not _has_model(job):
        return job
    return replace(job, checkpoint=checkpoint_hash(job.cell.model, job.search_path))


def _reference(job: CellJob) -> ArtifactSpec | None:
    return reference_spec(job) if job.quality and not why_not_judged(job) else None


def _has_model(job: CellJob) -> bool:
    return workloads()[job.cell.workload.kind].needs_model


def _unreadable(job: CellJob, error: Exception) -> Row:
    row = Row()
    row.set(**job_columns(job), outcome=Outcome.ERROR, error_type=type(error).__name__)
    row.set(reason=f"what it is made from cannot be read: {' '.join(str(error).split())}")
    return row


def _verdict(job: CellJob, failure: Row, technique: Technique) -> Row:
    """The row of a run that had no artifact, from what became of making it."""
    row = Row()
    row.set(**job_columns(job), outcome=failure["outcome"], error_type=failure["error_type"])
    row.set(reason=f"the artifact of {technique} could not be made: {failure['reason']}")
    return row


def _obituary(job: CellJob, done: Completed, built_s: float | Missing | None = None) -> Row:
    row = Row()
    row.set(**job_columns(job), wall_s=done.wall_s, overhead_s=done.wall_s, process_kind=done.kind)
    row.set(kernels_built_s=built_s)
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
