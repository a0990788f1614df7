"""A cell's whole life in its isolated process, top to bottom: load, apply, prove, warm up, measure, check."""

from __future__ import annotations

import gc
import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.compilation import compilation
from tasks.identity import job_columns
from tasks.job import CellJob
from tasks.metric import Metric, Missing, Phase
from tasks.optimization import Evidence, Unsupported, out_of_memory
from tasks.registry import metric_classes
from tasks.row import Outcome, Row
from tasks.session import Session
from tasks.validity import invalid_reasons


def run_cell(payload: dict[str, Any], phase_file: Path, kind: str) -> dict[str, Any]:
    """Measure one cell once. Every end but the death of the process comes back as `{"row", "samples"}`."""
    job = CellJob.from_dict(payload)
    row = Row()
    row.set(**job_columns(job), process_kind=kind)
    life = _Life(job, row, phase_file)
    try:
        life.live()
    except Unsupported as refusal:
        row.set(outcome=Outcome.UNSUPPORTED, reason=str(refusal))
    except Exception as error:
        traceback.print_exc()
        outcome, reason = classify(error)
        row.set(outcome=outcome, reason=f"{reason} (in the phase {life.phase})", error_type=type(error).__name__)
    life.conclude()
    return {"row": row.to_dict(), "samples": [asdict(item) for item in life.series()]}


class _Life:
    def __init__(self, job: CellJob, row: Row, phase_file: Path) -> None:
        self.job, self.row, self.phase = job, row, "start"
        self._phase_file = phase_file
        self._seconds: dict[str, float] = {}
        self._compiling: dict[str, float] = {}
        self._metrics: list[Metric] = [cls() for cls in metric_classes().values()]
        self.session: Session | None = None

    def live(self) -> None:
        from tasks.conditions import Conditions, prepare_process
        from tasks.timing import Passes

        device = prepare_process(self.job)
        session = self.session = Session(job=self.job, device=device, row=self.row)
        conditions = Conditions(session)
        with self._phase(Phase.LOAD, "load_s"):
            bring_up(session)
        with session.contexts():
            passes = Passes(session)
            with self._phase(Phase.FIRST_CALL, "first_call_s"):
                passes.first_call()
            self._idle(conditions)
            with self._phase(Phase.WARMUP, "warmup_s"):
                passes.warm_up()
            with _collector_off():
                conditions.begin()
                with passes.feeding():
                    with self._phase(Phase.LATENCY, "measure_s"):
                        passes.latency()
                    if session.on_cuda:
                        with self._phase(Phase.DEVICE, "measure_s"):
                            passes.device()
                    conditions.watch()
                    with self._phase(Phase.THROUGHPUT, "measure_s"):
                        passes.throughput()
                conditions.end()
            conditions.judge()  # before the settings of the stack are taken back
            self._prove(session)
            if self.job.quality:
                with self._phase(Phase.QUALITY, "quality_s"):
                    session.quality = self._judged(session)

    def _prove(self, session: Session) -> None:
        """Ask every technique for evidence; without it the row is invalid, whatever it measured."""
        assert session.step is not None
        self.phase = "evidence"
        self.row.invalidate(*session.step.problems())
        found: dict[str, Any] = {}
        for technique, chosen in session.techniques:
            try:
                evidence = technique.evidence(chosen, session)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                # what was measured fitted; it is kept, unproven
                evidence = Evidence(ok=False, facts={"out_of_memory": str(error)[:200]})
            found[str(chosen)] = {"ok": evidence.ok, **evidence.facts}
            if not evidence.ok:
                self.row.invalidate(f"evidence_missing:{chosen.name}")
        self.row.set(evidence=json.dumps(found, default=str))

    def _judged(self, session: Session) -> Any:
        """The quality; a judge that fails, or does not fit beside the model, takes nothing from what was measured."""
        from tasks.quality import judge

        try:
            return judge(session)
        except Exception as error:
            traceback.print_exc()
            self.row.flag("quality_failed")
            return Missing(reason=f"quality could not be judged: {classify(error)[1]}")

    def _idle(self, conditions: Any) -> None:
        began = time.perf_counter()
        conditions.wait_until_cool()
        self._seconds["idle_s"] = time.perf_counter() - began

    @contextmanager
    def _phase(self, phase: Phase, column: str) -> Iterator[None]:
        assert self.session is not None
        self.phase = phase.value
        self._phase_file.write_text(self.phase)
        for metric in self._metrics:
            metric.begin(phase, self.session)
        compiled, began = compilation().seconds, time.perf_counter()
        try:
            yield
            self.session.synchronize()
        finally:
            spent, compiling = time.perf_counter() - began, compilation().seconds - compiled
            self._seconds[column] = self._seconds.get(column, 0.0) + max(spent - compiling, 0.0)
            self._seconds["compile_s"] = self._seconds.get("compile_s", 0.0) + min(compiling, spent)
        for metric in self._metrics:
            metric.end(phase, self.session)

    def conclude(self) -> None:
        """Fill what is known, also after a failure: times, settings, whatever the metrics have seen."""
        self.row.set(**{"quality_s": Missing(reason="quality was not judged in this run"), **self._seconds})
        if self.session is None:
            return
        self._describe_timing(self.session)
        for metric in self._metrics:
            try:
                self.row.set(**metric.collect(self.session))
            except Exception as error:
                # what was measured is kept: the broken metric's columns are null, and the row says so
                if self.row["outcome"] is None:
                    traceback.print_exc()
                    self.row.flag(f"metric_failed:{metric.name}")
                self.row.set(**{c.name: Missing(reason=f"{type(error).__name__}: {error}") for c in metric.columns})
        if self.row["outcome"] is None:
            self.row.invalidate(*invalid_reasons(self.row, self.job.device))
            reasons = self.row["invalid_reasons"]
            self.row.set(outcome=Outcome.INVALID if reasons else Outcome.OK, reason="; ".join(reasons) or None)

    def _describe_timing(self, session: Session) -> None:
        timings = session.timings
        if timings is None or not timings.series:
            return
        compiled = timings.before
        self.row.set(
            warmup_iterations=timings.warmup_calls,
            steady=timings.steady,
            stop_reason=timings.stop_reason,
            sample_kind="call" if timings.block == 1 else "block_mean",
            samples=len(timings.values("latency", session.step.primary)) if session.step else None,
            graphs_compiled=compiled.graphs,
            compile_cache="warm" if compiled.cache_misses == 0 else "cold",
        )
        if not compiled.graphs:
            self.row.set(compile_cache=Missing(reason="nothing was compiled"))
        if timings.after.graphs > compiled.graphs:
            self.row.invalidate("recompiled_in_window")
        if not timings.steady:
            self.row.flag("not_steady")

    def series(self) -> list[Any]:
        timings = self.session.timings if self.session else None
        return list(timings.series.values()) if timings else []


