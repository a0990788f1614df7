"""The conditions under which a cell is measured: set before, watched meanwhile, judged after."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.environment import fingerprint
from tasks.interference import CpuWatch, InterferenceReport, foreign_gpu_activity
from tasks.metric import Missing
from tasks.nvml import open_gpu
from tasks.telemetry import Telemetry, TelemetrySummary

if TYPE_CHECKING:
    import torch

    from tasks.job import CellJob
    from tasks.session import Session

COOL_WITHIN_C = 3.0
COOL_AT_MOST_S = 30.0
_TELEMETRY = ("sm_clock_mhz_median", "temperature_c_start", "temperature_c_end", "throttled")
HOST_RESERVE_BYTES = 512 * 2**20


def prepare_process(job: CellJob) -> torch.device:
    """Affinity, threads, memory limit, seeds and the compiler's cache folder of this process; its torch device."""
    if job.compile_cache_dir:
        if job.compile_cold:
            shutil.rmtree(job.compile_cache_dir, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = job.compile_cache_dir
        os.environ["TRITON_CACHE_DIR"] = os.path.join(job.compile_cache_dir, "triton")  # noqa: PTH118
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    import torch

    threads = job.threads or len(job.cpus)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(job.seed)
    device = torch.device(job.device.kind)
    if device.type == "cuda":
        if job.memory_budget_bytes:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(job.memory_budget_bytes / total, 1.0))
    else:
        _limit_host_memory(job.memory_budget_bytes)
    return device


def _limit_host_memory(budget_bytes: int | None) -> None:
    """Make allocations beyond the budget (else: beyond what the machine has free) fail instead of thrash."""
    with open("/proc/meminfo") as file:  # noqa: PTH123
        facts = dict(line.split(":", 1) for line in file)
    available = int(facts["MemAvailable"].split()[0]) * 1024
    with open("/proc/self/status") as file:  # noqa: PTH123
        held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    allowed = budget_bytes or max(available - HOST_RESERVE_BYTES, HOST_RESERVE_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (held + allowed, resource.RLIM_INFINITY))


class Conditions:
    """Watches the machine beside one session; on CUDA telemetry, on a CPU interference."""

    def __init__(self, session: Session) -> None:
        self._session, job = session, session.job
        self._cpu_watch: CpuWatch | None = None
        self._telemetry: Telemetry | None = None
        self._report: InterferenceReport | None = None
        self._summary: TelemetrySummary | None = None
        self._foreign: tuple[str, ...] = ()
        if session.on_cuda:
            session.gpu = open_gpu(job.device.uuid)
            _, self._foreign = foreign_gpu_activity(session.gpu)

    def wait_until_cool(self) -> None:
        """Wait while the card is more than three degrees above what the block began at; at most half a minute."""
        limit = self._session.job.temperature_c
        began = time.perf_counter()
        while limit is not None and time.perf_counter() - began < COOL_AT_MOST_S:
            now = self._session.gpu.temperature_c()
            if now is None or now <= limit + COOL_WITHIN_C:
                return
            time.sleep(0.25)

    def begin(self) -> None:
        """Just before the timed passes."""
        if self._session.on_cuda:
            self._telemetry = Telemetry(self._session.gpu)
            self._telemetry.sample()
            self._telemetry.count()
        else:
            import torch

            self._cpu_watch = CpuWatch(threads=torch.get_num_threads())
            self._cpu_watch.begin()

    def watch(self) -> None:
        """From here on somebody may ask the card for its clocks: the latency pass is over."""
        if self._telemetry is not None:
            self._telemetry.start()

    def end(self) -> None:
        """Just after the timed passes."""
        if self._telemetry is not None:
            self._summary = self._telemetry.stop()
            self._keep_clocks(self._telemetry)
        if self._cpu_watch is not None:
            self._report = self._cpu_watch.end()

    def _keep_clocks(self, telemetry: Telemetry) -> None:
        """Put the clocks beside the raw samples that they belong to: those of the latency pass, and its times."""
        timings, step = self._session.timings, self._session.step
        series = timings.series.get(("latency", step.primary)) if timings and step else None
        if timings is not None and step is not None and series is not None:
            megahertz, seconds = telemetry.clocks(timings.began["latency"])
            timings.series["latency", step.primary] = replace(series, sm_clock_mhz=megahertz, clock_s=seconds)

    def judge(self) -> None:
        """Put settings as read back, and findings, into the row."""
        row = self._session.row
        facts = fingerprint(self._session.gpu)
        environment = json.loads(facts.pop("environment", "{}"))
        row.flag(*self._foreign)
        row.set(host_loop_ms=Missing(reason="cpu"), host_loop_throughput_ms=Missing(reason="cpu"))
        feeder = self._session.feeder
        if feeder.choices:
            environment["fed_from"] = feeder.to_dict()
            row.set(host_loop_ms=1e3 * feeder.seconds)
            timings = self._session.timings
            seconds = timings.throughput.host_loop_s if timings else None
            looked = Missing(reason="no_look") if seconds is None else 1e3 * seconds
            row.set(host_loop_throughput_ms=looked)
        if self._report is not None:
            environment["interference"] = self._report.to_dict()
            row.flag(*self._report.flags)
        if self._summary is not None:
            summary = self._summary
            environment["power_capped_fraction"] = summary.power_capped_fraction
            environment["throttled_by"] = list(summary.throttled_by)
            row.flag(*summary.flags)
        why = Missing(reason="cpu" if self._summary is None else "not_supported")
        seen = {name: getattr(self._summary, name, None) for name in _TELEMETRY}
        row.set(**{name: why if value is None else value for name, value in seen.items()})
        row.set(**facts, environment=json.dumps(environment, default=str))
