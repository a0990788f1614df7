"""A model that is not torch's: workloads, metrics and quality ask it through `RuntimeModel` alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tasks.metric import Missing
from tasks.models.runtime import RuntimeModel, RuntimeOutput, RuntimeState, StoredWeights
from tasks.optimization import Evidence, Optimization
from tasks.registry import optimizations
from tasks.session import Session
from tasks.stacks import parse_stack, unsupported


class State(RuntimeState):
    def __init__(self, cache: Any) -> None:
        self.make, self.cache, self.resets = cache, cache(), 0

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def reset(self) -> None:
        self.cache, self.resets = self.make(), self.resets + 1

    def stored_bytes(self) -> dict[str, int]:
        return {"cpu": 1000 * self.get_seq_length()}


class Foreign(RuntimeModel):
    """Answers only what the interface has; behind it is a torch model that nobody sees."""

    runtime = "abacus"

    def __init__(self, model: Any) -> None:
        self._hidden, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.states: list[tuple[int, int]] = []

    def forward(
        self, input_ids: Any, past_key_values: Any = None, use_cache: Any = None, logits_to_keep: int = 0
    ) -> RuntimeOutput:
        cache = past_key_values.cache if past_key_values is not None else None
        out = self._hidden(
            input_ids=input_ids, past_key_values=cache, use_cache=use_cache, logits_to_keep=logits_to_keep
        )
        return RuntimeOutput(logits=out.logits.clone(), past_key_values=past_key_values)

    def new_state(self, batch: int, positions: int) -> State:
        from transformers import DynamicCache

        self.states.append((batch, positions))
        return State(lambda: DynamicCache(config=self.config))

    @property
    def weights(self) -> StoredWeights:
        return StoredWeights(parameters=1234, bytes=5000, elements={"beads": 1234}, embedding_bytes=2000)

    def sizes(self) -> dict[str, int]:
        return {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


class Abacus(Optimization):
    name, family, summary = "abacus", "compression", "for the test"
    runtime, runtime_takes, bits = "abacus", ("fp32",), 8.0

    def load(self, options: Any, technique: Any, session: Session) -> None:
        options.loader = self.bring

    def bring(self, session: Session) -> Any:
        options = replace(session.load_options, loader=None)
        loaded = session.load(options)
        return replace(loaded, model=Foreign(loaded.model))

    def evidence(self, technique: Any, session: Session) -> Evidence:
        return Evidence(ok=isinstance(session.model, Foreign))


@contextmanager
def known(*techniques: Optimization) -> Iterator[None]:
    table = optimizations()
    table |= {technique.name: technique for technique in techniques}
    try:
        yield
    finally:
        for technique in techniques:
            del table[technique.name]


@pytest.fixture(autouse=True)
def _abacus() -> Iterator[None]:
    with known(Abacus()):
        yield


def test_prefill_and_its_metrics(bench: Any) -> None:
    cell = bench.cell("prefill", "abacus")
    with bench.measured(bench.job(cell, profile=bench.INSTANT)) as (session, metrics):
        values = {name: metrics[name].collect(session) for name in ("parameters", "compute", "memory")}
        ours = session.step.logits.clone()
    with bench.live(bench.job(bench.cell("prefill")), calls=1) as session:
        session.step.run(0, lambda _label: None)
        theirs = session.step.logits
    assert ours.shape == theirs.shape
    assert values["parameters"] == {"parameters_total": 1234, "parameters_trainable": 0, "model_bytes": 5000}
    assert values["compute"]["flops"] > 0
    assert not isinstance(values["memory"]["peak_host_bytes"], Missing)


def test_decode_resets_one_state_and_counts_its_bytes(bench: Any) -> None:
    cell = bench.cell("decode", "abacus", prompt_tokens=16, new_tokens=8)
    with bench.live(bench.job(bench.cell("decode", prompt_tokens=16, new_tokens=8))) as session:
        expected = session.step.tokens.clone()
    with bench.measured(bench.job(cell, profile=bench.INSTANT)) as (session, metrics):
        session.step.run(0, lambda _label: None)
        assert session.model.states == [(2, 24)], "one state with room for the whole request"
        assert session.step.tokens.equal(expected)
        assert session.step.cache.resets > 1
        assert session.step.cache_bytes() == 1000 * 23
        compute = metrics["compute"]
        compute.collect(session)
        # weights without the embedding, and the cache at its mean length
        assert compute._read_bytes == 3000 + 23_000 * (16 + 4) / 24
        found = metrics["decoding"].collect(session)
        assert found["kv_cache_bytes_per_token"] == 500.0


@pytest.mark.parametrize("stack", ["abacus+sync-check", "prune+abacus", "fp32+abacus", "abacus+again"])
def test_what_can_stand_beside_it(bench: Any, stack: str) -> None:
    assert unsupported(bench.cell("decode", stack, bench.POCKET), bench.device()) is None


@pytest.mark.parametrize("other", ["bf16", "eager", "static-cache", "compile", "interleaved"])
def test_what_cannot(bench: Any, other: str) -> None:
    kind = "decode" if other == "static-cache" else "prefill"
    reason = unsupported(bench.cell(kind, f"{other}+abacus"), bench.device())
    assert reason is not None
    if other != "interleaved":  # it says so first
        assert f"abacus runs the model in abacus: no {other}" in reason


def test_two_runtimes_exclude_each_other(bench: Any) -> None:
    class Slate(Abacus):
        name, family, runtime = "slate", "structure", "slate"

    with known(Slate()):
        reason = unsupported(bench.cell("prefill", "slate+abacus"), bench.device())
    assert reason is not None
    assert "that runs in" in reason


def test_precision_reads_the_types_that_the_runtime_stores(bench: Any) -> None:
    cell = bench.cell("prefill", "fp32+abacus")
    (chosen,) = parse_stack("fp32").techniques
    with bench.live(bench.job(cell)) as session:
        evidence = optimizations()["fp32"].evidence(chosen, session)
    assert not evidence.ok
    assert evidence.facts["weight_elements"] == {"beads": 1234}


def test_quality_through_it_is_the_models_own(bench: Any) -> None:
    from tasks.quality import judge, make_reference
    from tasks.row import Row

    cell = bench.cell("prefill", "abacus", bench.POCKET)
    job = bench.job(cell, quality=True, quality_tokens=512, quality_choices=4)
    with bench.live(job, calls=1) as session:
        make_reference(Session(job=job, device=session.device, row=Row()))
        reading = judge(session)
    assert not isinstance(reading, Missing)
    assert reading.perplexity_log_ratio is not None
    assert abs(reading.perplexity_log_ratio) < 0.01
    assert reading.top1_agreement > 0.97
    assert reading.choices == 4
