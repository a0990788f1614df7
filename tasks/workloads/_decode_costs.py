"""What looking for the end of all sequences costs.

The cost of a stop check is what it adds to a request, not what the host spends on it: waiting that the device does not
notice is free. Three kinds of whole requests take turns, synchronised only at their ends: without a check, told where
to end; with the stack's check; and with the naive one (`sync-check`), which reads every step's flag at once. Their
differences' medians, over the steps that the request needs, are the cost per token; a superfluous step counts as cost.
The device works out the flag in all three. Where the device is the host nothing can be hidden: there only the time
spent for the flag is measured, in requests of the stack's own check.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

from tasks.metric import Missing
from tasks.workload import END, SETUP
from tasks.workloads._decode_checks import NoCheck, StopCheck, SyncCheck

if TYPE_CHECKING:
    from tasks.session import Session
    from tasks.workloads.decode import DecodeStep

TURNS = 9
TURNS_WAITING = 3
BUDGET_S = 10.0  # and never more than twice the latency pass
RESOLVED = 0.005  # a naive check below this share of a step is noise: what share of it was hidden cannot be said
COLUMNS = ("stop_check_ms", "stop_check_wait_ms", "stop_check_hidden_share")


def check_costs(session: Session, step: DecodeStep) -> dict[str, Any]:
    """The columns of the step's own stop check."""
    if isinstance(step.check, NoCheck):
        return dict.fromkeys(COLUMNS, Missing(reason="this stack never looks whether sequences have ended"))
    budget_s = min(BUDGET_S, 2 * session.profile.latency_s)
    return measure_costs(session, step, budget_s) if session.on_cuda else measure_waiting(session, step, budget_s)


def measure_waiting(session: Session, step: DecodeStep, budget_s: float) -> dict[str, Any]:
    """Host time for the flag, from requests of the stack's own check."""
    nothing = Missing(reason="no device works beside the host, nothing can be hidden: see stop_check_wait_ms")
    waited: list[float] = []
    began = now = time.perf_counter()
    while len(waited) < TURNS_WAITING and (not waited or _fits(began, now, budget_s)):
        now = time.perf_counter()
        _request_s(session, step, len(waited))
        waited.append(step.check.waited_s / max(step.steps, 1))
    return {
        "stop_check_ms": nothing, "stop_check_wait_ms": 1e3 * median(waited), "stop_check_hidden_share": nothing,
    }  # fmt: skip


def _fits(began: float, last: float, budget_s: float) -> bool:
    """Whether one more turn as long as that since `last` ends within the budget."""
    now = time.perf_counter()
    return now - began + (now - last) <= budget_s


def measure_costs(session: Session, step: DecodeStep, budget_s: float = BUDGET_S) -> dict[str, Any]:
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
        taken, last = [], time.perf_counter()
        for check, limit in kinds:
            with step.checking(check, limit):
                taken.append(_request_s(session, step, turn) / needed)
        if turn == 1:  # the first turn finds whatever the passes before have left
            naive_costs, own_costs, waited = [], [], []
        oracle = taken[0]
        naive_costs.append(taken[1] - taken[0])
        own_costs.append(taken[2] - taken[0])
        waited.append(own.waited_s / max(step.steps, 1))
        if not _fits(began, last, budget_s):
            break
    return {
        "stop_check_ms": 1e3 * median(own_costs),
        "stop_check_wait_ms": 1e3 * median(waited),
        "stop_check_hidden_share": _hidden(own_costs, naive_costs, oracle),
    }


def _hidden(own: list[float], naive: list[float], step_s: float) -> float | Missing:
    """Share of the naive check's cost that this one saves; null unless that cost shows in all turns but one."""
    if len(naive) < 4:
        return Missing(reason="too few requests in the time allowed to say whether the naive check costs anything")
    if sum(cost > 0 for cost in naive) < len(naive) - 1 or median(naive) < RESOLVED * step_s:
        return Missing(reason="what the naive check costs does not stand out here: nothing to hide")
    return 1 - median(own) / median(naive)


def _request_s(session: Session, step: DecodeStep, index: int) -> float:
    """Seconds of one request from its prompt to its last step, synchronised at these two points only."""
    times: list[float] = []

    def mark(label: str) -> None:
        if label in (SETUP, END):
            session.synchronize()
            times.append(time.perf_counter())

    session.feeder.look()
    step.run(index, mark)
    return times[1] - times[0]
