"""Named architectures that can be built with random weights: the published configurations, by heart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tasks.cell import ModelKind


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`model_type` and `config` as in transformers' config.json; `dtype` is what the weights are published in."""

    kind: ModelKind
    model_type: str
    dtype: str
    config: dict[str, Any] = field(default_factory=dict)


_LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        kind="language",
        model_type="gpt2",
        dtype="float32",
        # dropout off, so that training steps of different stacks do the same arithmetic
        config={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama-3.1-8b": Architecture(
        kind="language",
        model_type="llama",
        dtype="bfloat16",
        config={
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "rope_parameters": _rope(8.0),
        },
    ),
    "llama-3.2-1b": Architecture(
        kind="language",
        model_type="llama",
        dtype="bfloat16",
        config={
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": _rope(32.0),
        },
    ),
    "resnet-50": Architecture(
        kind="vision",
        model_type="resnet",
        dtype="float32",
        config={"num_labels": 1000},
    ),
    # Small enough for two CPU cores, with what a residual network has: convolutions, batch norms, a head.
    "resnet-tiny": Architecture(
        kind="vision",
        model_type="resnet",
        dtype="float32",
        config={
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64],
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "num_labels": 10,
        },
    ),
    # GPT-2's twelve blocks for sequences of 2048 over bytes: without a large vocabulary, whose logits would hide what
    # the blocks need.
    "transformer-12x768": Architecture(
        kind="language",
        model_type="gpt2",
        dtype="float32",
        config={
            "n_positions": 2048,
            "vocab_size": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "activation_function": "gelu",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def architectures() -> dict[str, ModelKind]:
    """Name -> kind of every named architecture."""
    return {name: architecture.kind for name, architecture in ARCHITECTURES.items()}
