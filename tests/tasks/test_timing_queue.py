"""Chunks that are queued, on a simulated device: calls take device time, issuing them takes host time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import timing
from tasks.cores import Feeder
from tasks.timing import MOST_DRY, Passes

UNITS = 7.0


class Simulation:
    """A clock, a stream that works through calls in turn, and a step of one call."""

    boundaries: dict[str, bool] = {}
    primary = "call"
    units_per_call = UNITS
    energy_units_per_call = None

    def __init__(self, device_s: float, issue_s: float, ramp_s: float) -> None:
        self.device_s, self.issue_s, self.ramp_s = device_s, issue_s, ramp_s
        self.now = self.free_at = 0.0

    def perf_counter(self) -> float:
        return self.now

    def run(self, index: int, mark: Any) -> None:
        # what must be issued before the device can begin, and then the rest
        self.free_at = max(self.free_at, self.now + self.ramp_s) + self.device_s
        self.now += self.issue_s

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def event(self) -> Any:
        simulation, at = self, []

        def record() -> None:
            at.append(simulation.free_at)

        def wait() -> None:
            simulation.now = max(simulation.now, at[0])

        return SimpleNamespace(record=record, synchronize=wait, query=lambda: simulation.now >= at[0])


def passes(monkeypatch: pytest.MonkeyPatch, simulation: Simulation, share: float) -> Passes:
    monkeypatch.setattr(torch.cuda, "Event", simulation.event)
    monkeypatch.setattr(timing.time, "perf_counter", simulation.perf_counter)
    profile = SimpleNamespace(throughput_s=0.5)
    session: Any = SimpleNamespace(
        step=simulation,
        on_cuda=True,
        meter=None,
        profile=profile,
        synchronize=simulation.synchronize,
        timings=None,
        feeder=Feeder(),
    )
    made = Passes(session)
    made._seconds_per_call = simulation.device_s
    made.timings.issue_shares = [share]
    return made


@pytest.mark.parametrize("device_s", [0.003, 0.021, 0.3])
def test_the_device_never_waits_between_chunks(monkeypatch: pytest.MonkeyPatch, device_s: float) -> None:
    simulation = Simulation(device_s, issue_s=0.5 * device_s, ramp_s=0.1 * device_s)
    made = passes(monkeypatch, simulation, share=0.5)
    made.throughput()
    result = made.timings.throughput
    assert result.per_s == pytest.approx(UNITS / device_s, rel=1e-6)
    assert result.units == UNITS * result.calls
    assert result.seconds >= 0.5 or result.calls > 0


def test_a_device_that_waits_for_launches_is_not_queued_for(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(0.004, issue_s=0.005, ramp_s=0.0)
    made = passes(monkeypatch, simulation, share=0.99)
    made.throughput()
    assert made._queued is None
    assert made.timings.throughput.per_s == pytest.approx(UNITS / 0.005, rel=0.2)


def test_a_queue_that_runs_dry_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host was fast enough in the latency pass, and is not any more."""
    simulation = Simulation(0.004, issue_s=0.009, ramp_s=0.0)
    made = passes(monkeypatch, simulation, share=0.5)
    made.throughput()
    assert made._dry == MOST_DRY
    assert made.timings.throughput.per_s == pytest.approx(UNITS / 0.009, rel=0.2)
