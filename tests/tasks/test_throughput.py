"""Whether the passes agree, as the throughput metric sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tasks.job import SampleSeries
from tasks.metrics.throughput import Throughput
from tasks.row import Row
from tasks.timing import Timings


def flags(
    tokens_ms: list[float],
    requests: int,
    rate: float,
    units_per_call: float,
    device_ms: list[float] | None = None,
    issue_share: float = 0.01,
) -> list[str]:
    timings = Timings()
    for measured_in, tokens in (("latency", tokens_ms), ("device", device_ms or [])):
        for label, values in (("token", tokens), ("first_token", [1.0] * requests if tokens else [])):
            if values:
                timings.series[measured_in, label] = SampleSeries(
                    cell_id="c", round=0, result_key="", measured_in=measured_in, label=label, values_ms=values,
                    ended_s=[],
                )  # fmt: skip
    timings.throughput.units, timings.throughput.seconds = rate, 1.0
    step = SimpleNamespace(primary="token", units_per_call=units_per_call, unit="token")
    session: Any = SimpleNamespace(timings=timings, step=step, row=Row())
    timings.issue_shares = [issue_share] * 3
    assert Throughput().collect(session)["throughput_per_s"] == rate
    return list(session.row["flags"])


@pytest.mark.parametrize("requests", [1, 2, 5])
@pytest.mark.parametrize(
    ("rate", "found"),
    [
        (3200.0 * 1.2, []),  # without a synchronisation for every token it may be faster
        (3200.0, []),
        (3200.0 / 1.05, ["passes_disagree"]),
        (3200.0 / 1.2, ["passes_disagree", "passes_contradict"]),
    ],
)
def test_requests(requests: int, rate: float, found: list[str]) -> None:
    """32 sequences, 399 further tokens in 10 ms each: 3200 tokens a second."""
    assert flags([10.0] * 399 * requests, requests, rate, 32 * 399) == found


@pytest.mark.parametrize(
    ("rate", "found"), [(100.0, []), (80.0, ["passes_disagree", "passes_contradict"])]
)  # one unit in 10 ms
def test_single_calls(rate: float, found: list[str]) -> None:
    assert flags([10.0] * 50, 0, rate, 1.0) == found


@pytest.mark.parametrize(
    ("device_ms", "issue_share", "found"),
    [
        (10.0, 0.01, []),
        (10.15, 0.01, []),  # events cost something
        (10.5, 0.01, ["device_disagrees"]),
        (9.0, 0.01, []),  # the host did not keep up
        (10.5, 0.99, []),  # its time is the host's
    ],
)
@pytest.mark.parametrize("requests", [1, 3])
def test_calls_in_a_row_and_the_device(requests: int, device_ms: float, issue_share: float, found: list[str]) -> None:
    tokens = [10.1] * 63 * requests
    assert flags(tokens, requests, 100.0, 63, [device_ms] * 63 * requests, issue_share) == found
