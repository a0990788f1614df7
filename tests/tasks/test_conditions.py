"""What is watched around a session's passes on a simulated card, and what goes into the row."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.conditions import Conditions
from tasks.energy import SHARED
from tasks.fake_gpu import FakeGpu
from tasks.job import SampleSeries
from tasks.metric import Missing
from tasks.metrics.energy import Energy
from tasks.row import Row
from tasks.timing import Timings


class Watched:
    """A session that has a card and timings, and nothing else."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.on_cuda, self.row = gpu, True, Row()
        self.step = type("OneCall", (), {"primary": "call"})()
        series = SampleSeries(
            cell_id="c", round=0, result_key="k", measured_in="latency", label="call", values_ms=[1.0], ended_s=[0.001]
        )
        self.timings = Timings(series={("latency", "call"): series}, began={"latency": 0.0})


def conditions(session: Any) -> Conditions:
    made = Conditions.__new__(Conditions)  # the constructor opens the card of the job
    made._session, made._cpu_watch, made._telemetry, made._report, made._summary = session, None, None, None, None
    return made


def test_slow_down_in_the_latency_pass_is_seen() -> None:
    """Its counters count while nobody asks: what they gain before the throughput pass begins counts too."""
    gpu = FakeGpu(lambda: 0.0, slowdown_ns={"hw_thermal": 5})
    session = Watched(gpu)
    watching = conditions(session)
    watching.begin()
    gpu.counters["hw_thermal"] += 900_000_000  # meanwhile, in the latency pass
    watching.watch()
    watching.end()
    assert watching._summary is not None
    assert watching._summary.throttled
    assert watching._summary.flags == ("throttled",)
    assert watching._summary.throttled_by == ("hw_thermal",)


def test_no_slow_down_is_none() -> None:
    session = Watched(FakeGpu(lambda: 0.0, slowdown_ns={"hw_thermal": 5}))
    watching = conditions(session)
    watching.begin()
    watching.watch()
    watching.end()
    assert watching._summary is not None
    assert watching._summary.throttled is False


def test_clocks_stand_beside_the_raw_samples() -> None:
    session = Watched(FakeGpu(lambda: 0.0, sm_clock_mhz=1755.0))
    watching = conditions(session)
    watching.begin()
    watching.watch()
    watching.end()
    kept = session.timings.series["latency", "call"]
    assert set(kept.sm_clock_mhz) == {1755.0}
    assert len(kept.clock_s) == len(kept.sm_clock_mhz)
    assert kept.values_ms == [1.0]


@pytest.mark.parametrize(("reason", "flags"), [(SHARED, ["foreign_gpu_process"]), ("mig", [])])
def test_foreign_work_found_by_the_energy_meter_is_flagged(reason: str, flags: list[str]) -> None:
    session: Any = Watched(FakeGpu(lambda: 0.0))
    session.job = type("Job", (), {"idle_power_w": None, "idle_power_missing": "counter_stuck"})()
    session.timings.energy = Missing(reason=reason)
    idle = Energy().collect(session)["power_w_idle"]
    assert session.row["flags"] == flags
    assert idle == Missing(reason="the idle power is not known: counter_stuck")
