"""Runs a sweep from start to end: plan, Ray, slots, results, exit status. The command and Python share it."""

from __future__ import annotations

import platform
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from orchestrator.interrupt import EXIT_INTERRUPTED, Stop
from orchestrator.planning import local_tag, planned_cells, read_sweep, search_path
from orchestrator.sweep import LOCAL, Sweep, make_sweep

EXIT_OK, EXIT_PROBLEMS = 0, 1
RESULTS = Path("results")
_FINE = {"ok", "oom", "unsupported"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `benchmatrix run`."""

    out: Path | None = None
    address: str | None = None
    overrides: tuple[str, ...] = ()
    only: str | None = None
    reuse: Literal["exact", "versions"] = "exact"
    retry: tuple[str, ...] = ()
    wait_nodes_s: float = 0.0
    parallel_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a sweep ended. `outcomes` counts the newest row of every planned cell; `status` is the exit status."""

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
    loaded, folders = _load(sweep, options)
    out = options.out or RESULTS / loaded.name
    if options.only:  # a wrong expression must be found before anything is started
        planned_cells(loaded, options.only, LOCAL)
    from orchestrator.store import Store

    store = Store.open(out)
    try:
        store.write_sweep(loaded.to_yaml())
        return _measure(loaded, folders, options, out, store, progress_to)
    finally:
        store.close()


@dataclass(kw_only=True)
class _Run:
    """What one call of `execute` gathers for its journal and its end."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: float = field(default_factory=time.monotonic)


def _measure(
    sweep: Sweep, folders: tuple[str, ...], options: Options, out: Path, store: Any, progress_to: TextIO | None
) -> Finished:
    from orchestrator.connection import connect
    from orchestrator.dispatch import Dispatcher
    from orchestrator.inventory import Inventory
    from orchestrator.patience import PatientStore
    from orchestrator.progress import Progress
    from orchestrator.quiet import quiet
    from orchestrator.work import RunSettings, SweepWork
    from tasks.probe import probe

    run, stop = _Run(), Stop()
    cells = planned_cells(sweep, options.only, local_tag(probe()))
    with quiet(out / "log" / "driver.log") as terminal:
        stream = progress_to or terminal
        with Progress(0, stream) as progress:
            for repair in store.repairs:
                progress.say(repair)
            # listening after connecting: Ray installs handlers of its own
            with connect(options.address) as connection, stop.listening(terminal, last_words=progress.stop):
                patient = PatientStore(store, stopping=stop, say=progress.say)
                settings = RunSettings(
                    sweep=sweep, run_id=run.run_id, ray_version=connection.ray_version, search_path=folders,
                    reuse=options.reuse, retry=options.retry,
                )  # fmt: skip
                patient.note(
                    "run", run_id=run.run_id, sweep=sweep.name, argv=sys.argv[1:], cells=len(cells),
                    address=connection.address, ray=connection.ray_version, python=platform.python_version(),
                    parallel_gpus=options.parallel_gpus,
                )  # fmt: skip
                work = SweepWork(
                    cells, patient, store.records, settings,
                    settled=lambda row: progress.finished(None, row), write_plan=store.write_plan,
                )  # fmt: skip
                dispatcher = Dispatcher(
                    work=work, inventory=Inventory(), journal=patient, progress=progress, stopping=stop,
                    static=connection.local, parallel=options.parallel_gpus, wait_nodes_s=options.wait_nodes_s,
                    log_path=_log_paths(out) if connection.local else lambda slot_id: None,
                )  # fmt: skip
                dispatcher.run()
            finished = Finished(
                sweep=sweep.name, out=out, outcomes=dict(work.outcomes()), planned=len({c.cell.cell_id for c in cells}),
                runs=work.measured, interrupted=stop.asked, seconds=time.monotonic() - run.started,
            )  # fmt: skip
            patient.note("end", run_id=run.run_id, **finished.document())
    return finished


def _load(sweep: str | Sweep | Mapping[str, Any], options: Options) -> tuple[Sweep, tuple[str, ...]]:
    if isinstance(sweep, Sweep):
        return sweep, (str(Path.cwd()),)
    if isinstance(sweep, str):
        return read_sweep(sweep, options.overrides), search_path(sweep)
    return make_sweep(sweep), (str(Path.cwd()),)


def _log_paths(out: Path) -> Any:
    folder = (out / "log").resolve()
    return lambda slot_id: str(folder / f"{slot_id.replace('/', '-')}.log")
