from __future__ import annotations

import threading
import time

import pytest

from tasks.nvml import FakeGpu, ManualClock, NoGpu
from tasks.telemetry import Telemetry, TelemetrySummary, summarize


def watched(gpu: FakeGpu, clock: ManualClock, seconds: float = 2.0, period: float = 0.1) -> TelemetrySummary:
    telemetry = Telemetry(gpu, clock=clock)
    before = gpu.slowdown_ns()
    for _ in range(round(seconds / period)):
        telemetry.sample()
        clock.sleep(period)
    return summarize(telemetry.samples, before, gpu.slowdown_ns())


def test_a_steady_card_has_no_flags() -> None:
    clock = ManualClock()
    summary = watched(FakeGpu(clock, temperature_c=[(0, 35), (1.5, 41)]), clock)
    assert summary.flags == ()
    assert summary.throttled is False
    assert (summary.sm_clock_mhz_median, summary.clock_drift, summary.power_w_median) == (1980, 0, 300)
    assert (summary.temperature_c_start, summary.temperature_c_end, summary.samples) == (35, 41, 20)
    assert (summary.power_capped_fraction, summary.gpu_idle_fraction, summary.power_capped_s) == (0, 0, None)


@pytest.mark.parametrize(("later", "flags"), [(1980 * 0.985, ()), (1980 * 0.97, ("clock_drift",))])
def test_clocks_that_drift_more_than_two_percent_are_flagged(later: float, flags: tuple[str, ...]) -> None:
    clock = ManualClock()
    summary = watched(FakeGpu(clock, sm_clock_mhz=[(0, 1980), (1.0, later)]), clock)
    assert summary.clock_drift == pytest.approx(later / 1980 - 1, abs=1e-3)
    assert summary.flags == flags


@pytest.mark.parametrize(
    ("bit", "cause"), [(0x8, "hw_slowdown"), (0x20, "sw_thermal"), (0x40, "hw_thermal"), (0x80, "hw_power_brake")]
)
def test_a_single_slowdown_bit_is_throttling(bit: int, cause: str) -> None:
    clock = ManualClock()
    summary = watched(FakeGpu(clock, event_reasons=[(0, 0), (1.0, bit), (1.1, 0)]), clock)
    assert (summary.throttled, summary.throttled_by, summary.flags) == (True, (cause,), ("throttled",))


def test_a_power_cap_is_recorded_but_no_throttling() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, event_reasons=[(0, 0), (0.95, 0x4)], slowdown_ns={"power_cap": 0, "hw_thermal": 5})
    telemetry = Telemetry(gpu, clock=clock)
    telemetry.start(paused=True)
    for _ in range(20):
        telemetry.sample()
        clock.sleep(0.1)
    gpu.counters["power_cap"] = 10**9
    summary = telemetry.stop()
    assert (summary.power_capped_fraction, summary.power_capped_s) == (0.5, 1.0)
    assert (summary.throttled, summary.flags) == (False, ())


def test_a_cumulative_counter_sees_what_the_samples_missed() -> None:
    summary = summarize([], {"hw_thermal": 5, "power_cap": 1}, {"hw_thermal": 6, "power_cap": 9})
    assert (summary.throttled, summary.throttled_by) == (True, ("hw_thermal",))


def test_an_idle_bit_in_a_tenth_of_the_samples_is_flagged() -> None:
    clock = ManualClock()
    assert watched(FakeGpu(clock, event_reasons=[(0, 0), (1.85, 0x1)]), clock).flags == ()
    clock = ManualClock()
    assert watched(FakeGpu(clock, event_reasons=[(0, 0), (1.7, 0x1)]), clock).flags == ("gpu_idle",)


def test_what_was_not_told_is_none() -> None:
    silent = ("sm_clock_mhz", "temperature_c", "power_w", "event_reasons")
    clock = ManualClock()
    summary = watched(FakeGpu(clock, unsupported=silent), clock)
    assert summary.throttled is None
    assert summary.sm_clock_mhz_median is None
    assert summary.temperature_c_start is None
    assert summary.power_capped_fraction is None
    assert summary.flags == ()


def test_without_a_card_there_is_no_thread() -> None:
    telemetry = Telemetry(NoGpu())
    telemetry.start()
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]
    assert telemetry.stop().samples == 0


def until_more_than(count: int, telemetry: Telemetry) -> None:
    deadline = time.monotonic() + 10
    while len(telemetry.samples) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_paused_thread_asks_nothing() -> None:
    telemetry = Telemetry(FakeGpu(time.perf_counter), period_s=0.01)
    telemetry.start()
    until_more_than(0, telemetry)
    telemetry.pause()
    seen = len(telemetry.samples)
    time.sleep(0.1)
    assert len(telemetry.samples) == seen
    telemetry.resume()
    until_more_than(seen, telemetry)
    summary = telemetry.stop()
    assert summary.samples > seen
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


def test_stop_wakes_a_paused_thread() -> None:
    telemetry = Telemetry(FakeGpu(time.perf_counter))
    telemetry.start(paused=True)
    assert telemetry.stop().samples == 0


def test_clocks_are_a_series_for_the_raw_samples() -> None:
    clock = ManualClock(10.0)
    telemetry = Telemetry(FakeGpu(clock), clock=clock)
    telemetry.sample()
    clock.sleep(0.5)
    telemetry.sample()
    assert telemetry.clocks(since_s=10.0) == ([1980.0, 1980.0], [0.0, 0.5])
