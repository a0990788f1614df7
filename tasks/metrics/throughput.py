"""Throughput: units over the seconds of the chunks that did them, synchronised only around chunks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing
from tasks.statistics import mean

if TYPE_CHECKING:
    from tasks.session import Session

# Beyond this the passes do not describe the same thing (measurement protocol, section Passes).
AGREEMENT = 0.02
# Beyond this something disturbed one of them, and neither may decide a verdict.
CONTRADICTION = 0.10


class Throughput(Metric):
    name = "throughput"
    columns = (
        Column(name="throughput_per_s", type="float", doc="units per second; for decode after the first token"),
        Column(name="throughput_unit", type="string", doc="token, image, sample or step"),
    )

    def collect(self, session: Session) -> dict[str, Any]:
        timings, step = session.timings, session.step
        rate = timings.throughput.per_s if timings else None
        if timings is None or step is None or rate is None:
            return {column.name: Missing(reason="the throughput pass was not reached") for column in self.columns}
        self._compare(session, rate)
        return {"throughput_per_s": rate, "throughput_unit": step.unit}

    def _compare(self, session: Session, rate: float) -> None:
        """The latency pass adds a synchronisation per segment, so it may be slower, never faster.

        Where the device is never without work, its own time per segment should be that of calls in a row. These were
        seen to be up to 9 % faster in some processes, at the same clock and with as much more power.
        """
        assert session.timings is not None
        synchronised = _per_s(session, "latency")
        if synchronised > rate * (1 + AGREEMENT):
            session.row.flag("passes_disagree")
        if synchronised > rate * (1 + CONTRADICTION):
            session.row.flag("passes_contradict")
        if not session.timings.launch_bound and rate > _per_s(session, "device") * (1 + AGREEMENT):
            session.row.flag("device_disagrees")


def _per_s(session: Session, measured_in: str) -> float:
    """Units per second if every segment takes what that pass found; NaN, never more, where it found nothing."""
    assert session.timings is not None and session.step is not None
    values = session.timings.values(measured_in, session.step.primary)
    if not values:
        return math.nan
    requests = len(session.timings.values(measured_in, "first_token"))
    per_call = len(values) / requests if requests else 1.0
    return session.step.units_per_call / (mean(values) / 1e3 * per_call)
