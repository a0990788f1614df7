"""What the orchestrator costs at scale, each figure in a process of its own, best of several.

python -m benchmarks.scale plan       100,000 cells: expand, place, forecast            < 5 s, < 500 MB
python -m benchmarks.scale dispatch   10,000 empty cells beside 10,000 bare actor calls  >= 70 %, < 50 MB
python -m benchmarks.scale read       10,000 rows with samples                           < 2 s
python -m benchmarks.scale resume     10,000 cells of which 90 % are done                < 3 s
python -m benchmarks.scale files      how many files 10,000 rows with samples become
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CELLS = {"plan": 100_000, "dispatch": 10_000, "folder": 10_000}
STACKS = ["baseline", "bf16", "fp16", "sdpa-math", "eager", "bf16+sdpa-math", "fp16+sdpa-math", "bf16+eager",
          "fp16+eager", "fp32"]  # fmt: skip
TAG = "a100"
SLOTS = 8
SAMPLES = 200


def sweep(cells: int) -> Any:
    from orchestrator.sweep import make_sweep

    points = cells // len(STACKS)
    batches = max(number for number in range(1, 101) if points % number == 0)
    lengths = [16 * (number + 1) for number in range(points // batches)]
    workload = {"kind": "prefill", "batch_size": list(range(1, batches + 1)), "sequence_length": lengths}
    return make_sweep({
        "name": "scale", "models": ["pocket"], "workloads": [workload], "optimizations": STACKS, "hardware": [TAG],
        "rounds": 1, "quality": False,
    })  # fmt: skip


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan(cells: int, _where: Path) -> dict[str, Any]:
    """What `benchmatrix plan --json` does, without the imports and the text."""
    from orchestrator.expand import expand
    from orchestrator.placement import place
    from orchestrator.planning import Planning
    from tasks.probe import probe

    devices = list(probe(TAG, 1, cards=[]).devices)
    before, started, used = peak_mb(), time.perf_counter(), time.process_time()
    matrix = sweep(cells)
    planning = Planning(sweep=matrix, placed=place(expand(matrix, "cpu"), devices, None), slots={TAG: 1})
    document = planning.document()
    return {"cells": len(document["cells"]), "s": time.perf_counter() - started, "cpu_s": time.process_time() - used,
            "peak_mb": peak_mb(), "grown_mb": peak_mb() - before}  # fmt: skip


class Folder:
    """A result folder with its work, as the driver has them, on one pretended node."""

    def __init__(self, folder: Path, cells: int) -> None:
        from orchestrator.expand import expand
        from orchestrator.inventory import Node, bench_devices
        from orchestrator.patience import PatientStore
        from orchestrator.slots import BenchSlot
        from orchestrator.store import Store
        from orchestrator.work import RunSettings, SweepWork
        from tasks.probe import probe

        matrix = sweep(cells)
        self.store = Store.open(folder)
        self.patient = PatientStore(self.store, stopping=lambda: False, say=print)
        self.work = SweepWork(
            expand(matrix, "cpu"), self.patient, self.store.records,
            RunSettings(sweep=matrix, run_id="scale", ray_version="none"),
            settled=lambda row: None, write_plan=self.store.write_plan,
        )  # fmt: skip
        self._node = Node(node_id="node", address="", accelerators=1, report=probe(TAG, 1, cards=[]))
        self.slot = BenchSlot(slot_id="slot", node=self._node, device=self._node.devices[0])
        self._devices = bench_devices([self._node])

    def offer(self) -> None:
        self.work.offer(self._devices)

    def finish(self, runs: int) -> None:
        """Runs that end with every column filled and `SAMPLES` samples in two passes."""
        from tasks.identity import job_columns
        from tasks.job import RunResult
        from tasks.row import Outcome, columns

        made_up = {"string": "text", "int": 1, "float": 0.123456789, "bool": True, "strings": ["one"]}
        full = {name: made_up[column.type] for name, column in columns().items()} | {"null_reasons": "{}"}
        while runs > 0:
            for job in self.work.take(self.slot)[:runs]:
                known = {name: value for name, value in job_columns(job).items() if value is not None}
                series = [
                    {"cell_id": job.cell.cell_id, "round": job.round, "result_key": job.result_key, "label": "call",
                     "measured_in": name, "values_ms": [0.1234 * i for i in range(SAMPLES)],
                     "ended_s": [0.5678 * i for i in range(SAMPLES)]}
                    for name in ("latency", "throughput")
                ]  # fmt: skip
                self.work.done(job, RunResult(row={**full, **known, "outcome": Outcome.OK.value}, samples=series))
                runs -= 1


def folder(cells: int, where: Path) -> dict[str, Any]:
    """A folder of full rows with samples: resumed when 90 % are done, finished, counted, and read."""
    out, started = where / "out", time.perf_counter()
    made = Folder(out, cells)
    made.offer()
    made.finish(cells * 9 // 10)
    made.store.close()
    written_s = time.perf_counter() - started
    resumed = []
    for _ in range(3):
        started, used = time.perf_counter(), time.process_time()
        again = Folder(out, cells)
        again.offer()
        left = again.work.runs()
        resumed.append((time.perf_counter() - started, time.process_time() - used))
        if len(resumed) == 3:
            again.finish(left)
        again.store.close()
    found = [path for path in out.rglob("*") if path.is_file()]
    return {
        "resume_s": min(resumed)[0], "resume_cpu_s": min(resumed)[1], "resume_left": left, **_read(out),
        "files": len(found), "mb": sum(path.stat().st_size for path in found) / 2**20,
        "write_ms_per_run": 1e3 * written_s / (cells * 0.9),
    }  # fmt: skip


def _read(out: Path) -> dict[str, Any]:
    """Rows and samples as the tables and the person's notebook read them."""
    import pandas as pd  # imports are no part of the figure
    import pyarrow.dataset  # noqa: F401

    from analysis import load, load_samples

    pd.DataFrame({"a": [1]}).drop_duplicates()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        rows, samples = load(out), load_samples(out)
        seconds.append(time.perf_counter() - started)
    return {"read_s": min(seconds), "rows": len(rows), "series": len(samples)}