def bring_up(session: Session) -> None:
    """Load the model as the stack wants it, apply the techniques in order, make the step with its inputs."""
    _edit_load(session)
    if session.workload.needs_model:
        session.row.set(weights=session.load().weights or Missing(reason="a factory does not say"))
    for technique, chosen in session.techniques:
        technique.apply(chosen, session)
    session.step = session.workload.prepare(session)
    session.synchronize()


def _edit_load(session: Session) -> None:
    """Let artifacts and techniques say how the model is to be loaded."""
    from tasks.artifacts import attach

    if session.on_cuda:
        import torch

        torch.cuda.init()
    attach(session)
    for technique, chosen in session.techniques:
        technique.load(session.load_options, chosen, session)


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


_NO_KERNEL = re.compile(
    r"no available kernel|no viable backend|not implemented for|no kernel found|does not support an attention", re.I
)


def classify(error: Exception) -> tuple[Outcome, str]:
    """Outcome and one sentence for an exception of the measured code."""
    text = " ".join(str(error).split())[:500]
    if out_of_memory(error):
        return Outcome.OOM, text or "host memory exhausted"
    if isinstance(error, (RuntimeError, NotImplementedError, ValueError)) and _NO_KERNEL.search(text):
        return Outcome.UNSUPPORTED, text
    return Outcome.ERROR, f"{type(error).__name__}: {text}"


def facts(payload: dict[str, Any], phase_file: Path, kind: str) -> dict[str, Any]:
    """What this device can do at best, measured now: ceilings and idle power."""
    from tasks.ceilings import measure_facts

    phase_file.write_text("facts")
    return measure_facts(payload)


def artifact(payload: dict[str, Any], phase_file: Path, kind: str) -> dict[str, Any]:
    """Make what a technique of the stack (`maker`) asks for, or the quality reference, unless it is in the store.

    `{"key", "made"}`; or `{"outcome", "reason", "error_type"}` where it cannot be made.
    """
    from tasks.artifacts import make_wanted
    from tasks.conditions import prepare_process
    from tasks.quality import MAKER, make_reference

    phase_file.write_text(f"artifact {payload['maker']}")
    job = CellJob.from_dict(payload["job"])
    try:
        session = Session(job=job, device=prepare_process(job), row=Row())
        reference = payload["maker"] == MAKER
        found, made = make_reference(session) if reference else make_wanted(session, payload["maker"])
    except Unsupported as refusal:
        return {"outcome": Outcome.UNSUPPORTED.value, "reason": str(refusal), "error_type": None}
    except Exception as error:
        traceback.print_exc()
        outcome, reason = classify(error)
        return {"outcome": outcome.value, "reason": reason, "error_type": type(error).__name__}
    return {"key": found.spec.key, "made": made}


def build(payload: dict[str, Any], phase_file: Path, kind: str) -> dict[str, Any]:
    """Have a technique of the stack (`builder`) compile its kernels: `{"built_s"}`, or `{"reason"}` where it cannot."""
    from tasks.conditions import prepare_process

    phase_file.write_text(f"build {payload['builder']}")
    job = CellJob.from_dict(payload["job"])
    try:
        session = Session(job=job, device=prepare_process(job), row=Row())
        _edit_load(session)
        (builder,) = (item for item in session.techniques if item[0].name == payload["builder"])
        return {"built_s": builder[0].build_kernels(builder[1], session)}
    except Exception as error:
        traceback.print_exc()
        return {"reason": classify(error)[1]}


def pid_only(payload: dict[str, Any], phase_file: Path, kind: str) -> dict[str, Any]:
    """The least duty: proves that isolation works, and what it costs."""
    return {"pid": os.getpid(), "kind": kind, **payload}


DUTIES: dict[str, Callable[[dict[str, Any], Path, str], dict[str, Any]]] = {
    "cell": run_cell,
    "facts": facts,
    "artifact": artifact,
    "build": build,
    "nothing": pid_only,
}
