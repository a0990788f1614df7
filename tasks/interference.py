"""Who else was at work while a region was timed: other processes, the hypervisor, foreign work on the GPU.

The median of short calls does not move on an oversubscribed core while the p99 grows a hundredfold, so the timings
themselves do not show it; CPU time, involuntary switches and pressure do.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tasks.gpu import Gpu, GpuProcess

CPU_SHARE_FLAG, CPU_SHARE_BAR = 0.95, 0.90
SWITCHES_PER_S, PRESSURE, STEAL, CANARY = 10.0, 0.05, 0.005, 0.03
RUN_DELAY = 0.05
FOREIGN_CPU = 0.10  # of the capacity of the process's CPUs
FOREIGN_GPU_PERCENT = 2.0
UTILIZATION_MEMORY_S = 2.1
BARRING = frozenset({"steal", "foreign_load", "cpu_starved"})
_MIN_WINDOW_S = 0.1  # /proc/stat counts in ticks of 10 ms


@dataclass(frozen=True, kw_only=True)
class CpuSnapshot:
    """Counters at one moment. Seconds; None where the kernel does not tell. `busy_s`, `steal_s`: on `cpus` only."""

    wall_s: float
    process_cpu_s: float
    involuntary_switches: int
    run_delay_s: float | None
    pressure_s: float | None
    busy_s: float | None
    steal_s: float | None
    cpus: int


@dataclass(frozen=True, kw_only=True)
class InterferenceReport:
    """What the bracketed region got of its CPUs; shares of the window, None where not measured.

    `cpu_share` is CPU time over wall x threads; `run_delay_share` the part of it that the process wanted to run and
    had to wait for a CPU. `foreign_share` is others' CPU time over the capacity of the process's CPUs.
    """

    wall_s: float
    cpu_share: float
    run_delay_share: float | None
    involuntary_switches_per_s: float
    pressure_share: float | None
    steal_share: float | None
    foreign_share: float | None
    canary_ratio: float | None
    flags: tuple[str, ...]

    @property
    def barred(self) -> bool:
        """Whether a run with these flags may not decide faster or slower."""
        return bool(BARRING & set(self.flags))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flags": list(self.flags)}


class CpuWatch:
    """Brackets a timed region of a CPU cell; costs about 15 ms (the canary) outside the region, nothing inside."""

    def __init__(self, *, threads: int, proc: Path = Path("/proc"), canary: Callable[[], float] | None = None) -> None:
        self._threads = threads
        self._proc = proc
        self._canary = canary_s if canary is None else canary

    def begin(self) -> None:
        self._canary_before = self._canary()
        self._before = snapshot(self._proc)

    def end(self) -> InterferenceReport:
        after = snapshot(self._proc)
        return compare(self._before, after, threads=self._threads, canary=(self._canary_before, self._canary()))


def snapshot(proc: Path = Path("/proc")) -> CpuSnapshot:
    cpus = sorted(os.sched_getaffinity(0))
    busy, steal = _stat(proc / "stat", cpus)
    return CpuSnapshot(
        wall_s=time.perf_counter(),
        process_cpu_s=time.process_time(),
        involuntary_switches=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        run_delay_s=_run_delay(proc / "self" / "task"),
        pressure_s=_pressure(proc / "pressure" / "cpu"),
        busy_s=busy,
        steal_s=steal,
        cpus=len(cpus),
    )


def compare(
    before: CpuSnapshot, after: CpuSnapshot, *, threads: int, canary: tuple[float, float] | None = None
) -> InterferenceReport:
    """The report between two snapshots; `canary` holds the canary's seconds before and after."""
    wall = max(after.wall_s - before.wall_s, 1e-9)
    own = after.process_cpu_s - before.process_cpu_s
    share = own / (wall * threads)
    switches = (after.involuntary_switches - before.involuntary_switches) / wall
    delay = _per(before.run_delay_s, after.run_delay_s, wall * threads)
    pressure = _per(before.pressure_s, after.pressure_s, wall)
    capacity = wall * before.cpus
    steal = _per(before.steal_s, after.steal_s, capacity)
    busy = _per(before.busy_s, after.busy_s, capacity)
    foreign = None if busy is None or wall < _MIN_WINDOW_S else max(busy - own / capacity, 0.0)
    ratio = None if canary is None else canary[1] / canary[0]

    flags: list[str] = []
    if (steal or 0.0) > STEAL:
        flags.append("steal")
    if (foreign or 0.0) > FOREIGN_CPU:
        flags.append("foreign_load")
    # work that does not parallelise leaves CPUs alone by itself: it starves only if it also had to wait for one
    if share < CPU_SHARE_BAR and (delay is None or delay > RUN_DELAY):
        flags.append("cpu_starved")
    disturbed = (
        share < CPU_SHARE_FLAG and (delay is None or delay > RUN_DELAY / 2),
        switches > SWITCHES_PER_S,
        (pressure or 0.0) > PRESSURE,
        ratio is not None and abs(ratio - 1.0) > CANARY,
    )
    if flags or any(disturbed):
        flags.insert(0, "interference")
    return InterferenceReport(
        wall_s=wall,
        cpu_share=share,
        run_delay_share=delay,
        involuntary_switches_per_s=switches,
        pressure_share=pressure,
        steal_share=steal,
        foreign_share=foreign,
        canary_ratio=ratio,
        flags=tuple(flags),
    )


