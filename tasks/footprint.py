"""A lower bound of the bytes that a cell needs, from configurations alone: weights and KV cache, no activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tasks.cell import Cell, ModelSpec
from tasks.models.architectures import ARCHITECTURES
from tasks.models.identity import config_of
from tasks.registry import optimizations
from tasks.stacks import freezes_weights, precision_of

_BYTES = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0}
_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes; None where the configuration is not at hand or of a kind that we do not count."""

    weight_bytes: int | None
    cache_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return (self.weight_bytes or 0) + (self.cache_bytes or 0)


_UNKNOWN = Footprint(weight_bytes=None, cache_bytes=None)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """`blocks` and `rest` are parameters inside the blocks' linear layers and outside them."""

    blocks: int
    rest: int
    cache_elements_per_token: int
    published_bytes: float


def lower_bound(cell: Cell) -> Footprint:
    """Weights in the stack's precision or compression, cache for the whole request; training adds what steps need."""
    shape = _shape(cell.model)
    if shape is None:
        return _UNKNOWN
    per_weight = in_blocks = in_cache = shape.published_bytes
    known = optimizations()
    resident = 1.0
    for technique in cell.stack.techniques:  # precision comes before compression
        family = known[technique.name].family
        resident *= known[technique.name].resident(technique)
        if family == "precision":
            per_weight = in_blocks = in_cache = _BYTES.get(technique.name, shape.published_bytes)
        elif family == "compression":
            in_blocks = getattr(known[technique.name], "bits", 8 * per_weight) / 8
            if known[technique.name].runtime:  # its file holds embeddings and head in such types too
                per_weight = min(per_weight, in_blocks)
    weights = resident * shape.blocks * in_blocks + shape.rest * per_weight
    if cell.workload.kind == "train_step" and not freezes_weights(cell):
        weights = _trained_bytes(cell, shape)
    tokens = cell.workload.get("batch_size", 0) * (
        cell.workload.get("prompt_tokens", cell.workload.get("sequence_length", 0)) + cell.workload.get("new_tokens", 0)
    )
    held = 1.0 if cell.workload.kind in ("prefill", "decode") else 0.0
    for technique in cell.stack.techniques:
        share = getattr(known[technique.name], "held_share", None)
        held *= 1.0 if share is None else share(technique, in_cache)
    cache_bytes = int(tokens * shape.cache_elements_per_token * in_cache * held)
    return Footprint(weight_bytes=int(weights), cache_bytes=cache_bytes)


def parameters(model: ModelSpec) -> int | None:
    """Of the whole model; None where the configuration is not at hand or of a kind that we do not count."""
    shape = _shape(model)
    return None if shape is None else shape.blocks + shape.rest


def _trained_bytes(cell: Cell, shape: _Shape) -> float:
    """Weights, gradients and optimizer state: AdamW's two moments, as wide as the weights, or what another keeps.

    Weights are fp32 where a precision is chosen, which autocast computes in.
    """
    known = optimizations()
    each = shape.published_bytes if precision_of(cell) is None else 4.0
    bits = [getattr(known[technique.name], "footprint_bits", None) for technique in cell.stack.techniques]
    state = next((number / 8 for number in bits if number is not None), 2 * each)
    return (2 * each + state) * (shape.blocks + shape.rest)


@cache
def _shape(spec: ModelSpec) -> _Shape | None:
    try:
        config = config_of(spec)
        if config is None or config.get("model_type") not in ("llama", "gpt2"):
            return None
        return _gpt2(config) if config["model_type"] == "gpt2" else _llama(spec, config)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, AttributeError):
        # not at hand, or a configuration that leaves its class's defaults unsaid: no bound is better than a wrong one
        return None


def _llama(spec: ModelSpec, config: dict[str, Any]) -> _Shape:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    keys = head * (config.get("num_key_value_heads") or config["num_attention_heads"])
    attention = 2 * hidden * head * config["num_attention_heads"] + 2 * hidden * keys
    blocks = layers * (attention + 3 * hidden * config["intermediate_size"])
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return _Shape(
        blocks=blocks,
        rest=embeddings + (2 * layers + 1) * hidden,
        cache_elements_per_token=2 * layers * keys,
        published_bytes=_published(spec, config),
    )


def _gpt2(config: dict[str, Any]) -> _Shape:
    hidden, layers = config.get("n_embd", 768), config.get("n_layer", 12)
    return _Shape(
        blocks=layers * 12 * hidden * hidden,
        rest=(config.get("vocab_size", 50257) + config.get("n_positions", 1024) + 13 * layers + 2) * hidden,
        cache_elements_per_token=2 * layers * hidden,
        published_bytes=_DTYPE_BYTES.get(config.get("dtype", "float32"), 4.0),
    )


def _published(spec: ModelSpec, config: dict[str, Any]) -> float:
    named = ARCHITECTURES[spec.reference].dtype if spec.reference in ARCHITECTURES else None
    return _DTYPE_BYTES.get(str(named or config.get("dtype") or config.get("torch_dtype")), 4.0)
