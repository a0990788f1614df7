"""Lines and estimates of the progress view."""

from __future__ import annotations

import io
from typing import Any

import pytest

from orchestrator.progress import Progress, duration, milliseconds


def row(**changes: Any) -> dict[str, Any]:
    return {
        "outcome": "ok", "model": "pocket", "workload_point": "prefill[batch_size=1]", "optimization": "bf16",
        "round": 1, "hardware": "h200", "latency_ms_p50": 12.34, **changes,
    }  # fmt: skip


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(36, stream) as progress:
        progress.finished("node/gpu0", row(), 5.0)
        progress.finished(None, row(outcome="oom", latency_ms_p50=None, reason="too large"))
    assert stream.getvalue().splitlines() == [
        "[ 1/36] ok   pocket prefill[batch_size=1] bf16 round 1 h200 12.3 ms",
        "[ 2/36] oom  pocket prefill[batch_size=1] bf16 round 1 h200: too large",
    ]


def test_time_left_is_shared_by_the_slots() -> None:
    progress = Progress(11, io.StringIO())
    assert progress.seconds_left() is None
    progress.finished(None, row(), 4.0)
    for slot in ("a", "b"):
        progress.slot(slot, "cpu", "measuring")
    assert progress.seconds_left() == pytest.approx(20.0)


def test_live_view_gives_the_terminal_back() -> None:
    stream = io.StringIO()
    with Progress(2, stream, live=True) as progress:
        progress.slot("node/cpu", "cpu", "starting")
        progress.finished("node/cpu", row(), 1.0)
        progress.say("a message [with brackets]")
    assert "a message [with brackets]" in stream.getvalue()
    progress.stop()


@pytest.mark.parametrize(
    ("value", "text"), [(123.4, "123 ms"), (12.34, "12.3 ms"), (1.234, "1.23 ms"), (0.1234, "0.123 ms")]
)
def test_three_digits(value: float, text: str) -> None:
    assert milliseconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(45, "45 s"), (720, "12 min"), (11100, "3 h 05 min")])
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text
