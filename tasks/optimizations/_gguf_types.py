"""GGUF's types by their arithmetic: bits of each block type, and which tensors a mixture stores in which type.

A block type packs 32 or 256 numbers with their scales: Q4_K is 144 bytes for 256 (128 of numbers, 12 of 6-bit scales
and minima, 4 of two fp16), so 4.5 bits each. Mixtures (`_M`, `_S`) give more bits to values and to the MLP's output
matrix, as llama.cpp's `llama-quant.cpp` does. A row that blocks of 256 do not divide gets a type with blocks of 32, and
one that those do not divide either stays F16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tasks.models.gguf_file import StoredTensor

# name -> numbers in a block, bytes of a block
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
UNQUANTIZED = ("F32", "F16", "BF16")

# (number of the layer, layers) -> whether its tensor gets more bits
Chosen = Callable[[int, int], bool]


def _always(_layer: int, _layers: int) -> bool:
    return True


def _first(count: int) -> Chosen:
    return lambda layer, _layers: layer < count


def _first_share(parts: int) -> Chosen:
    return lambda layer, layers: layer < layers // parts


def _ends_and_thirds(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`base` is the type of a matrix, `more` maps kinds of tensors to rules, the first that holds; `code` is ggml's.

    Values joined with queries and keys (GPT-2's `attn_qkv`) count as values.
    """

    code: int
    base: str
    more: dict[str, tuple[tuple[Chosen, str], ...]] = field(default_factory=dict)


MIXTURES = {
    "F32": Mixture(code=0, base="F32"),
    "F16": Mixture(code=1, base="F16"),
    "BF16": Mixture(code=32, base="BF16"),
    "Q8_0": Mixture(code=7, base="Q8_0"),
    "Q6_K": Mixture(code=18, base="Q6_K"),
    "Q5_K_M": Mixture(
        code=17, base="Q5_K",
        more={"attn_v": ((_ends_and_thirds, "Q6_K"),), "ffn_down": ((_ends_and_thirds, "Q6_K"),)},
    ),
    "Q5_K_S": Mixture(code=16, base="Q5_K"),
    "Q5_0": Mixture(code=8, base="Q5_0"),
    "Q4_K_M": Mixture(
        code=15, base="Q4_K",
        more={"attn_v": ((_ends_and_thirds, "Q6_K"),), "ffn_down": ((_ends_and_thirds, "Q6_K"),)},
    ),
    "Q4_K_S": Mixture(
        code=14, base="Q4_K", more={"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_first_share(8), "Q5_K"),)}
    ),
    "Q4_0": Mixture(code=2, base="Q4_0"),
    "Q3_K_M": Mixture(
        code=12, base="Q3_K",
        more={
            "attn_v": ((_first(2), "Q5_K"), (_always, "Q4_K")),
            "ffn_down": ((_first_share(16), "Q5_K"), (_always, "Q4_K")),
            "attn_output": ((_always, "Q4_K"),),
        },
    ),
    "Q3_K_S": Mixture(code=11, base="Q3_K"),
    "Q2_K": Mixture(
        code=10, base="Q2_K",
        more={"attn_v": ((_always, "Q3_K"),), "ffn_down": ((_always, "Q3_K"),), "attn_output": ((_always, "Q3_K"),)},
    ),
}  # fmt: skip


def bits_of(type_name: str) -> float:
    """Bits of a number stored so, scales included."""
    numbers, size = BLOCKS[type_name]
    return 8 * size / numbers


def stored_bytes(type_name: str, tensor: StoredTensor) -> int:
    """Bytes of a tensor in this type by its arithmetic; its columns must be whole blocks."""
    numbers, size = BLOCKS[type_name]
    return tensor.rows * (tensor.columns // numbers) * size


def is_matrix(tensor: StoredTensor) -> bool:
    """Whether a mixture says how it is stored; norms, biases and position embeddings stay F32."""
    kept = ("_norm.weight", "position_embd.weight")
    return tensor.name.endswith(".weight") and tensor.rows > 1 and not tensor.name.endswith(kept)


def expected_types(mixture: Mixture, tensors: Iterable[StoredTensor], group: int = 1) -> dict[str, tuple[str, str]]:
    """Name -> (type that the mixture has for it, type that it can be stored in), of a file's matrices.

    `group` is how many query heads share a value head: with 4 and more, Q2_K's values get Q4_K.
    """
    matrices = [tensor for tensor in tensors if is_matrix(tensor)]
    layers = 1 + max((int(found.group(1)) for t in matrices if (found := re.match(r"blk\.(\d+)\.", t.name))), default=0)
    tied = not any(tensor.name == "output.weight" for tensor in matrices)
    result = {}
    for tensor in matrices:
        wanted = _mixed(mixture, tensor, layers, tied)
        if group >= 4 and mixture.base == "Q2_K" and tensor.name.endswith("attn_v.weight"):
            wanted = "Q4_K"
        result[tensor.name] = wanted, _fitting(wanted, tensor)
    return result


def _mixed(mixture: Mixture, tensor: StoredTensor, layers: int, tied: bool) -> str:
    if mixture.base in UNQUANTIZED:
        return mixture.base
    if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
        return "Q8_0" if mixture.base == "Q8_0" else "Q6_K"
    block = re.match(r"blk\.(\d+)\.(.+)\.weight", tensor.name)
    if block is None:
        return mixture.base
    kind = "attn_v" if block.group(2) == "attn_qkv" else block.group(2)
    rules = mixture.more.get(kind, ())
    return next((name for holds, name in rules if holds(int(block.group(1)), layers)), mixture.base)


def _fitting(wanted: str, tensor: StoredTensor) -> str:
    if tensor.columns % BLOCKS[wanted][0] == 0:
        return wanted
    narrower = _FALLBACK.get(wanted, wanted)
    return narrower if tensor.columns % BLOCKS[narrower][0] == 0 else "F16"
