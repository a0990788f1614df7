"""Random faults under a sweep of short cells: isolated processes, runners, raylets and the driver are killed.

    python -m benchmarks.inject_faults --cells 200 --nodes 6 --seeds 3 --every 4

Driver, dispatch, journal, store and processes are the real ones, only the measuring is left out. A seed fixes which
faults come in which order; when they strike depends on the machine. Exit status 1 if anything is lost, doubled or left.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.raylets import ROOT, Raylets

TAGS = ("a100", "rtx3090")
STACKS = ["baseline", "bf16", "fp16", "sdpa-math", "eager"]
# How often each fault is drawn: a driver needs ten seconds to be back, a raylet five.
FAULTS = {"process": 5, "runner": 4, "raylet": 2, "driver": 1}
LIMIT_S = 1500.0
_LINE = re.compile(r"\[ *\d+/\d+\] \w+ +pocket (\S+) (\S+) round (\d+) ([\w-]+)")


def sweep(cells: int) -> dict[str, Any]:
    points = max(1, cells // (len(TAGS) * len(STACKS)))
    return {
        "name": "faults", "models": ["pocket"], "optimizations": STACKS, "hardware": list(TAGS), "rounds": 1,
        "quality": False,
        "workloads": [{"kind": "prefill", "batch_size": 1, "sequence_length": [16 * (i + 1) for i in range(points)]}],
    }  # fmt: skip


def drive(out: Path, address: str, cells: int) -> int:
    """The driver's process: what `benchmatrix run` does, with runners that measure nothing."""
    from benchmarks.short_runner import ShortRunner
    from orchestrator.execute import Options, execute

    return execute(sweep(cells), Options(out=out, address=address, wait_nodes_s=300.0, runner=ShortRunner)).status


@dataclass(kw_only=True)
class Injection:
    """One seed: a driver under fire until it ends by itself."""

    seed: int
    cells: int
    every_s: float
    raylets: Raylets
    out: Path
    faults: Counter[str] = field(default_factory=Counter)
    drivers: int = 0
    seconds: float = 0.0
    status: int | None = None

    def run(self) -> None:
        chance = random.Random(self.seed)
        started = time.monotonic()
        driver = self._start_driver()
        while time.monotonic() - started < LIMIT_S:
            try:
                self.status = driver.wait(self.every_s * chance.uniform(0.5, 1.5))
                break
            except subprocess.TimeoutExpired:
                pass
            if not self.processes("ray::ShortRunner"):
                continue  # a fault before anything runs would only delay it
            kind = chance.choices(list(FAULTS), list(FAULTS.values()))[0]
            position = chance.random()
            if kind == "driver":
                driver.kill()
                driver.wait()
                driver = self._start_driver()
            elif not self._strike(kind, position):
                continue
            self.faults[kind] += 1
        else:
            driver.kill()
        self.seconds = time.monotonic() - started

    def _start_driver(self) -> subprocess.Popen[bytes]:
        self.drivers += 1
        command = (sys.executable, "-m", "benchmarks.inject_faults", "--drive", self.out, "--address",
                   self.raylets.address, "--cells", str(self.cells))  # fmt: skip
        with (self.out.parent / f"{self.out.name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _strike(self, kind: str, position: float) -> bool:
        if kind == "raylet":
            self.raylets.add(self.raylets.kill(int(position * len(self.raylets.nodes))))
            return True
        targets = self.processes("tasks.child" if kind == "process" else "ray::ShortRunner")
        if not targets:
            return False
        try:
            targets[int(position * len(targets))].kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def processes(self, part: str) -> list[psutil.Process]:
        """Processes of this cluster whose command line holds `part`, by age."""
        found = []
        for pid in self.raylets.processes():
            try:
                process = psutil.Process(pid)
                if part in " ".join(process.cmdline()):
                    found.append((process.create_time(), pid, process))
            except psutil.Error:
                continue
        return [process for _, _, process in sorted(found, key=lambda item: item[:2])]

    def verdict(self) -> dict[str, Any]:
        """The figures of this seed; `lost`, `doubled`, `missing` and `left` must be 0."""
        import pandas as pd

        records = [json.loads(line) for line in (self.out / "journal.jsonl").read_bytes().splitlines()]
        rows = [record["row"] for record in records if record["kind"] == "row"]
        runs = Counter((row["cell_id"], row["round"]) for row in rows)
        names = {(row["workload_point"], row["optimization"], str(row["round"]), row["hardware"]) for row in rows}
        log = self.out.parent / f"{self.out.name}.log"
        said = {match.groups() for match in _LINE.finditer(log.read_text(errors="replace"))}
        table = pd.read_parquet(self.out / "rows", columns=["cell_id", "round"])
        readable = Counter(zip(table["cell_id"], table["round"], strict=True))
        planned = set(pd.read_parquet(self.out / "plan.parquet", columns=["cell_id"])["cell_id"])
        return {
            "seed": self.seed, "planned": len(planned), "rows": len(rows),
            "outcomes": dict(Counter(row["outcome"] for row in rows)), "faults": dict(self.faults),
            "drivers": self.drivers, "second attempts": sum(row["attempt"] > 1 for row in rows),
            # said by a driver and not in the journal, or in the journal and not in the table
            "lost": len(said - names) + sum((runs - readable).values()),
            "doubled": sum((runs - Counter(set(runs))).values()) + sum((readable - runs).values()),
            "missing": len(planned - {row["cell_id"] for row in rows}),
            "left": self._left(), "seconds": round(self.seconds), "status": self.status,
        }  # fmt: skip

    def _left(self) -> int:
        """Runners, isolated processes, drivers and locks that are still there half a minute after the driver's end."""
        deadline = time.monotonic() + 30.0
        parts = ("tasks.child", "ray::ShortRunner", "benchmarks.inject_faults --drive")
        while (left := sum(len(self.processes(part)) for part in parts)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left + len(list(self.out.rglob(".lock"))) + len(list(self.out.rglob(".*.tmp")))


def inject(arguments: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="bmfaults-"))
    raylets = Raylets()
    failures = 0
    try:
        for number in range(arguments.nodes):
            raylets.add(TAGS[number % len(TAGS)])
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            injection = Injection(
                seed=seed, cells=arguments.cells, every_s=arguments.every, raylets=raylets, out=folder / f"seed{seed}"
            )
            injection.run()
            verdict = injection.verdict()
            print(json.dumps(verdict), flush=True)
            wrong = any(verdict[name] for name in ("lost", "doubled", "missing", "left"))
            failures += wrong or verdict["status"] not in (0, 1)  # 1: rows of killed processes are no success
    finally:
        left = raylets.close()
    print(f"{failures} of {arguments.seeds} seeds failed, {left} processes left; results in {folder}")
    return 1 if failures or left else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between faults, on average")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        return drive(arguments.drive, arguments.address, arguments.cells)
    return inject(arguments)


if __name__ == "__main__":
    sys.exit(main())
