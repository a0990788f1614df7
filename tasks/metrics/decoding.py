"""Whole requests of generation, what a token of KV cache costs, and what looking for the end of all sequences costs.

How the cost of a stop check is measured stands in `tasks/workloads/_decode_costs.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase
from tasks.statistics import mean, standard_deviation
from tasks.workloads._decode_cache import stored_bytes

if TYPE_CHECKING:
    from tasks.session import Session
    from tasks.workloads.decode import DecodeStep

_REQUESTS = ("request_ms_mean", "request_ms_std", "request_ms_min", "request_ms_max")


class Decoding(Metric):
    name = "decoding"
    columns = (
        Column(name="request_ms_mean", type="float", doc="whole request, synchronised at its first token and its end"),
        Column(name="request_ms_std", type="float", doc="standard deviation over requests"),
        Column(name="request_ms_min", type="float", doc="least"),
        Column(name="request_ms_max", type="float", doc="greatest"),
        Column(name="decode_steps", type="int", doc="steps after the first token in a request, superfluous ones too"),
        Column(name="superfluous_steps", type="int", doc="of decode_steps, those after every sequence had ended"),
        Column(name="kv_cache_bytes_per_token", type="float", doc="kv_cache_bytes over cached tokens of all sequences"),
        Column(
            name="kv_cache_host_bytes", type="int", doc="of kv_cache_bytes, those in host memory, not on the device"
        ),
        Column(name="stop_check_ms", type="float", doc="what the stop check adds to a step; below 0 only by noise"),
        Column(name="stop_check_wait_ms", type="float", doc="host time for the flag per step, hidden or not"),
        Column(name="stop_check_hidden_share", type="float", doc="1 - stop_check_ms over the naive check's"),
    )

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def end(self, phase: Phase, session: Session) -> None:
        if phase is not Phase.THROUGHPUT or session.job.cell.workload.kind != "decode":
            return
        step: DecodeStep = session.step  # type: ignore[assignment]
        self._found = {
            "decode_steps": step.steps_per_call,
            "superfluous_steps": step.superfluous,
            **_cache(session, step),
            **(step.check_costs or {}),
        }

    def collect(self, session: Session) -> dict[str, Any]:
        decodes = session.job.cell.workload.kind == "decode"
        reason = "the throughput pass was not reached" if decodes else "not a generating workload"
        missing = {column.name: Missing(reason=reason) for column in self.columns}
        values = session.timings.throughput.calls_ms if decodes and session.timings else []
        return {**missing, **self._found, **(_requests(values) if values else {})}


def _requests(values: list[float]) -> dict[str, Any]:
    deviation = standard_deviation(values)
    figures = (mean(values), Missing(reason="a single request") if deviation is None else deviation)
    return dict(zip(_REQUESTS, (*figures, min(values), max(values)), strict=True))


def _cache(session: Session, step: DecodeStep) -> dict[str, Any]:
    columns = ("kv_cache_bytes_per_token", "kv_cache_host_bytes")
    held = stored_bytes(step.cache)
    if not held:
        return dict.fromkeys(columns, Missing(reason="this stack keeps no KV cache"))
    sequences = int(session.job.cell.workload["batch_size"])
    cached = sequences * (step.prompt_tokens + step.steps)  # the last token is never fed back
    on_host = held.get("cpu", 0) if session.on_cuda else Missing(reason="the device is the host")
    return {"kv_cache_bytes_per_token": sum(held.values()) / cached, "kv_cache_host_bytes": on_host}
