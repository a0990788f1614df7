"""What a stop check costs and how much of it is hidden, measured beside the requests that it belongs to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tasks.job import PROFILES
from tasks.metric import Missing
from tasks.metrics.decoding import Decoding
from tasks.timing import Passes
from tasks.workloads._decode_checks import StopCheck, SyncCheck
from tasks.workloads._decode_costs import _hidden, check_costs, measure_costs

AXES = {"batch_size": 4, "prompt_tokens": 8, "new_tokens": 12}


class TestCosts:
    def test_of_a_stop_check(self, bench: Any) -> None:
        """The naive check against itself, and what the metric says where nobody looks."""
        job = bench.job(bench.cell("decode", "sync-check", stop="eos", **AXES), profile=bench.INSTANT)
        with bench.measured(job) as (session, metrics):
            row = metrics["decoding"].collect(session)
            assert row["decode_steps"] == session.step.ledger.longest - 1
            assert row["superfluous_steps"] == 0
            assert row["request_ms_min"] <= row["request_ms_mean"] <= row["request_ms_max"]
            assert "see stop_check_wait_ms" in row["stop_check_ms"].reason, "nothing works beside a CPU"
            assert 0 < row["stop_check_wait_ms"] < row["request_ms_mean"] / row["decode_steps"]
        with bench.measured(bench.job(bench.cell("decode", **AXES), profile=bench.INSTANT)) as (session, metrics):
            row = metrics["decoding"].collect(session)
            assert "never looks" in row["stop_check_ms"].reason

    def test_slow_check_costs_what_it_sleeps(self, bench: Any) -> None:
        class Sleepy(SyncCheck):
            def issued(self, column: int) -> bool:
                time.sleep(0.02)
                return super().issued(column)

        job = bench.job(bench.cell("decode", "sync-check", stop="eos", **AXES))
        with bench.live(job) as session:
            session.step.check = Sleepy()
            row = measure_costs(session, session.step, budget_s=1e6)
        # one more look than there are steps: after the first token
        assert row["stop_check_ms"] > 15

    @pytest.mark.parametrize(("budget_s", "requests"), [(1e6, 3), (0.0, 1)])
    def test_on_a_cpu_only_what_fills_a_column_is_measured_and_shortly(
        self, bench: Any, monkeypatch: pytest.MonkeyPatch, budget_s: float, requests: int
    ) -> None:
        """Three requests of the stack's own check; one, where they are long."""
        asked: list[StopCheck] = []
        job = bench.job(bench.cell("decode", "sync-check", stop="eos", **AXES))
        with bench.live(job) as session:
            run = session.step.run

            def counted(index: int, mark: Callable[[str], None]) -> None:
                asked.append(session.step.check)
                run(index, mark)

            session.step.run = counted
            monkeypatch.setattr("tasks.workloads._decode_costs.BUDGET_S", 1e6)
            monkeypatch.setitem(PROFILES, "quick", replace(PROFILES["quick"], latency_s=budget_s))
            row = check_costs(session, session.step)
            assert set(asked) == {session.step.check}
        assert len(asked) == requests
        assert row["stop_check_wait_ms"] > 0
        assert "nothing can be hidden" in row["stop_check_ms"].reason

    def test_turns_end_within_the_budget(self, bench: Any) -> None:
        job = bench.job(bench.cell("decode", "sync-check", stop="eos", **AXES))
        with bench.live(job) as session:
            run, calls = session.step.run, []

            def slow(index: int, mark: Callable[[str], None]) -> None:
                calls.append(index)
                time.sleep(0.2)
                run(index, mark)

            session.step.run = slow
            row = measure_costs(session, session.step, budget_s=1.0)
        assert len(calls) == 3, "a second turn would not fit"
        assert "fewer than 4 turns" in row["stop_check_hidden_share"].reason
        assert row["stop_check_ms"].reason == row["stop_check_hidden_share"].reason

    def test_long_requests_are_cut_for_more_turns(self, bench: Any) -> None:
        """Kinds take turns at being first, none does more than 32 steps, and what comes at the end is still counted."""
        job = bench.job(bench.cell("decode", "sync-check:every=32", stop="eos", **{**AXES, "new_tokens": 60}))
        with bench.live(job) as session:
            step, asked = session.step, []
            run = step.run

            def counted(index: int, mark: Callable[[str], None]) -> None:
                run(index, mark)
                asked.append((type(step.check).__name__, step.check is own, step.steps))

            step.run, own = counted, step.check
            row = measure_costs(session, step, budget_s=1e6)
            assert (step.ledger.longest, step.steps_per_call, step.superfluous) == (54, 59, 6)
        assert {steps for _, _, steps in asked} == {32}
        assert [name for name, _, _ in asked[::3]] == ["NoCheck", "SyncCheck", "SyncCheck"] * 3
        assert [ours for _, ours, _ in asked[::3]] == [False, False, True] * 3
        assert isinstance(row["stop_check_ms"], float)

    def test_costs_are_measured_within_the_latency_pass(self, bench: Any) -> None:
        """That is in `measure_s`, and before anybody samples the card's clocks."""
        job = bench.job(bench.cell("decode", "sync-check", **AXES), profile=bench.INSTANT)
        with bench.live(job) as session:
            passes = Passes(session)
            passes.warm_up()
            assert session.step.check_costs is None
            passes.latency()
            assert session.step.check_costs["stop_check_wait_ms"] > 0

    def test_hidden_share_needs_a_cost_that_stands_out(self) -> None:
        clear, noise = [0.2, 0.21, 0.19, 0.2, 0.22], [0.2, -0.1, 0.3, -0.2, 0.1]
        assert _hidden(0.05, clear, 1.0) == pytest.approx(0.75)
        assert _hidden(0.2, clear, 1.0) == 0
        for costs, step_s in ((noise, 1.0), (clear, 100.0)):
            assert isinstance(_hidden(0.05, costs, step_s), Missing)

    def test_before_anything_nothing_is_known(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill")), calls=0) as session:
            assert {value.reason for value in Decoding().collect(session).values()} == {"not a generating workload"}
