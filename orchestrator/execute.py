"""Runs a sweep from start to end: plan, Ray, slots, results, exit status. The command and Python share it."""

from __future__ import annotations

import platform
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from orchestrator.durable import StoreError
from orchestrator.expand import PlannedCell
from orchestrator.interrupt import EXIT_INTERRUPTED, Stop
from orchestrator.planning import local_tag, planned_cells, read_sweep
from orchestrator.sweep import Sweep, SweepError, make_sweep
from tasks.probe import probe

EXIT_OK, EXIT_PROBLEMS = 0, 1
RESULTS = Path("results")
_LAST_FLUSH_S = 5.0
_FINE = {"ok", "oom", "unsupported"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `benchmatrix run`; `runner` replaces `orchestrator.runner.Runner` in our own benchmarks."""

    out: Path | None = None
    address: str | None = None
    overrides: tuple[str, ...] = ()
    only: str | None = None
    reuse: Literal["exact", "versions"] = "exact"
    retry: tuple[str, ...] = ()
    wait_nodes_s: float = 0.0
    parallel_gpus: bool = False
    runner: type | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a sweep ended, over the cells that were asked for: `--only` leaves the others out of every count.

    `outcomes` counts the newest row of every planned cell; `status` is the exit status.
    """

    sweep: str
    out: Path
    outcomes: dict[str, int]
    planned: int
    runs: int
    interrupted: bool
    seconds: float

    @property
    def status(self) -> int:
        if self.interrupted:
            return EXIT_INTERRUPTED
        missing = self.planned - sum(self.outcomes.values())
        return EXIT_OK if missing == 0 and set(self.outcomes) <= _FINE else EXIT_PROBLEMS

    def document(self) -> dict[str, Any]:
        """What `run --json` prints."""
        return {
            "sweep": self.sweep, "out": str(self.out), "planned": self.planned, "outcomes": self.outcomes,
            "runs": self.runs, "interrupted": self.interrupted, "seconds": round(self.seconds, 1),
            "status": self.status,
        }  # fmt: skip


def execute(sweep: str | Sweep | Mapping[str, Any], options: Options, progress_to: TextIO | None = None) -> Finished:
    """Run what the result folder does not hold yet; raises `problems.bad_input` errors before anything starts."""
    loaded = _load(sweep, options)
    out = options.out or RESULTS / loaded.name
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):
        where = str(out).replace(":/", "://", 1)
        raise StoreError(f"--out {where}: results go to a folder that is mounted here; object stores are not supported")
    tag = local_tag(probe())
    planned = planned_cells(loaded, None, tag)
    # a wrong expression must be found before anything is started
    chosen = planned_cells(loaded, options.only, tag) if options.only else planned
    cells = _Cells(planned=planned, chosen={item.cell.cell_id for item in chosen})
    from orchestrator.store import Store

    store = Store.open(out)
    try:
        store.write_sweep(loaded.to_yaml())
        return _measure(loaded, cells, options, out, store, progress_to)
    finally:
        store.close()


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """The whole plan, and the ids of the cells that this call may measure."""

    planned: list[PlannedCell]
    chosen: set[str]


@dataclass(kw_only=True)
class _Run:
    """What one call of `execute` gathers for its journal and its end."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: float = field(default_factory=time.monotonic)


def _measure(
    sweep: Sweep, cells: _Cells, options: Options, out: Path, store: Any, progress_to: TextIO | None
) -> Finished:
    from orchestrator.connection import connect
    from orchestrator.dispatch import Dispatcher
    from orchestrator.head import watched
    from orchestrator.inventory import Inventory
    from orchestrator.patience import PatientStore
    from orchestrator.progress import Progress
    from orchestrator.quiet import quiet
    from orchestrator.work import RunSettings, SweepWork

    run, stop = _Run(), Stop()
    with quiet(out / "log" / "driver.log") as terminal:
        stream = progress_to or terminal
        with Progress(0, stream) as progress:
            for repair in store.repairs:
                progress.say(repair)
            # listening after connecting: Ray installs handlers of its own
            patient = PatientStore(store, stopping=stop, say=progress.say)
            with (
                connect(options.address) as connection,
                watched(connection.head, _head_lost(patient, progress, out)),
                stop.listening(terminal, last_words=progress.stop),
            ):
                settings = RunSettings(
                    sweep=sweep, run_id=run.run_id, ray_version=connection.ray_version, reuse=options.reuse,
                    retry=options.retry,
                )  # fmt: skip
                patient.note(
                    "run", run_id=run.run_id, sweep=sweep.name, argv=sys.argv[1:], cells=len(cells.chosen),
                    timeout_s=sweep.limits.cell_timeout_s,
                    address=connection.address, ray=connection.ray_version, python=platform.python_version(),
                    parallel_gpus=options.parallel_gpus,
                )  # fmt: skip
                work = SweepWork(
                    cells.planned, patient, store.records, settings, only=cells.chosen,
                    settled=lambda row: progress.finished(None, row), write_plan=patient.write_plan,
                )  # fmt: skip
                dispatcher = Dispatcher(
                    work=work, inventory=Inventory(), journal=patient, progress=progress, stopping=stop,
                    static=connection.local, parallel=options.parallel_gpus, wait_nodes_s=options.wait_nodes_s,
                    log_path=_log_paths(out) if connection.local else lambda slot_id: None,
                    runner=options.runner,
                )  # fmt: skip
                dispatcher.run()
            finished = Finished(
                sweep=sweep.name, out=out, outcomes=dict(work.outcomes()), planned=len(cells.chosen),
                runs=work.measured, interrupted=stop.asked, seconds=time.monotonic() - run.started,
            )  # fmt: skip
            patient.note("end", run_id=run.run_id, **finished.document())
    return finished


def _head_lost(patient: Any, progress: Any, out: Path) -> Callable[[str], None]:
    """What is done when the head is gone: the rows so far become readable, and the person learns how to go on."""

    def last_words(sentence: str) -> None:
        progress.stop()
        progress.say(f"benchmatrix: {sentence}: {out} keeps its rows, the same command goes on once it is back")
        patient.last_flush(_LAST_FLUSH_S)

    return last_words


def _load(sweep: str | Sweep | Mapping[str, Any], options: Options) -> Sweep:
    if isinstance(sweep, str):
        return read_sweep(sweep, options.overrides)
    if not isinstance(sweep, Sweep):
        return make_sweep(sweep, overrides=options.overrides)
    if options.overrides:
        raise SweepError("overrides apply to a sweep file or to its content, not to a Sweep: give them to make_sweep")
    return sweep


def _log_paths(out: Path) -> Any:
    folder = (out / "log").resolve()
    return lambda slot_id: str(folder / f"{slot_id.replace('/', '-')}.log")
