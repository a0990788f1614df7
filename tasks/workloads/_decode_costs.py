"""What looking for the end of all sequences costs.

The cost of a stop check is what it adds to a request, not what the host spends on it: waiting that the device does not
notice is free. Three kinds of requests of at most `STEPS` steps take turns, each first in a third of them, synchronised
only at their ends: without a check, told where to end; with the stack's check; and with the naive one (`sync-check`),
which reads every step's flag at once. Their differences' medians, over the steps that the request needs, are the cost
per token; a superfluous step at the end of a whole request counts as cost. The device works out the flag in all three.
Where the device is the host nothing can be hidden: there only the time spent for the flag is measured, in requests of
the stack's own check.
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
TURNS_TOLD = 4  # fewer say nothing
TURNS_WAITING = 3
STEPS = 32  # more turns tell more than longer requests
BUDGET_S = 10.0  # and never more than four times the latency pass
RESOLVED = 0.005  # a naive check below this share of a step is noise: what share of it was hidden cannot be said
COLUMNS = ("stop_check_ms", "stop_check_wait_ms", "stop_check_hidden_share")


def check_costs(session: Session, step: DecodeStep) -> dict[str, Any]:
    """The columns of the step's own stop check."""
    if isinstance(step.check, NoCheck):
        return dict.fromkeys(COLUMNS, Missing(reason="this stack never looks whether sequences have ended"))
    budget_s = min(BUDGET_S, 4 * session.profile.latency_s)
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
    own, naive, needed = step.check, SyncCheck(), step.ledger.longest - 1
    steps = min(needed, STEPS)
    limit = steps + 1 if steps < needed else None
    kinds: list[tuple[StopCheck, int | None]] = [(NoCheck(), steps + 1), (naive, limit), (own, limit)]
    costs: list[tuple[float, float, float]] = []  # of a turn: a step without a check, what the naive and our own add
    waited: list[float] = []
    began = time.perf_counter()
    for turn in range(TURNS):
        taken, last = dict.fromkeys(range(len(kinds)), 0.0), time.perf_counter()
        for place in range(len(kinds)):
            kind = (turn + place) % len(kinds)
            with step.checking(*kinds[kind]):
                taken[kind] = _request_s(session, step, turn) / steps
                if kinds[kind][0] is own:
                    waited.append(own.waited_s / max(step.steps, 1))
        costs.append((taken[0], taken[1] - taken[0], taken[2] - taken[0]))
        if turn == 1:  # the first turn finds whatever the passes before have left
            del costs[0], waited[0]
        if not _fits(began, last, budget_s):
            break
    few: Any = Missing(reason=f"fewer than {TURNS_TOLD} turns of requests in the time allowed")
    columns: dict[str, Any] = {
        "stop_check_ms": few, "stop_check_wait_ms": 1e3 * median(waited), "stop_check_hidden_share": few,
    }  # fmt: skip
    if len(costs) >= TURNS_TOLD:
        plain, naive_costs, own_costs = zip(*costs, strict=True)
        own_s = median(own_costs) + (step.superfluous * median(plain) / needed if limit else 0.0)
        columns["stop_check_ms"] = 1e3 * own_s
        columns["stop_check_hidden_share"] = _hidden(own_s, list(naive_costs), median(plain))
    return columns


def _hidden(own_s: float, naive: list[float], step_s: float) -> float | Missing:
    """Share of the naive check's cost that this one saves; null unless that cost shows in all turns but one."""
    if sum(cost > 0 for cost in naive) < len(naive) - 1 or median(naive) < RESOLVED * step_s:
        return Missing(reason="what the naive check costs does not stand out here: nothing to hide")
    return 1 - own_s / median(naive)


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