def dispatch(cells: int, where: Path) -> dict[str, Any]:
    """Empty cells through the real driver, between two rounds of as many empty calls of as many bare actors."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0",
                   "RAY_enable_metrics_collection": "0"}  # fmt: skip
    import ray

    ray.init(
        address="local", num_cpus=1, num_gpus=SLOTS, labels={"bench/hw": TAG}, include_dashboard=False,
        logging_level=logging.ERROR, log_to_driver=False, _node_ip_address="127.0.0.1",
        object_store_memory=128 * 2**20, _temp_dir=str(where / "ray"),
    )  # fmt: skip
    try:
        actors = [ray.remote(_Bare).options(num_cpus=0).remote() for _ in range(SLOTS)]
        ray.get([actor.nothing.remote() for actor in actors for _ in range(20)])
        before, used = _bare_rate(actors, cells)
        ours = _our_rate(cells, where / "out")
        after, used_after = _bare_rate(actors, cells)
        flood = _flood_rate(actors, cells)
    finally:
        ray.shutdown()
    bare = (before + after) / 2
    return {
        **ours, "bare_cpu_us": (used + used_after) / 2, "bare_per_s": bare, "bare_flood_per_s": flood,
        "ratio": ours["cells_per_s"] / bare, "ratio_to_flood": ours["cells_per_s"] / flood,
    }  # fmt: skip


class _Bare:
    def nothing(self) -> None:
        return None


def _bare_rate(actors: list[Any], calls: int) -> tuple[float, float]:
    """Calls a second, and the driver's CPU microseconds a call; one in flight per actor, as one run is per slot."""
    import ray

    started, used = time.perf_counter(), time.process_time()
    flying = {actor.nothing.remote(): actor for actor in actors}
    left = calls - len(flying)
    while flying:
        ready, _ = ray.wait(list(flying), timeout=1.0)
        for reference in ready:
            actor = flying.pop(reference)
            ray.get(reference)
            if left > 0:
                flying[actor.nothing.remote()] = actor
                left -= 1
    return calls / (time.perf_counter() - started), 1e6 * (time.process_time() - used) / calls


def _flood_rate(actors: list[Any], calls: int) -> float:
    """All calls submitted at once: what no driver may do that must know what runs where."""
    import ray

    started = time.perf_counter()
    ray.get([actors[number % len(actors)].nothing.remote() for number in range(calls)])
    return calls / (time.perf_counter() - started)


def _our_rate(cells: int, out: Path) -> dict[str, Any]:
    """From the first run's start, when all runners are up, to the last row's end."""
    from benchmarks.short_runner import EmptyRunner
    from orchestrator.dispatch import Dispatcher
    from orchestrator.inventory import Inventory
    from orchestrator.progress import Progress

    made = Folder(out, cells)
    driver = Dispatcher(
        work=made.work, inventory=Inventory(), journal=made.patient, progress=Progress(0, io.StringIO(), live=False),
        stopping=lambda: False, static=True, parallel=True, runner=EmptyRunner,
    )  # fmt: skip
    marks: list[tuple[float, float, int, float]] = []
    finish = made.work.done

    def done(*arguments: Any) -> None:
        finish(*arguments)
        if made.work.measured % 100 == 0:
            marks.append((time.perf_counter(), _resident_mb(), made.work.measured, time.process_time()))

    made.work.done = done  # type: ignore[method-assign]
    driver.run()
    made.store.close()
    warm = [mark for mark in marks if mark[2] >= 500]  # by then every runner is up
    (begun, memory, first, used), (ended, memory_after, last, used_after) = warm[0], warm[-1]
    return {"cells": made.work.measured, "cells_per_s": (last - first) / (ended - begun),
            "cpu_us": 1e6 * (used_after - used) / (last - first), "grown_mb": memory_after - memory}  # fmt: skip


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


WORK: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "plan": plan, "dispatch": dispatch, "folder": folder,
}  # fmt: skip
BEST: dict[str, tuple[str, Callable[..., float]]] = {
    "plan": ("s", min), "dispatch": ("ratio", max), "folder": ("resume_s", min),
}  # fmt: skip


def once(name: str, cells: int) -> dict[str, Any]:
    where = Path(tempfile.mkdtemp(prefix="bms", dir="/tmp"))
    try:
        return WORK[name](cells, where)
    finally:
        shutil.rmtree(where, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="default: all")
    parser.add_argument("--cells", type=int, help="another number of cells, a multiple of 10")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.what or list(WORK):
        cells = arguments.cells or CELLS[name]
        if arguments.once:
            print(json.dumps(once(name, cells)))
            continue
        command = (sys.executable, "-m", "benchmarks.scale", name, "--cells", str(cells), "--once")
        found = []
        for _ in range(arguments.repeat):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        key, best = BEST[name]
        chosen = best(found, key=lambda item: item[key])
        print(f"{name}: " + ", ".join(f"{label} {value:,.3g}" if isinstance(value, float) else f"{label} {value:,}"
                                      for label, value in chosen.items()), flush=True)  # fmt: skip
        print(f"   all: {[round(item[key], 3) for item in found]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
