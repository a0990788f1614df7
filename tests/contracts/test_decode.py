"""Every decode loop gives the tokens of the plain one, stops where the sequences end, and asks nothing of the host."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.job import PROFILES
from tasks.metric import Missing
from tasks.metrics.decoding import Decoding
from tasks.registry import optimizations, workloads
from tasks.row import Row
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported
from tasks.timing import Passes
from tasks.workloads._decode_cache import bytes_of, stored_bytes
from tasks.workloads._decode_checks import NoCheck, StopCheck, SyncCheck
from tasks.workloads._decode_costs import _hidden, check_costs, measure_costs
from tasks.workloads._decode_ledger import Ledger, stop_lengths
from tasks.workloads._decode_steps import Sampler

LOOPS = sorted(name for name, technique in optimizations().items() if technique.family == "decode-loop")
# Those for CUDA run here too, without streams: what they conclude from the flags is the same.
STACKS = [*LOOPS, "sync-check:every=3"]
CACHES = ["dynamic-cache", "static-cache", "no-cache"]
SAMPLINGS = ["greedy", "multinomial"]
AXES = {"batch_size": 4, "prompt_tokens": 8, "new_tokens": 12}


def ignore(_label: str) -> None:
    return


def tokens_of(bench: Any, stack: str, index: int = 0, **axes: Any) -> Any:
    with bench.live(bench.job(bench.cell("decode", f"fp32+{stack}", **{**AXES, **axes})), calls=0) as session:
        session.step.run(index, ignore)
        assert session.step.problems() == []
        return session.step.ledger.result().clone()


@pytest.mark.usefixtures("torch_settings")
class TestSameTokens:
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("stop", ["none", "eos"])
    @pytest.mark.parametrize("stack", STACKS)
    def test_as_the_plain_loop(self, bench: Any, stack: str, stop: str, sampling: str) -> None:
        axes = {"stop": stop, "sampling": sampling}
        for index in (0, 1):
            plain = tokens_of(bench, "static-cache", index, **axes)
            assert tokens_of(bench, f"static-cache+{stack}", index, **axes).equal(plain)

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("cache", CACHES)
    def test_whatever_the_cache(self, bench: Any, cache: str, sampling: str) -> None:
        axes = {"stop": "eos", "sampling": sampling}
        assert tokens_of(bench, f"{cache}+sync-check", **axes).equal(tokens_of(bench, "dynamic-cache", **axes))

    def test_sampling_is_seeded_and_not_greedy(self, bench: Any) -> None:
        sampled = [tokens_of(bench, "dynamic-cache", index, sampling="multinomial") for index in (0, 0, 1)]
        assert sampled[0].equal(sampled[1])
        assert not sampled[0].equal(sampled[2])
        assert not sampled[0].equal(tokens_of(bench, "dynamic-cache"))

    def test_cold_sampling_is_greedy(self, bench: Any) -> None:
        cold = tokens_of(bench, "dynamic-cache", sampling="multinomial", temperature=1e-4)
        assert cold.equal(tokens_of(bench, "dynamic-cache"))


class TestSampler:
    def test_frequencies(self, bench: Any) -> None:
        """Within five standard deviations of the probabilities, at two temperatures."""
        with bench.live(bench.job(bench.cell("decode")), calls=0) as session:
            probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
            draws = 20_000
            for temperature in (1.0, 2.0):
                sampler = Sampler(session, draws, temperature)
                sampler.noise = torch.ones(draws, 4)
                sampler.draw()
                tokens = sampler(probabilities.log().expand(draws, 4), sampler.noise)
                wanted = probabilities ** (1 / temperature)
                wanted = wanted / wanted.sum()
                found = torch.bincount(tokens, minlength=4) / draws
                assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / draws).sqrt()).all()

    def test_banned_token_is_never_chosen(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode")), calls=0) as session:
            sampler = Sampler(session, 64, 1.0, banned=2)
            sampler.noise = torch.ones(64, 4)
            logits = torch.zeros(64, 4)
            logits[:, 2] = 50.0
            for _ in range(20):
                sampler.draw()
                assert (sampler(logits.clone(), sampler.noise) != 2).all()


@pytest.mark.usefixtures("torch_settings")
class TestStops:
    @pytest.mark.parametrize("stack", ["static-cache", *(f"static-cache+{stack}" for stack in STACKS)])
    def test_early_ends(self, bench: Any, stack: str) -> None:
        """Sequences end at different steps, the loop ends with the last of them, real tokens are counted."""
        job = bench.job(
            bench.cell("decode", stack, stop="eos", shortest=0.25, longest=0.5, batch_size=4, new_tokens=20)
        )
        with bench.live(job) as session:
            step = session.step
            lengths = step.ledger.lengths[0]
            assert sorted(lengths) == [5, 7, 8, 10]
            assert (step.units_per_call, step.energy_units_per_call) == (26, 30)
            assert step.problems() == []
            result, stop, pad = step.ledger.result(), step.ledger.stop, step.ledger.pad
            for row, length in zip(result.tolist(), lengths, strict=True):
                assert row[length - 1] == stop
                assert stop not in row[: length - 1]
                assert row[length:] == [pad] * (20 - length)
            steps = {"static-cache": 19, "static-cache+sync-check": 9, "static-cache+sync-check:every=3": 9}
            assert step.steps == step.steps_per_call == steps.get(stack, 10), "one superfluous step if flags come late"

    def test_marks_follow_the_steps(self, bench: Any) -> None:
        job = bench.job(bench.cell("decode", "sync-check", stop="eos", longest=0.5, new_tokens=8))
        labels: list[str] = []
        with bench.live(job) as session:
            session.step.run(0, labels.append)
        assert labels == ["setup", "first_token", "token", "token", "token", "end"]

    def test_a_token_is_issued_before_the_check_waits(self, bench: Any) -> None:
        """Else the host seems to be busy all the time, and every such row launch-bound."""
        order: list[str] = []

        class Noting(SyncCheck):
            def issued(self, column: int) -> bool:
                order.append("check")
                return super().issued(column)

        with bench.live(bench.job(bench.cell("decode", "sync-check", new_tokens=4))) as session:
            session.step.check = Noting()
            session.step.run(0, order.append)
        assert order == ["setup", "check", "first_token", *["token", "check"] * 3, "end"]

    def test_every_batch_ends_elsewhere_at_equal_cost(self) -> None:
        lengths = stop_lengths(8, 100, 0.25, 0.75, sets=6, seed=3)
        assert {tuple(sorted(batch)) for batch in lengths} == {tuple(sorted(lengths[0]))}
        assert len({tuple(batch) for batch in lengths}) > 1
        assert (min(lengths[0]), max(lengths[0])) == (25, 75)
        assert lengths == stop_lengths(8, 100, 0.25, 0.75, sets=6, seed=3)

    @pytest.mark.parametrize("axes", [{"shortest": 0.0}, {"shortest": 0.8, "longest": 0.5}, {"longest": 1.5}])
    def test_impossible_shares_are_refused(self, bench: Any, axes: dict[str, float]) -> None:
        reason = workloads()["decode"].unsupported(bench.cell("decode", **axes), bench.device())
        assert reason
        assert "shortest <= longest" in reason

    def test_temperature_of_zero_is_refused(self, bench: Any) -> None:
        reason = workloads()["decode"].unsupported(bench.cell("decode", temperature=0.0), bench.device())
        assert reason
        assert "temperature" in reason


class Hasty(StopCheck):
    """Says after the third token that all have ended."""

    def issued(self, column: int) -> bool:
        return column == 2

    def last_column(self, needed: int) -> int:
        return needed


class Deaf(Hasty):
    """Promises to stop, and never does."""

    def issued(self, column: int) -> bool:
        return False


@pytest.mark.usefixtures("torch_settings")
class TestFaultsAreFound:
    def live(self, bench: Any, stack: str = "static-cache+sync-check") -> Any:
        return bench.live(bench.job(bench.cell("decode", stack, stop="eos", **AXES)))

    def test_loop_that_stops_early(self, bench: Any) -> None:
        with self.live(bench) as session:
            with session.step.checking(Hasty()):
                session.step.run(0, ignore)
            assert "stopped_early" in session.step.problems()
            assert "wrong_token_count" in session.step.problems()

    def test_loop_that_never_stops(self, bench: Any) -> None:
        with self.live(bench) as session:
            with session.step.checking(Deaf()):
                session.step.run(0, ignore)
            assert session.step.problems() == ["stop_missed"]

    def test_stop_token_in_the_middle(self, bench: Any) -> None:
        with self.live(bench) as session:
            assert session.step.problems() == []
            session.step.tokens[0, 1] = session.step.ledger.stop
            assert session.step.problems() == ["wrong_stop"]

    def test_token_after_the_stop(self, bench: Any) -> None:
        with self.live(bench) as session:
            row = min(range(4), key=session.step.ledger.lengths[0].__getitem__)
            session.step.tokens[row, session.step.ledger.lengths[0][row]] = 7
            assert session.step.problems() == ["wrong_stop"]

    @pytest.mark.parametrize("applied", ["static-cache", "static-cache+sync-check:every=2"])
    @pytest.mark.parametrize("name", LOOPS)
    def test_pretender(self, bench: Any, name: str, applied: str) -> None:
        cell = bench.cell("decode", f"static-cache+{name}", stop="eos", **AXES)
        with bench.live(bench.job(cell), applied=applied) as session:
            evidence = optimizations()[name].evidence(parse_stack(name).techniques[0], session)
        assert not evidence.ok, evidence.facts

    def test_other_tokens_than_the_plain_loop(self, bench: Any) -> None:
        """A check that changes what is generated is no check."""
        with self.live(bench) as session:
            technique, chosen = optimizations()["sync-check"], parse_stack("sync-check").techniques[0]
            assert technique.evidence(chosen, session).ok
            reading = session.step.check.issued

            def meddling(column: int) -> bool:
                session.step.tokens[0, 0] = 3
                return bool(reading(column))

            session.step.check.issued = meddling
            assert not technique.evidence(chosen, session).ok

    @pytest.mark.parametrize("stop", ["none", "eos"])
    @pytest.mark.parametrize("stack", STACKS)
    def test_pretends_to_look(self, bench: Any, monkeypatch: pytest.MonkeyPatch, stack: str, stop: str) -> None:
        """Counts its looks and never does: with `stop: none` every flag says that it goes on, as the pretender does."""
        cell = bench.cell("decode", f"static-cache+{stack}", stop=stop, **AXES)
        technique, chosen = optimizations()[stack.split(":")[0]], parse_stack(stack).techniques[0]
        # where the flag has to come from is seen on a card only
        monkeypatch.setattr(type(technique), "recognizes", lambda *_arguments: True)
        with bench.live(bench.job(cell)) as session:
            honest = technique.evidence(chosen, session)
            assert honest.ok, honest.facts
            check = session.step.check
            looking = check.issued

            def pretending(column: int) -> bool:
                looking(column)
                return False

            check.issued = pretending
            evidence = technique.evidence(chosen, session)
        assert not evidence.ok, evidence.facts


class Reader(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects operators that bring a number to the host, which no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.read[name] += 1
        elif name not in ("arange",):
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("torch_settings")
class TestStep:
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("model", ["llama", "gpt2"])
    def test_asks_nothing_of_the_host(self, bench: Any, sampling: str, model: str) -> None:
        """With a static cache a step reads no number on the host, so that one graph of it can be every step."""
        tiny = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64, "n_positions": 64,
                "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
        spec = bench.language if model == "llama" else bench.random_model("tiny-gpt2", tiny, "language")
        cell = bench.cell("decode", "static-cache+sync-check", spec, stop="eos", sampling=sampling, **AXES)
        with bench.live(bench.job(cell)) as session:
            session.step._restart()
            with Reader() as reader:
                session.step._advance()
            assert not reader.read
            with Reader() as reader:
                session.step.check.issued(1)
            assert reader.read, "the listener hears a flag that is read"

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("stop", ["none", "eos"])
    def test_captured_and_replayed(self, bench: Any, stop: str, sampling: str) -> None:
        """A capture makes the step ready with real calls and then replays it: requests must not notice."""
        replays: list[int] = []

        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            assert len(generators) == (sampling == "multinomial")
            for _ in range(3):
                restart()
                advance()
            return lambda: (replays.append(1), advance())

        axes = {**AXES, "stop": stop, "sampling": sampling}
        with bench.live(bench.job(bench.cell("decode", "fp32+static-cache", **axes)), calls=0) as session:
            session.settings.capture = capture
            session.step.run(1, ignore)
            assert len(replays) == session.step.steps
            assert session.step.ledger.result().equal(tokens_of(bench, "static-cache", 1, stop=stop, sampling=sampling))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_ledger_against_a_plain_list(data: Any) -> None:
    """Any schedule, any tokens: what the device notes is what a loop over lists would, and the flags say when."""
    batch = data.draw(st.integers(1, 5))
    new = data.draw(st.integers(2, 9))
    stop, pad = 3, 0
    lengths = data.draw(st.lists(st.integers(1, new), min_size=batch, max_size=batch))
    chosen = data.draw(st.lists(st.lists(st.sampled_from([1, 2, 4, 5]), min_size=batch, max_size=batch),
                                min_size=new, max_size=new))  # fmt: skip
    flags = torch.zeros(new, dtype=torch.long)
    ledger = Ledger("cpu", batch, new, watched=True, flags=flags, lengths=[lengths], stop=stop)
    for _ in range(2):  # the second request must not see the first one's flags
        ledger.begin(0)
        assert (flags < ledger.epoch).all()
        for column in range(new):
            ledger.accept(torch.tensor(chosen[column]))
            over = column + 1 >= max(lengths)
            assert int(flags[column]) == int(ledger.status) == ledger.epoch + over
            assert (flags[column + 1 :] < ledger.epoch).all()
    rows = [[chosen[c][row] for c in range(n - 1)] + [stop] + [pad] * (new - n) for row, n in enumerate(lengths)]
    assert ledger.result().tolist() == rows
    assert ledger.problems(0) == []


@given(needed=st.integers(0, 30), every=st.integers(1, 9))
def test_last_column_is_where_the_check_ends(needed: int, every: int) -> None:
    check = SyncCheck(every)
    ledger = Ledger("cpu", 1, 64, watched=True, lengths=[[needed + 1]], stop=3)
    ledger.begin(0)
    check.begin(ledger)
    column = -1
    over = False
    while not over:
        column += 1
        ledger.accept(torch.tensor([1]))
        over = check.issued(column)
    assert column == check.last_column(needed)


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
                time.sleep(0.005)
                return super().issued(column)

        job = bench.job(bench.cell("decode", "sync-check", stop="eos", **AXES))
        with bench.live(job) as session:
            session.step.check = Sleepy()
            row = measure_costs(session, session.step)
        # one more look than there are steps: after the first token
        assert row["stop_check_ms"] > 4.5

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
            row = measure_costs(session, step)
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


class TestCacheBytes:
    def test_static_is_held_from_the_start(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode", "static-cache", **AXES)), calls=1) as session:
            step = session.step
            # keys and values x layers x heads x head size x 4 bytes, for every position
            assert step.cache_bytes() == 2 * 2 * 2 * 16 * 4 * AXES["batch_size"] * 20
            assert stored_bytes(step.cache) == {"cpu": step.cache_bytes()}
            address = step.cache.layers[0].keys.data_ptr()
            step.run(1, ignore)
            assert step.cache.layers[0].keys.data_ptr() == address

    def test_nothing_is_counted_twice(self) -> None:
        whole = torch.zeros(10)
        assert bytes_of([whole[:5], (whole[5:], {"scale": torch.zeros(2, dtype=torch.half)}), None, "x"]) == {"cpu": 44}

    def test_no_cache_has_none(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode", "no-cache", **AXES)), calls=1) as session:
            assert session.step.cache is None
            assert session.step.cache_bytes() == 0

    @pytest.mark.backends
    @pytest.mark.parametrize("stack", ["quantized-cache", "quantized-cache:bits=2", "quantized-cache:residual=4"])
    def test_quantized_is_smaller_and_says_so(self, bench: Any, stack: str) -> None:
        """Real bytes of packed numbers and scales."""
        cell = bench.cell("decode", f"fp32+{stack}", bench.POCKET, batch_size=2, prompt_tokens=64, new_tokens=8)
        plain = bench.cell("decode", "fp32+dynamic-cache", bench.POCKET, batch_size=2, prompt_tokens=64, new_tokens=8)
        with bench.live(bench.job(plain), calls=1) as session:
            full = session.step.cache_bytes()
        with bench.live(bench.job(cell), calls=1) as session:
            bits = int(parse_stack(stack).techniques[0].option("bits", 4) or 4)
            assert session.step.cache_bytes() < full * (bits + 1.5) / 32 + full * 8 / 71
            evidence = optimizations()["quantized-cache"].evidence(parse_stack(stack).techniques[0], session)
            assert evidence.ok, evidence.facts
            other = parse_stack(f"quantized-cache:bits={6 - bits}").techniques[0]
            assert not optimizations()["quantized-cache"].evidence(other, session).ok, "other bits than were stored"

    def test_quantized_compiles_before_the_cell(self, bench: Any) -> None:
        """A minute of nvcc, or half a one of gcc, once for each installation: it is not the cell's."""
        technique = optimizations()["quantized-cache"]
        for backend, device, expected in (
            ("quanto", bench.device("cuda"), "quanto cuda"),
            ("quanto", bench.device(), "quanto cpu"),
            ("hqq", bench.device("cuda"), None),
        ):
            cell = bench.cell("decode", f"fp32+quantized-cache:backend={backend}")
            chosen = cell.stack.techniques[-1]
            assert technique.kernels_to_build(chosen, bench.job(cell, device=device)) == expected

    @pytest.mark.backends
    def test_quantized_compiles_once(self, bench: Any) -> None:
        technique = optimizations()["quantized-cache"]
        job = bench.job(bench.cell("decode", "fp32+quantized-cache"))
        session = Session(job=job, device=torch.device("cpu"), row=Row())
        quanto = job.cell.stack.techniques[-1]
        first, second = (technique.build_kernels(quanto, session) for _ in range(2))
        assert 0 < second < max(first, 0.1), "what was compiled is compiled once"

    def test_quantized_refusals(self, bench: Any) -> None:
        packages = {**bench.device().packages, "optimum-quanto": "0.2.7", "hqq": "0.2.8"}
        device = bench.device(packages=packages)

        def refusal(options: str) -> str | None:
            return unsupported(bench.cell("decode", f"quantized-cache{options}"), device)

        assert refusal("") is None
        assert refusal(":backend=hqq,bits=8") is None
        assert "2 or 4 bits, not 8" in str(refusal(":bits=8"))
        assert "residual" in str(refusal(":residual=0"))
        missing = unsupported(bench.cell("decode", "quantized-cache:backend=hqq"), bench.device())
        assert "needs hqq" in str(missing)
        missing = unsupported(bench.cell("decode", "quantized-cache"), bench.device(packages={}))
        assert "optimum-quanto" in str(missing)
        assert ".[kvquant]" in str(missing)


def test_plain_loop_is_the_default(bench: Any) -> None:
    with bench.live(bench.job(bench.cell("decode")), calls=0) as session:
        assert type(session.step.check) is NoCheck
        assert not session.step.ledger.watched, "no flag is worked out that nobody reads"
