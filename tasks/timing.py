"""Warm-up and the three passes: host latency, device time, throughput. They never share a call.

Latency synchronises after every segment and reads the clock, so it holds launch and synchronisation; device time is
the distance between events on the stream; throughput keeps a chunk queued behind the one that runs, where the device
would otherwise idle between them. A call shorter than a millisecond is timed in blocks of equal calls, since the clock
and the events resolve about half a microsecond and single launches of short kernels scatter by more than themselves.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.compilation import Compilation, compilation
from tasks.cores import SELDOM_S
from tasks.job import SampleSeries
from tasks.statistics import batch_median_halfwidth, median, steady
from tasks.workload import END, SETUP

if TYPE_CHECKING:
    from tasks.energy import EnergyReading
    from tasks.metric import Missing
    from tasks.session import Session

BLOCK_BELOW_S = 1e-3  # calls shorter than this are timed in blocks
BLOCK_TARGET_S = 2e-3
MAX_SAMPLES = 20_000
MIN_SAMPLES = 10
CHUNK_S = 0.025  # a quarter of the energy counter's tick; a synchronisation costs a thousandth of it
STEADY_TOLERANCE = 0.02
GAP_S = 0.005  # between two chunks: somebody else was at work, and the device has nothing to do any more
LAUNCH_BOUND = 0.9  # share of a call that the host needs to issue it, beyond which the device waits for the host


@dataclass(kw_only=True)
class Throughput:
    """Units done in the primary segments, and the seconds that these took, over whole chunks."""

    units: float = 0.0
    seconds: float = 0.0
    calls: int = 0
    calls_ms: list[float] = field(default_factory=list)  # whole calls, set-up left out, of steps with boundaries
    host_loop_s: float | None = None  # of the feeder's loop meanwhile

    @property
    def per_s(self) -> float | None:
        return self.units / self.seconds if self.seconds > 0 else None


@dataclass(kw_only=True)
class Timings:
    """What the passes observed. Series are milliseconds per call (or per call of a block)."""

    block: int = 1
    series: dict[tuple[str, str], SampleSeries] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)  # passes, on the clock of `time.perf_counter`
    warmup_calls: int = 0
    steady: bool = False
    stop_reason: str = "budget"
    halfwidth: float | None = None
    issue_shares: list[float] = field(default_factory=list)  # host time to issue a segment over its whole time
    throughput: Throughput = field(default_factory=Throughput)
    energy: EnergyReading | Missing | None = None
    before: Compilation = field(default_factory=Compilation)  # at the end of warm-up
    after: Compilation = field(default_factory=Compilation)  # at the end of the last pass

    def values(self, measured_in: str, label: str) -> list[float]:
        """Milliseconds of one label in one pass; empty if there is none."""
        series = self.series.get((measured_in, label))
        return series.values_ms if series else []

    @property
    def launch_bound(self) -> bool:
        """Whether the device waited for the host, as the latency pass found it."""
        return bool(self.issue_shares) and median(self.issue_shares) > LAUNCH_BOUND


class Passes:
    """Runs a session's step in each of the passes and keeps what it saw in `session.timings`."""

    def __init__(self, session: Session) -> None:
        assert session.step is not None
        self.session, self.step = session, session.step
        self.timings = session.timings = Timings()
        self._index = 0
        self._single = False  # the call is one segment, so that calls can be joined to blocks
        self._seconds_per_call = 0.0
        self._chunk_calls = 1
        self.feeder = session.feeder
        self._queued: Any = None  # the event at the end of the last chunk that was queued
        self._returned = 0.0  # when the one before it was seen to be done
        self._launch_bound = False  # as the latency pass found it

    def feeding(self) -> AbstractContextManager[None]:
        """Around the timed passes: on CUDA, this thread launches from the CPU that is fastest now."""
        return self.feeder.seated() if self.session.on_cuda else nullcontext()

    def first_call(self) -> None:
        """One whole call, synchronised."""
        labels: list[str] = []
        self.step.run(self._next(), labels.append)
        self.session.synchronize()
        self._single = labels == [self.step.primary]

    def warm_up(self) -> None:
        """Call until two successive windows agree, nothing compiles any more and the least time has passed."""
        profile, began = self.session.profile, time.perf_counter()
        window_s = max(profile.warmup_min_s / 3, 0.15)
        values: list[float] = []
        ended: list[float] = []
        graphs, changed_at = compilation().graphs, 0.0
        while True:
            call = self._host_call()
            now = time.perf_counter() - began
            values += call[self.step.primary]
            ended += [now] * len(call[self.step.primary])
            self.timings.warmup_calls += 1
            if compilation().graphs != graphs:
                graphs, changed_at = compilation().graphs, now
            settled = now >= profile.warmup_min_s and now - changed_at >= min(2 * window_s, 1.0)
            if settled and steady(*_last_windows(values, ended, window_s), STEADY_TOLERANCE):
                self.timings.steady = True
                break
            if now >= profile.warmup_max_s and self.timings.warmup_calls >= 3:
                break
        self._keep("warmup", {self.step.primary: (values, ended)})
        self._choose_block(values[-50:])
        self.timings.before = compilation()

    def latency(self) -> None:
        """Host time of every segment, synchronised, until the median's interval is narrow enough or time is up."""
        profile, began = self.session.profile, time.perf_counter()
        self.timings.issue_shares.clear()  # warm-up had other blocks, and another CPU
        kept: dict[str, tuple[list[float], list[float]]] = {}
        primary: list[float] = []
        self.timings.began["latency"] = began
        check_at, calls = MIN_SAMPLES, 0
        while True:
            calls += 1
            for label, values in self._host_call().items():
                kept.setdefault(label, ([], []))
                kept[label][0].extend(values)
                kept[label][1].extend([time.perf_counter() - began] * len(values))
            primary, now = kept[self.step.primary][0], time.perf_counter() - began
            if len(primary) >= check_at and now >= profile.latency_s:
                self.timings.halfwidth = batch_median_halfwidth(primary)
                check_at = len(primary) + max(25, len(primary) // 10)
                if self.timings.halfwidth is not None and self.timings.halfwidth <= profile.precision:
                    self.timings.stop_reason = "converged"
                    break
            if now >= profile.latency_max_s or len(primary) >= MAX_SAMPLES:
                break
        if self.timings.halfwidth is None:
            self.timings.halfwidth = batch_median_halfwidth(primary)
        self._seconds_per_call = (time.perf_counter() - began) / (calls * self.timings.block)
        self._launch_bound = self.timings.launch_bound
        self._keep("latency", kept)
        self.step.after_latency()

    def device(self) -> None:
        """Time between events recorded on the stream after every segment; CUDA only, no host synchronisation."""
        import torch

        began, block = time.perf_counter(), self.timings.block
        rounds: list[list[tuple[str, Any]]] = []
        pool = [torch.cuda.Event(enable_timing=True) for _ in range(2048)]
        used = 0
        self.session.synchronize()
        while time.perf_counter() - began < self.session.profile.device_s or not rounds:
            events: list[tuple[str, Any]] = []

            def mark(label: str, events: list[tuple[str, Any]] = events) -> None:
                nonlocal used
                event = pool[used] if used < len(pool) else torch.cuda.Event(enable_timing=True)
                used += 1
                event.record()
                events.append((label, event))

            mark("start")
            for number in range(block):
                self.step.run(self._next(), mark if number == block - 1 else _ignore)
            rounds.append(events)
            if used >= len(pool) or sum(len(item) for item in rounds) > MAX_SAMPLES:
                break
            if len(rounds) % 16 == 0 or (self._launch_bound and self.feeder.due()):
                # the queue may not grow without bound, and the loop above must see true time
                self.session.synchronize()
                self.feeder.look()
        self.session.synchronize()
        kept: dict[str, tuple[list[float], list[float]]] = {}
        for events in rounds:
            for (_, before), (label, after) in itertools.pairwise(events):
                kept.setdefault(label, ([], []))[0].append(before.elapsed_time(after) / block)
                kept[label][1].append(0.0)
        self._keep("device", kept)

    def throughput(self) -> None:
        """Chunks of whole calls; the energy meter, if any, decides when it is enough."""
        profile = self.session.profile
        self._chunk_calls = max(1, round(CHUNK_S / max(self._seconds_per_call, 1e-6)))
        looks = self.feeder.looks
        if self.session.meter is not None:
            self.timings.energy = self.session.meter(self._chunk)
        began = time.perf_counter()
        while self.timings.throughput.seconds == 0 or (
            time.perf_counter() - began < profile.throughput_s
            and self.timings.throughput.seconds < profile.throughput_s
        ):
            self._chunk()
        self.timings.throughput.host_loop_s = self.feeder.seconds_since(looks)
        self.timings.after = compilation()

    def _chunk(self) -> float:
        """One chunk of whole calls; returns the units that its energy is shared among."""
        queueing = not self.step.boundaries and self.session.on_cuda and not self._launch_bound
        return self._queued_chunk() if queueing else self._synchronised_chunk()

    def _queued_chunk(self) -> float:
        """A chunk behind the one that the device is at, and the wait for that one: the device does not idle.

        Each return is the end of one chunk, the one queued at the return before; so the time between two returns is
        that of a chunk, whichever of host and device is slower.
        """
        import torch

        result = self.timings.throughput

        def queue() -> Any:
            for _ in range(self._chunk_calls):
                self.step.run(self._next(), _ignore)
            event = torch.cuda.Event()
            event.record()
            return event

        chunks = 1
        if self._queued is not None and time.perf_counter() - self._returned > GAP_S and self._queued.query():
            self._queued, chunks = None, 2  # the one that ended in the pause used energy too
        first = self._queued is None
        if first:
            self._queued = queue()
        before, self._queued = self._queued, queue()
        self.feeder.look()
        before.synchronize()
        now = time.perf_counter()
        units = float(self.step.units_per_call * self._chunk_calls)
        if not first:
            result.seconds += now - self._returned
            result.units += units
            result.calls += self._chunk_calls
        self._returned = now
        return float((self.step.energy_units_per_call or self.step.units_per_call) * self._chunk_calls * chunks)

    def _synchronised_chunk(self) -> float:
        step, result = self.step, self.timings.throughput
        boundaries = step.boundaries
        seconds = call_s = 0.0
        self.session.synchronize()
        self.feeder.look(SELDOM_S)  # the device idles meanwhile, and its energy is counted
        opened = time.perf_counter()

        def mark(label: str) -> None:
            nonlocal opened, seconds, call_s
            if label in boundaries:
                self.session.synchronize()
                now = time.perf_counter()
                seconds += now - opened if boundaries[label] else 0.0
                call_s += now - opened if label != SETUP else 0.0
                opened = now

        for _ in range(self._chunk_calls):
            call_s = 0.0
            step.run(self._next(), mark)
            if boundaries:
                result.calls_ms.append(1e3 * call_s)
        if not boundaries:
            self.session.synchronize()
            seconds += time.perf_counter() - opened
        result.units += float(step.units_per_call * self._chunk_calls)
        result.seconds += seconds
        result.calls += self._chunk_calls
        return float((step.energy_units_per_call or step.units_per_call) * self._chunk_calls)

    def _host_call(self) -> dict[str, list[float]]:
        """One call (or block) with a synchronised clock reading per segment; milliseconds by label."""
        synchronize, block = self.session.synchronize, self.timings.block
        opened: list[int] = []
        issued: list[int] = []
        closed: list[int] = []
        labels: list[str] = []

        def mark(label: str) -> None:
            issued.append(time.perf_counter_ns())
            synchronize()
            closed.append(time.perf_counter_ns())
            labels.append(label)
            self.feeder.look()
            opened.append(time.perf_counter_ns())

        indices = [self._next() for _ in range(block)]
        synchronize()
        self.feeder.look()
        opened.append(time.perf_counter_ns())
        for index in indices[:-1]:
            self.step.run(index, _ignore)
        self.step.run(indices[-1], mark)
        result: dict[str, list[float]] = {}
        shares = []
        for label, before, given, after in zip(labels, opened[:-1], issued, closed, strict=True):
            result.setdefault(label, []).append((after - before) / 1e6 / block)
            if label == self.step.primary:
                shares.append((given - before) / (after - before))
        self.timings.issue_shares.append(median(shares))
        return result

    def _choose_block(self, recent_ms: list[float]) -> None:
        """Blocks only for one-segment calls that are too short for the clock."""
        seconds = median(recent_ms) / 1e3
        if self._single and seconds < BLOCK_BELOW_S:
            self.timings.block = max(2, round(BLOCK_TARGET_S / seconds))

    def _next(self) -> int:
        self._index += 1
        return self._index

    def _keep(self, measured_in: str, kept: dict[str, tuple[list[float], list[float]]]) -> None:
        job = self.session.job
        for label, (values, ended) in kept.items():
            if label in (SETUP, END):
                continue
            self.timings.series[measured_in, label] = SampleSeries(
                cell_id=job.cell.cell_id,
                round=job.round,
                result_key=job.result_key,
                measured_in=measured_in,
                label=label,
                values_ms=values,
                ended_s=ended,
            )


def _last_windows(values: list[float], ended: list[float], window_s: float) -> tuple[list[float], list[float]]:
    """The values of the last two windows, each of at least `window_s` and of at least one whole call.

    `ended` rises, and is equal for the values of one call.
    """
    cuts = [len(values)]
    for _ in range(2):
        end = cuts[-1]
        # the calls that ended within the window before the last one of what is left, and never less than that one
        cuts.append(bisect_right(ended, ended[end - 1] - window_s, hi=end) if end else 0)
    return values[cuts[2] : cuts[1]], values[cuts[1] : cuts[0]]


def _ignore(_: str) -> None:
    return
