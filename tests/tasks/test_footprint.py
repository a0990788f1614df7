"""Predicted bytes against true parameter counts of models built on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.footprint import Footprint, lower_bound
from tasks.models.architectures import ARCHITECTURES


def named(name: str) -> ModelSpec:
    return ModelSpec(id=name, source="random", reference=name, kind=ARCHITECTURES[name].kind)


@cache
def true_parameters(name: str) -> int:
    import torch

    from tasks.models.identity import random_config
    from tasks.models.load import auto_class, hf_config

    config = hf_config(random_config(name))
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


PUBLISHED = {"gpt2": 124_439_808, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "resnet-50": 25_557_032}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_architectures_are_the_published_ones(name: str) -> None:
    assert true_parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "llama-3.1-8b"])
@pytest.mark.parametrize(("stack", "bytes_each"), [("fp32", 4), ("tf32", 4), ("bf16", 2), ("fp16", 2)])
def test_weights(bench: Any, name: str, stack: str, bytes_each: int) -> None:
    found = lower_bound(bench.cell("prefill", stack, named(name))).weight_bytes
    assert found == bytes_each * true_parameters(name)


@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "llama-3.1-8b"])
def test_baseline_is_the_published_dtype(bench: Any, name: str) -> None:
    each = {"float32": 4, "bfloat16": 2}[ARCHITECTURES[name].dtype]
    assert lower_bound(bench.cell("prefill", model=named(name))).weight_bytes == each * true_parameters(name)


def test_compression_leaves_embeddings_and_head(bench: Any) -> None:
    """Llama 3.1 8B in NF4: 6.98e9 weights of the blocks at half a byte, embeddings, head and norms in bf16."""
    blocks = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    rest = true_parameters("llama-3.1-8b") - blocks
    cell = bench.cell("decode", "bf16+nf4", named("llama-3.1-8b"))
    assert lower_bound(cell).weight_bytes == blocks // 2 + 2 * rest
    cell = bench.cell("decode", "bf16+int8", named("llama-3.1-8b"))
    assert lower_bound(cell).weight_bytes == blocks + 2 * rest


def test_compressed_bound_is_below_what_is_really_stored(bench: Any) -> None:
    from tasks.metrics.parameters import stored_bytes

    for stack in ("bf16", "fp32", "bf16+nf4", "bf16+int8"):
        cell = bench.cell("decode", stack)
        bound = lower_bound(cell)
        with bench.live(bench.job(cell), calls=1) as session:
            stored = stored_bytes(session.model)
        assert bound.weight_bytes is not None
        assert bound.weight_bytes <= stored < 1.35 * bound.weight_bytes


@pytest.mark.parametrize(("stack", "each"), [("fp32", 4), ("bf16", 2), ("fp32+static-cache", 4)])
def test_cache_is_what_a_request_holds(bench: Any, stack: str, each: int) -> None:
    cell = bench.cell("decode", stack, batch_size=3, prompt_tokens=20, new_tokens=10)
    bound = lower_bound(cell).cache_bytes
    assert bound == 3 * 30 * (2 * 2 * 2 * 16) * each
    with bench.live(bench.job(cell), calls=1) as session:
        assert session.step.cache_bytes() == pytest.approx(bound, rel=0.04)


def test_no_cache_holds_none(bench: Any) -> None:
    assert lower_bound(bench.cell("decode", "no-cache")).cache_bytes == 0
    assert lower_bound(bench.cell("train_step")).cache_bytes == 0


def test_training_holds_gradients_and_moments(bench: Any) -> None:
    for stack in ("fp32", "bf16"):
        cell = bench.cell("train_step", stack, named("gpt2"))
        assert lower_bound(cell).weight_bytes == 16 * true_parameters("gpt2")


def test_unknown_is_none_and_not_zero(bench: Any) -> None:
    hub = ModelSpec(id="hub", source="hub", reference="org/name", kind="language")
    unknown = Footprint(weight_bytes=None, cache_bytes=None)
    assert lower_bound(bench.cell("prefill", model=hub)) == unknown
    assert lower_bound(bench.cell("forward", model=named("resnet-50"))) == unknown
    assert lower_bound(bench.cell("attention")) == unknown
