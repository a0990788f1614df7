"""Latency of the primary segment: distribution on the host, median on the device, and a request's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing
from tasks.statistics import mean, median, minimum_samples, quantile, standard_deviation, tail_counts

if TYPE_CHECKING:
    from tasks.session import Session

PERCENTILES = (50, 95, 99)
_OF_THE_DEVICE = ("device_ms_p50", "device_ms_p50_n", "issue_share")
OVER_ROUNDS = Missing(reason="an interval is one over rounds: see the table")


def _float(name: str, doc: str, interval: bool = False) -> Column:
    return Column(name=name, type="float", doc=doc, interval=interval)


class Latency(Metric):
    name = "latency"
    columns = (
        _float("latency_ms_mean", "mean host time of one primary segment, synchronised", interval=True),
        _float("latency_ms_std", "standard deviation over samples"),
        _float("latency_ms_min", "least"),
        _float("latency_ms_max", "greatest; outliers are kept"),
        _float("latency_ms_p50", "median: the primary figure", interval=True),
        _float("latency_ms_p95", "null below 130 samples"),
        _float("latency_ms_p99", "null below 662 samples"),
        _float("latency_halfwidth", "relative half-width of the median's interval within this run; steers stopping"),
        Column(name="outliers_mild", type="int", doc="samples beyond 1.5 interquartile ranges"),
        Column(name="outliers_severe", type="int", doc="samples beyond 3 interquartile ranges"),
        _float("device_ms_p50", "median time between events on the stream", interval=True),
        _float(
            "issue_share", "host time to issue a segment over its whole time: near 1, the device waits for the host"
        ),
        _float("time_to_first_token_ms", "median, prompt to first token, synchronised"),
        _float("time_per_output_token_ms", "median of the further tokens, synchronised"),
        _float("request_ms", "first token and all further ones"),
    )

    def collect(self, session: Session) -> dict[str, Any]:
        timings, step = session.timings, session.step
        values = timings.values("latency", step.primary) if timings and step else []
        if timings is None or step is None or not values:
            return {column.name: Missing(reason="the latency pass was not reached") for column in self.columns}
        result: dict[str, Any] = {
            "latency_ms_mean": mean(values),
            "latency_ms_mean_n": len(values),
            "latency_ms_std": standard_deviation(values),
            "latency_ms_min": min(values),
            "latency_ms_max": max(values),
            "latency_halfwidth": timings.halfwidth or Missing(reason="too few samples for an interval"),
            "latency_ms_p50_n": len(values),
        }
        for percentile in PERCENTILES:
            result[f"latency_ms_p{percentile}"] = _percentile(values, percentile, timings.block)
        result["outliers_mild"], result["outliers_severe"] = tail_counts(values)
        bounds = [f"{column.name}_{end}" for column in self.columns if column.interval for end in ("lo", "hi")]
        result |= dict.fromkeys(bounds, OVER_ROUNDS)
        return {**result, **_device(session), **_request(session)}


def _percentile(values: list[float], percentile: int, block: int) -> float | Missing:
    if percentile == 50:
        return median(values)
    if block > 1:
        return Missing(reason="samples are block means")
    least = minimum_samples(percentile)
    if len(values) < least:
        return Missing(reason=f"{len(values)} samples, {least} are needed")
    return quantile(values, percentile / 100)


def _device(session: Session) -> dict[str, Any]:
    assert session.timings is not None and session.step is not None
    if not session.on_cuda:
        return dict.fromkeys(_OF_THE_DEVICE, Missing(reason="no device stream on a CPU"))
    values = session.timings.values("device", session.step.primary)
    if not values:
        return dict.fromkeys(_OF_THE_DEVICE, Missing(reason="the device pass was not reached"))
    if session.timings.launch_bound:
        session.row.flag("launch_bound")
    share = median(session.timings.issue_shares)
    return {"device_ms_p50": median(values), "device_ms_p50_n": len(values), "issue_share": share}


def _request(session: Session) -> dict[str, Any]:
    assert session.timings is not None
    first = session.timings.values("latency", "first_token")
    tokens = session.timings.values("latency", "token")
    if not first:
        missing = Missing(reason="not a generating workload")
        return dict.fromkeys(("time_to_first_token_ms", "time_per_output_token_ms", "request_ms"), missing)
    return {
        "time_to_first_token_ms": median(first),
        "time_per_output_token_ms": median(tokens),
        "request_ms": (sum(first) + sum(tokens)) / len(first),
    }
