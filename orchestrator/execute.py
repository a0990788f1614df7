"""Runs a sweep from start to end: plan, Ray, slots, results, exit status. The command and Python share it."""

from __future__ import annotations

import platform
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from orchestrator.expand import PlannedCell
from orchestrator.interrupt import EXIT_INTERRUPTED, Stop
from orchestrator.planning import local_messages, local_tag, planned_cells, read_sweep
from orchestrator.sweep import Sweep, SweepError, make_sweep
from tasks.probe import probe
from tasks.secrets import Secrets
from tasks.uri import check_uri, is_uri

EXIT_OK, EXIT_PROBLEMS = 0, 1
RESULTS = Path("results")
_LAST_FLUSH_S = 5.0
_FINE = {"ok", "oom", "unsupported"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `benchmatrix run`. `out` is a folder, or a URI such as `s3://bucket/results`.

    `runner` replaces `orchestrator.runner.Runner` in our own benchmarks.
    """

    out: str | Path | None = None
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

    `outcomes` counts the newest row of every planned cell; `status` is the exit status. `out` is a folder on this
    machine, of a URI its working copy; `where` is what was asked for.
    """

    sweep: str
    out: Path
    where: str
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
            "sweep": self.sweep, "out": self.where, "planned": self.planned, "outcomes": self.outcomes,
            "runs": self.runs, "interrupted": self.interrupted, "seconds": round(self.seconds, 1),
            "status": self.status,
        }  # fmt: skip


def execute(sweep: str | Sweep | Mapping[str, Any], options: Options, progress_to: TextIO | None = None) -> Finished:
    """Run what the result folder does not hold yet; raises `problems.bad_input` errors before anything starts."""
    from orchestrator.connection import check_reachable

    loaded = _load(sweep, options)
    where = str(options.out or RESULTS / loaded.name)
    if is_uri(where):
        check_uri(where)
    check_reachable(options.address)
    tag = local_tag(probe())
    planned = planned_cells(loaded, None, tag)
    # a wrong expression must be found before anything is started
    chosen = planned_cells(loaded, options.only, tag) if options.only is not None else planned
    cells = _Cells(planned=planned, chosen={item.cell.cell_id for item in chosen})
    from orchestrator.mirror import Mirror
    from orchestrator.store import Store

    with Mirror(where) if is_uri(where) else nullcontext() as mirror:
        out = mirror.directory if mirror else Path(where)
        store = Store.open(out)
        store.repairs[:0] = mirror.repairs if mirror else []
        try:
            store.write_sweep(loaded.to_yaml())
            results = _Results(out=out, where=where, store=store, mirror=mirror)
            return _measure(loaded, cells, options, results, progress_to)
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


@dataclass(frozen=True, kw_only=True)
class _Results:
    """Where the results go: the folder with its store, and what carries it to a URI, if that was asked for."""

    out: Path
    where: str
    store: Any
    mirror: Any


def _measure(sweep: Sweep, cells: _Cells, options: Options, results: _Results, progress_to: TextIO | None) -> Finished:
    from orchestrator.connection import connect
    from orchestrator.dispatch import Dispatcher
    from orchestrator.exchange import start_exchange
    from orchestrator.head import watched
    from orchestrator.inventory import Inventory, declared_tags
    from orchestrator.patience import PatientStore
    from orchestrator.progress import Progress
    from orchestrator.quiet import quiet
    from orchestrator.watch import Watch
    from orchestrator.work import RunSettings, SweepWork

    run, stop, secrets, out, store = _Run(), Stop(), Secrets(), results.out, results.store
    with quiet(out / "log" / "driver.log") as terminal:
        stream = progress_to or terminal
        with Progress(0, stream) as progress:
            for repair in store.repairs:
                progress.say(repair)
            if results.mirror is not None:
                results.mirror.say = progress.say
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
                    "run", run_id=run.run_id, sweep=sweep.name, cells=len(cells.chosen),
                    argv=[secrets.hide(text) for text in sys.argv[1:]],
                    timeout_s=sweep.limits.cell_timeout_s,
                    address=connection.address, ray=connection.ray_version, python=platform.python_version(),
                    parallel_gpus=options.parallel_gpus,
                )  # fmt: skip
                work = SweepWork(
                    cells.planned, patient, store.records, settings, only=cells.chosen,
                    settled=lambda row: progress.finished(None, row), write_plan=patient.write_plan,
                )  # fmt: skip
                if not connection.local:
                    named = {"run_id": run.run_id, "sweep": sweep.name, "out": results.where}
                    progress.watch = Watch(named, work.left_by_hardware)
                    asked = [item for item in cells.planned if item.cell.cell_id in cells.chosen]
                    for message in local_messages(asked, declared_tags()):
                        progress.say(message)
                dispatcher = Dispatcher(
                    work=work, inventory=Inventory(), journal=patient, progress=progress, stopping=stop,
                    static=connection.local, parallel=options.parallel_gpus, wait_nodes_s=options.wait_nodes_s,
                    log_path=_log_paths(out) if connection.local else lambda slot_id: None,
                    runner=options.runner, exchange=None if connection.local else start_exchange(),
                )  # fmt: skip
                dispatcher.run()
                finished = Finished(
                    sweep=sweep.name, out=out, where=results.where, outcomes=dict(work.outcomes()),
                    planned=len(cells.chosen), runs=work.measured, interrupted=stop.asked,
                    seconds=time.monotonic() - run.started,
                )  # fmt: skip
                if progress.watch is not None:
                    progress.watch.close(finished.status)
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
