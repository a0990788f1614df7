"""Every decode loop gives the tokens of the plain one, stops where the sequences end, and asks nothing of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.registry import optimizations, workloads
from tasks.stacks import parse_stack
from tasks.workloads._decode_checks import NoCheck, StopCheck, SyncCheck
from tasks.workloads._decode_compared import TIE, furthest
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

    @pytest.mark.parametrize("stop", ["none", "eos"])
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    @pytest.mark.parametrize("early", [False, True])
    def test_what_is_read_before_it_is_there(self, bench: Any, early: bool, sampling: str, stop: str) -> None:
        """Values that the last layer reads are not there yet, unless they are waited for."""
        axes = {**AXES, "sampling": sampling, "stop": stop}
        with bench.live(bench.job(bench.cell("decode", "fp32+static-cache", **axes)), calls=0) as session:
            waits = not early

            @contextmanager
            def waiting() -> Iterator[None]:
                nonlocal waits
                waits = True
                yield

            def not_there(layer: Any, inputs: Any, output: Any) -> Any:
                return output if waits else output.roll(1, -1)

            session.model.model.layers[-1].self_attn.v_proj.register_forward_hook(not_there)
            found = furthest(session.step, waiting())
        assert (found > TIE) == early
        assert early or found == 0

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


def test_plain_loop_is_the_default(bench: Any) -> None:
    with bench.live(bench.job(bench.cell("decode")), calls=0) as session:
        assert type(session.step.check) is NoCheck
        assert not session.step.ledger.watched, "no flag is worked out that nobody reads"
