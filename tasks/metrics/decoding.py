"""Whole requests of generation, what a token of KV cache costs, and what looking for the end of all sequences costs.

The cost of a stop check is what it adds to a request, not what the host spends on it: waiting that the device does not
notice is free. Three kinds of whole requests take turns, synchronised only at their ends: without a check, told where
to end; with the stack's check; and with the naive one (`sync-check`), which reads every step's flag at once. Their
differences' medians, over the steps that the request needs, are the cost per token; a superfluous step counts as cost.
The device works out the flag in all three.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing, Phase
from tasks.statistics import mean, median, standard_deviation
from tasks.workload import END, SETUP
from tasks.workloads._decode_cache import stored_bytes
from tasks.workloads._decode_checks import NoCheck, StopCheck, SyncCheck

if TYPE_CHECKING:
    from tasks.session import Session
    from tasks.workloads.decode import DecodeStep

TURNS = 9
BUDGET_S = 10.0
RESOLVED = 0.005  # a naive check below this share of a step is noise: what share of it was hidden cannot be said

_REQUESTS = ("request_ms_mean", "request_ms_std", "request_ms_min", "request_ms_max")
_CHECK = ("stop_check_ms", "stop_check_wait_ms", "stop_check_hidden_share")


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
        needed = step.ledger.longest - 1
        self._found = {
            "decode_steps": step.steps_per_call,
            "superfluous_steps": step.steps_per_call - needed,
            **_cache(session, step),
            **_stop_check(session, step),
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


def _stop_check(session: Session, step: DecodeStep) -> dict[str, Any]:
    if isinstance(step.check, NoCheck):
        return dict.fromkeys(_CHECK, Missing(reason="this stack never looks whether sequences have ended"))
    costs = measure_costs(session, step)
    if not session.on_cuda:
        nothing = Missing(reason="no device works beside the host, nothing can be hidden: see stop_check_wait_ms")
        costs |= {"stop_check_ms": nothing, "stop_check_hidden_share": nothing}
    return costs


def measure_costs(session: Session, step: DecodeStep) -> dict[str, Any]:
    """The columns of a stop check, from requests of the three kinds in turns; differences are taken within a turn."""
    own, naive = step.check, SyncCheck()
    needed = step.ledger.longest - 1
    kinds: list[tuple[StopCheck, int | None]] = [(NoCheck(), needed + 1), (naive, None), (own, None)]
    naive_costs: list[float] = []
    own_costs: list[float] = []
    waited: list[float] = []
    oracle = 0.0
    began = time.perf_counter()
    for turn in range(TURNS):
        taken = []
        for check, limit in kinds:
            with step.checking(check, limit):
                taken.append(_request_s(session, step, turn) / needed)
        if turn == 1:  # the first turn finds whatever the passes before have left
            naive_costs, own_costs, waited = [], [], []
        oracle = taken[0]
        naive_costs.append(taken[1] - taken[0])
        own_costs.append(taken[2] - taken[0])
        waited.append(own.waited_s / max(step.steps, 1))
        if time.perf_counter() - began > BUDGET_S:
            break
    return {
        "stop_check_ms": 1e3 * median(own_costs),
        "stop_check_wait_ms": 1e3 * median(waited),
        "stop_check_hidden_share": _hidden(own_costs, naive_costs, oracle),
    }


def _hidden(own: list[float], naive: list[float], step_s: float) -> float | Missing:
    """Share of the naive check's cost that this one saves; null unless that cost shows in all turns but one."""
    if len(naive) < 4 or sum(cost > 0 for cost in naive) < len(naive) - 1 or median(naive) < RESOLVED * step_s:
        return Missing(reason="what the naive check costs does not stand out here: nothing to hide")
    return 1 - median(own) / median(naive)


def _request_s(session: Session, step: DecodeStep, index: int) -> float:
    """Seconds of one request from its prompt to its last step, synchronised at these two points only."""
    times: list[float] = []

    def mark(label: str) -> None:
        if label in (SETUP, END):
            session.synchronize()
            times.append(time.perf_counter())

    step.run(index, mark)
    return times[1] - times[0]