def canary_s(repeats: int = 7, *, rounds: int = 20_000) -> float:
    """Seconds of a fixed integer loop, the least of some repeats: moves with the core's clock and its neighbours."""
    return min(_canary_loop(rounds) for _ in range(repeats))


def _canary_loop(rounds: int) -> float:
    begun = time.perf_counter()
    total = 0
    for number in range(rounds):
        total += number ^ 5
    return time.perf_counter() - begun


def own_pids() -> frozenset[int]:
    """This process, what started it and what it started: their work on a device is not foreign."""
    me = psutil.Process()
    try:
        return frozenset(process.pid for process in (me, *me.parents(), *me.children(recursive=True)))
    except psutil.Error:
        return frozenset({me.pid})


def foreign_processes(
    gpu: Gpu, own: Collection[int] | None = None, *, resident: bool = False
) -> tuple[GpuProcess, ...]:
    """Compute processes on the device that are not ours.

    `resident` says that this process holds a context itself. If its pid is then not listed, the container shows pids
    of another namespace: one of the listed processes is us, and the least foreign reading is to drop the first.
    """
    own = own_pids() if own is None else own
    running = gpu.processes() or ()
    foreign = tuple(process for process in running if process.pid not in own)
    return foreign[1:] if resident and len(foreign) == len(running) else foreign


def foreign_gpu_activity(
    gpu: Gpu, own: Collection[int] | None = None, sleep: Callable[[float], None] = time.sleep
) -> tuple[float | None, tuple[str, ...]]:
    """Percent of SM time that others use, and the flags; to be asked while this process leaves the device idle.

    Per process where the driver tells; otherwise the whole device's utilisation, which counts only where no display
    can be the reason: graphics is recorded, never flagged. What looks foreign is looked at again after a while, since
    utilisation looks back up to two seconds and may see the cell that was measured before.
    """
    percent, flags = _foreign_gpu_activity(gpu, own)
    if flags:
        sleep(UTILIZATION_MEMORY_S)
        percent, flags = _foreign_gpu_activity(gpu, own)
    return percent, flags


def _foreign_gpu_activity(gpu: Gpu, own: Collection[int] | None) -> tuple[float | None, tuple[str, ...]]:
    foreign = foreign_processes(gpu, own)
    if not foreign and gpu.processes() is not None:
        # nobody else holds a context: what utilisation remembers is the cell before, whose process has ended
        return None, ()
    shares = [process.utilization_percent for process in foreign]
    percent = sum(share or 0.0 for share in shares) if shares and None not in shares else None
    if percent is None:
        percent = gpu.utilization_percent()
        if not foreign and gpu.facts().display_active is not False:
            return percent, ()
    return percent, ("foreign_gpu_process",) if (percent or 0.0) > FOREIGN_GPU_PERCENT else ()


def _per(before: float | None, after: float | None, whole: float) -> float | None:
    return None if before is None or after is None else max(after - before, 0.0) / whole


def _pressure(path: Path) -> float | None:
    """Seconds in which some task of the system waited for a CPU."""
    try:
        line = path.read_text().splitlines()[0]
        return int(line.split("total=")[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _stat(path: Path, cpus: Collection[int]) -> tuple[float | None, float | None]:
    """Busy and stolen seconds of `cpus`; guest time is inside user time."""
    hertz = os.sysconf("SC_CLK_TCK")
    wanted = {f"cpu{number}" for number in cpus}
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.split(" ", 1)[0] in wanted]
        ticks = [[int(number) for number in row[1:]] for row in rows]
        busy = sum(row[0] + row[1] + row[2] + row[5] + row[6] for row in ticks)
        steal = sum(row[7] for row in ticks)
    except (OSError, IndexError, ValueError):
        return None, None
    return (busy / hertz, steal / hertz) if ticks else (None, None)


def _run_delay(path: Path) -> float | None:
    """Seconds that the living threads of this process were ready and waited for a CPU."""
    total, seen = 0, False
    try:
        for task in path.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
                seen = True
            except (OSError, IndexError, ValueError):
                continue  # the thread ended, or a kernel without schedstat
    except OSError:
        return None
    return total / 1e9 if seen else None
