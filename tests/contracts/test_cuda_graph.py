"""A captured decode step: what can hold one, and what counts as proof that it does what the launched step does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks.optimization import Unsupported
from tasks.optimizations import cuda_graph
from tasks.optimizations.cuda_graph import _record, accepted
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.workloads._decode_cache import held_tensors
from tasks.workloads._decode_compared import Comparison
from tasks.workloads._decode_steps import Chooser

AXES = {"batch_size": 4, "prompt_tokens": 8, "new_tokens": 12}
WINDOWS = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
    "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2,
}  # fmt: skip


def ignore(_label: str) -> None:
    return


class TestGraph:
    @pytest.mark.parametrize("fault", ["nothing", "once", "none"])
    def test_graph_that_does_something_else_is_caught(self, bench: Any, fault: str) -> None:
        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            calls: list[int] = []

            def replay() -> None:
                calls.append(1)
                if fault == "none" or (fault == "once" and len(calls) == 1):
                    advance()

            return replay

        job = bench.job(bench.cell("decode", "static-cache", stop="eos", **AXES))
        with bench.live(job, calls=0) as session:
            session.settings.capture = capture
            assert accepted(session.step.compared()) == (fault == "none")

    def test_graph_that_goes_wrong_late_is_not_taken_for_a_tie(self, bench: Any) -> None:
        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            calls: list[int] = []

            def replay() -> None:
                calls.append(1)
                advance()
                if len(calls) > 10:
                    session.step.ledger.input.fill_(3)  # what the next step is fed with

            return replay

        job = bench.job(bench.cell("decode", "fp32+static-cache", **{**AXES, "new_tokens": 24}))
        with bench.live(job, calls=0) as session:
            session.settings.capture = capture
            found = session.step.compared()
        assert not found.same
        assert found.distance > 0.1
        assert found.cache > 0.1
        assert found.rounding is not None
        assert found.rounding < 1e-4

    @pytest.mark.parametrize("stop", ["none", "eos"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("fault", ["", "position", "values", "prompt", "layer"])
    def test_keys_and_values(self, bench: Any, precision: str, stop: str, fault: str) -> None:
        """Rounding is told from whatever a graph may do to its cache, also where the tokens are the same."""
        prompt = AXES["prompt_tokens"]

        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            def replay() -> None:
                advance()
                layers = session.step.cache.layers
                now = int(session.step.ledger.position) + prompt - 2  # of the token that was fed
                for layer in layers if fault != "layer" else layers[-1:]:
                    match fault:
                        case "":  # the last bit of every new value
                            layer.values[:, :, now].mul_(1 + torch.finfo(layer.values.dtype).eps)
                        case "position":
                            layer.cumulative_length.sub_(1)
                        case "values":
                            layer.values[:, :, now].mul_(0.9)
                        case "prompt":
                            layer.values[:, :, : prompt // 2].zero_()
                        case "layer":
                            layer.values[:, :, prompt:].zero_()

            return replay

        job = bench.job(bench.cell("decode", f"{precision}+static-cache", **{**AXES, "new_tokens": 24}, stop=stop))
        with bench.live(job, calls=0) as session:
            session.settings.capture = capture
            found = session.step.compared()
            assert session.step.problems() == []
        assert found.rounding is not None
        assert found.rounding < (1e-4 if precision == "fp32" else 0.03)
        assert accepted(found) == (not fault), found
        assert found.cache > (0.09 if fault else 0)

    @pytest.mark.parametrize("stack", ["fp32+static-cache", "bf16+static-cache", "fp16+static-cache"])
    @pytest.mark.parametrize(
        "more", [{}, {"sampling": "multinomial"}, {"stop": "eos"}, {"stop": "eos", "batch_size": 9}]
    )
    def test_right_ones(self, bench: Any, stack: str, more: dict[str, Any]) -> None:
        """The same kernels, and attention of another implementation, which rounds differently."""

        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            return advance

        def other(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            def replay() -> None:
                session.model.set_attn_implementation("eager")
                advance()
                session.model.set_attn_implementation("sdpa")

            return replay

        job = bench.job(bench.cell("decode", stack, **{**AXES, "new_tokens": 40, **more}))
        with bench.live(job, calls=0) as session:
            for case in (capture, other):
                session.settings.capture, session.step._captured = case, None
                found = session.step.compared()
                assert accepted(found), (case.__name__, found)
                assert (found.cache == 0) == (case is capture)
                assert session.step.problems() == []

    def test_sampled_tokens(self, bench: Any) -> None:
        """Score and noise together say which token is next: another one is not a tie."""
        job = bench.job(bench.cell("decode", "fp32+static-cache", **{**AXES, "sampling": "multinomial"}))
        with bench.live(job, calls=0) as session:
            session.step.run(0, ignore)
            tokens = session.step.ledger.result()
            assert session.step.distances(tokens, 12).max() < 1e-4
            tokens[2, 5] = (tokens[2, 5] + 1) % 100
            distances = session.step.distances(tokens, 12)
            assert distances[2, 5] > 0.1
            assert distances[:2].max() < 1e-4
            assert distances[2, :5].max() < 1e-4

    @pytest.mark.parametrize("prompt", [24, 32])
    @pytest.mark.parametrize("more", ["", "+sync-check"])
    @pytest.mark.parametrize("stop", ["none", "eos"])
    def test_layers_that_keep_a_window(self, bench: Any, prompt: int, stop: str, more: str) -> None:
        model = bench.random_model("windows", WINDOWS, "language")
        axes = {"batch_size": 3, "prompt_tokens": prompt, "new_tokens": 20, "stop": stop}
        job = bench.job(bench.cell("decode", f"fp32+static-cache{more}", model, **axes))
        with bench.live(job, calls=0) as session:
            session.settings.capture = lambda restart, advance, generators: advance
            found = session.step.compared()
            assert {value.shape[2] for value in held_tensors(session.step.cache)} == {16, prompt + 20}
        assert accepted(found), found
        assert found.cache == 0

    def test_what_cannot_be_read_at_once(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rounding is unknown then, and the floor decides."""

        def too_much(tokens: Any, columns: int) -> None:
            raise torch.OutOfMemoryError("no room for the activations of all tokens")

        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            def replay() -> None:
                advance()
                for layer in session.step.cache.layers:
                    layer.values[:, :, AXES["prompt_tokens"] :].mul_(factor)

            return replay

        job = bench.job(bench.cell("decode", "bf16+static-cache", **AXES))
        with bench.live(job, calls=0) as session:
            monkeypatch.setattr(session.step, "read_at_once", too_much)
            for factor in (1 + 2**-7, 1.1):
                session.settings.capture, session.step._captured = capture, None
                found = session.step.compared()
                assert found.rounding is None
                assert found.cache > 0
                assert accepted(found) == (factor < 1.1), found

    def test_one_wrong_sequence_of_many(self, bench: Any) -> None:
        def capture(restart: Callable[[], None], advance: Callable[[], None], generators: list[Any]) -> Any:
            def replay() -> None:
                advance()
                session.step.cache.layers[-1].values[77, :, AXES["prompt_tokens"] :].zero_()

            return replay

        job = bench.job(bench.cell("decode", "bf16+static-cache", **{**AXES, "batch_size": 100}))
        with bench.live(job, calls=0) as session:
            session.settings.capture = capture
            found = session.step.compared()
        assert found.cache == pytest.approx(1)
        assert not accepted(found)

    @pytest.mark.parametrize("stop", ["none", "eos"])
    def test_distance_of_tokens_from_the_best(self, bench: Any, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
        """Of a loop that takes the second best token wherever that is close enough, as a share of the best logit."""
        close = 0.3

        def second_if_close(self: Any, logits: Any) -> Any:
            logits = allowed(self, logits)
            best, where = logits.topk(2, dim=-1)
            tied = (best[:, 0] - best[:, 1]) / best[:, 0].abs() < close
            return logits.scatter(1, where[:, :1], torch.where(tied[:, None], float("-inf"), best[:, :1]))

        allowed = Chooser._allowed
        job = bench.job(bench.cell("decode", "fp32+static-cache", **{**AXES, "new_tokens": 24}, stop=stop))
        with bench.live(job, calls=0) as session:
            step = session.step
            length = int(step.chosen_lengths().min())
            step.run(0, ignore)
            plain = step.ledger.result()
            assert step.distances(plain, 24)[:, :length].max() < 1e-4
            monkeypatch.setattr(Chooser, "_allowed", second_if_close)
            step.run(0, ignore)
            second = step.ledger.result()
            distances = step.distances(second, 24)[:, :length]
            assert not second.equal(plain)
            assert 1e-4 < distances.max() < close * 1.01
            assert step.distances(torch.full_like(plain, -1), 1).min() == math.inf
            if stop == "eos":
                assert step.distances(torch.full_like(plain, step.ledger.stop), 1).min() == math.inf

    @pytest.mark.filterwarnings("default:`torch.jit.script_method`:DeprecationWarning")
    def test_tokens_of_compiled_steps_are_judged_by_others(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each by one step of its own, with the shapes and the rounding of the loop, and none of them is compiled."""
        job = bench.job(bench.cell("decode", "fp32+static-cache+compile", **AXES))
        with bench.live(job, calls=0) as session:
            step, shapes = session.step, []
            step.run(1, ignore)  # whatever request was the last: judged are tokens of the first
            step.run(0, ignore)
            tokens = step.ledger.result()
            step.run(1, ignore)

            def compiled(*inputs: Any) -> None:
                pytest.fail("a compiled step")

            monkeypatch.setattr(step.source, "_step", compiled)
            hook = session.model.register_forward_pre_hook(
                lambda model, _, named: shapes.append(named["input_ids"].shape), with_kwargs=True
            )
            assert step.distances(tokens, 12).max() < 1e-4
            hook.remove()
            assert (step.source._step, step.source._choose) == (compiled, step.choose)
        assert shapes == [(4, 8)] + [(4, 1)] * 11

    def test_a_number_that_is_none_is_no_tie(self, bench: Any) -> None:
        job = bench.job(bench.cell("decode", "fp32+static-cache", **AXES))
        with bench.live(job, calls=0) as session:
            session.step.run(0, ignore)
            tokens = session.step.ledger.result()
            session.model.get_input_embeddings().weight.data[int(tokens[0, 3])] = float("nan")
            assert session.step.distances(tokens, 12)[0, 4:].min() == math.inf

    @pytest.mark.parametrize(
        ("compared", "launches", "ok"),
        [
            (Comparison(same=True), 3, True),
            (Comparison(same=True), 2, False),
            (Comparison(same=True, cache=0.011, rounding=0.004), 3, True),
            (Comparison(same=True, cache=0.013, rounding=0.004), 3, False),
            (Comparison(same=True, cache=0.03, eps=2**-7), 3, True),  # another order may round as this one does
            (Comparison(same=True, cache=0.3, rounding=0.2), 3, False),
            (Comparison(same=True, cache=math.inf, rounding=math.inf), 3, False),
            (Comparison(same=False, distance=0.04, cache=0.005, rounding=0.004), 3, True),
            (Comparison(same=False, distance=0.05, cache=0.005, rounding=0.004), 3, False),
            (Comparison(same=False, distance=0.04, cache=0.1, rounding=0.004), 3, False),
            (Comparison(same=False, distance=0.2, cache=0.1, rounding=0.1), 3, False),
            (Comparison(same=False, distance=math.inf, cache=math.inf), 3, False),
        ],
    )
    def test_what_evidence_of_a_graph_accepts(
        self, monkeypatch: pytest.MonkeyPatch, compared: Comparison, launches: int, ok: bool
    ) -> None:
        session: Any = SimpleNamespace(on_cuda=True, step=SimpleNamespace(steps=3, compared=lambda: compared))
        monkeypatch.setattr(cuda_graph, "graph_launches", lambda session: launches)
        (technique,) = parse_stack("static-cache+cuda-graph").techniques[1:]
        evidence = optimizations()["cuda-graph"].evidence(technique, session)
        assert evidence.ok == ok
        json.dumps(evidence.facts, allow_nan=False)

    def test_graph_needs_fixed_addresses(self, bench: Any) -> None:
        cuda = bench.device("cuda")
        for cache in ("", "dynamic-cache+", "no-cache+"):
            reason = unsupported(bench.cell("decode", f"{cache}cuda-graph"), cuda)
            assert reason
            assert "static-cache" in reason
        assert unsupported(bench.cell("decode", "static-cache+cuda-graph"), cuda) is None
        assert unsupported(bench.cell("decode", "static-cache+compile+cuda-graph+mapped-flag"), cuda) is None
        for mode in ("reduce-overhead", "max-autotune"):
            assert unsupported(bench.cell("decode", f"static-cache+compile:mode={mode}+cuda-graph"), cuda)

    @pytest.mark.parametrize("name", ["int8", "offload", "offload:to=disk"])
    def test_graph_cannot_hold_the_host(self, bench: Any, name: str) -> None:
        reason = unsupported(bench.cell("decode", f"bf16+{name}+static-cache+cuda-graph"), bench.device("cuda"))
        assert "cannot hold a step of" in str(reason)
        assert unsupported(bench.cell("decode", f"bf16+{name}+static-cache"), bench.device("cuda")) is None

    @pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
    def test_graphs_would_overwrite_a_growing_cache(self, bench: Any, mode: str) -> None:
        cuda, compiled = bench.device("cuda"), f"compile:mode={mode}"
        for cache in ("", "dynamic-cache+", "offloaded-cache+"):
            assert "overwrite" in str(unsupported(bench.cell("decode", f"bf16+{cache}{compiled}"), cuda))
            assert unsupported(bench.cell("decode", f"bf16+{cache}compile"), cuda) is None
        for cache in ("static-cache", "no-cache"):
            assert unsupported(bench.cell("decode", f"bf16+{cache}+{compiled}"), cuda) is None
        assert unsupported(bench.cell("prefill", f"bf16+{compiled}"), cuda) is None
        assert unsupported(bench.cell("decode", f"bf16+{compiled}"), bench.device()) is None, "no graphs on a cpu"

    def test_step_that_cannot_be_captured_is_unsupported(self) -> None:
        @contextmanager
        def recording() -> Iterator[None]:
            try:
                yield
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        def fails(error: Exception) -> Callable[[], None]:
            def advance() -> None:
                raise error

            return advance

        with pytest.raises(Unsupported, match="cannot capture this step: the host was asked"):
            _record(recording(), fails(RuntimeError("the host was asked")))
        with pytest.raises(torch.OutOfMemoryError):
            _record(recording(), fails(torch.OutOfMemoryError("out of memory")))
