"""GGUF files: a transformers model in memory becomes one, exactly as it is, and what a file stores is read back.

Layout and names are llama.cpp's (its `gguf-py/gguf/constants.py` and `src/models/*.cpp`). Matrices keep the dtype of
the model, everything else is fp32. The file has no tokenizer: ids are what is fed, and the tokenizer of transformers
lies beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.optimization import Unsupported

if TYPE_CHECKING:
    import numpy
    import torch

KEY = "benchmatrix.key"  # metadata: the artifact that the file belongs to
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp calls an architecture and its tensors: names of modules, `{}` is the number of the block.

    `interleaved`: rotary embeddings turn neighbouring numbers where transformers turns the halves of a head, so that
    the rows of queries and keys are rearranged. `transposed` modules hold (inputs, outputs). `activation` are the
    activation functions that llama.cpp has there, under their names in transformers.
    """

    architecture: str
    names: Mapping[str, str]
    activation: tuple[str, ...]
    interleaved: bool = False
    transposed: tuple[str, ...] = ()


_LLAMA = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}  # fmt: skip
_GPT2 = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h.{}.ln_1": "blk.{}.attn_norm",
    "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
    "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
    "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
    "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
}  # fmt: skip
FAMILIES = {
    "llama": Family(architecture="llama", names=_LLAMA, activation=("silu",), interleaved=True),
    "mistral": Family(architecture="llama", names=_LLAMA, activation=("silu",), interleaved=True),
    "qwen2": Family(architecture="qwen2", names=_LLAMA, activation=("silu",)),
    "gpt2": Family(
        architecture="gpt2", names=_GPT2, activation=("gelu_new", "gelu_pytorch_tanh"),
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
}  # fmt: skip


def refused(config: Mapping[str, Any]) -> str | None:
    """Why a model of this configuration (plain data) cannot be written, or None."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        return f"{', '.join(FAMILIES)} are written as GGUF here, not {kind}"
    activation = config.get("hidden_act", config.get("activation_function", family.activation[0]))
    if activation not in family.activation:
        return f"llama.cpp's {family.architecture} has {family.activation[0]}, not {activation}"
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window and window < positions and config.get("use_sliding_window", kind == "mistral"):
        return f"sliding windows ({window} positions) are not written as GGUF here"
    if kind == "gpt2" and config.get("scale_attn_by_inverse_layer_idx"):
        return "llama.cpp's gpt2 does not scale attention by the layer's number"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "linear", "llama3"):
        return f"rotary embeddings of type {rope.get('rope_type', rope.get('type'))} are not written as GGUF here"
    return None


def write_gguf(model: Any, path: Path, key: str) -> None:
    """Write a causal language model of transformers, on the CPU; `key` goes into the metadata.

    Raises `Unsupported` for architectures and parameters that are not known.
    """
    import gguf

    config = model.config
    reason = refused(config.to_dict())
    if reason is not None:
        raise Unsupported(reason)
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, family.architecture)
    _add_sizes(writer, config)
    writer.add_string(KEY, key)
    for name, tensor in _tensors(model, family):
        _add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: Any) -> None:
    heads, hidden = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * hidden)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or hidden // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _tensors(model: Any, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the file and tensors; tied ones once."""
    config = model.config
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        block = re.search(r"\.(\d+)\.", module)
        generic = re.sub(r"\.\d+\.", ".{}.", module, count=1)
        if generic not in family.names:
            raise Unsupported(f"{name} has no name in llama.cpp's {family.architecture}")
        target = family.names[generic].format(block.group(1) if block else "")
        tensor = parameter.detach()
        if kind == "weight" and module.rpartition(".")[2] in family.transposed:
            tensor = tensor.t()
        if family.interleaved and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            tensor = _interleave(tensor, heads)
        yield f"{target}.{kind}", tensor
    factors = _rope_factors(model)
    if factors is not None:
        yield ROPE_FACTORS, factors


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (first halves, second halves) of pairs to pair after pair."""
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _rope_factors(model: Any) -> torch.Tensor | None:
    """What llama.cpp divides the plain frequencies by, shape (head_dim / 2,); None where they are the plain ones."""
    import torch

    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return None
    used = rotary.inv_freq.detach().double().cpu()
    exponents = torch.arange(len(used), dtype=torch.double) / len(used)
    factors = float(model.config.rope_parameters["rope_theta"]) ** -exponents / used
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors.float()


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    import gguf
    import torch

    matrix = tensor.ndim > 1 and name != "position_embd.weight"
    if not matrix or tensor.dtype not in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a file: its type by ggml's name (`Q4_K`), rows and columns (1 row for vectors), bytes."""

    name: str
    type: str
    rows: int
    columns: int
    bytes: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def read_tensors(path: Path) -> list[StoredTensor]:
    """All tensors of a GGUF file, from its header."""
    import gguf

    found = []
    for tensor in gguf.GGUFReader(path).tensors:
        shape: numpy.ndarray[Any, Any] = tensor.shape  # ggml's order: columns first
        columns = int(shape[0])
        rows = int(tensor.n_elements) // columns
        found.append(
            StoredTensor(
                name=tensor.name, type=tensor.tensor_type.name, rows=rows, columns=columns, bytes=int(tensor.n_bytes)
            )
        )
    return found
