"""Checkpoint layouts of 4- and 8-bit weights: GPTQ's and AWQ's, rounding to nearest into them, and their way back.

Both pack codes into 32-bit words, lowest bits first, with a scale and a zero point per group of inputs:
weight = scale * (code - zero). GPTQ (Frantar et al. 2022) packs along the inputs and stores zero points less one;
AWQ's "gemm" layout (Lin et al. 2023) packs along the outputs, in an order that suits its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies in which place of a word, 4 bits


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A weight of (outputs, inputs) as numbers: codes int32 of that shape; scales, zeros of (outputs, groups)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool) -> Codes:
    """Each weight becomes the nearest multiple of its group's scale: symmetric about the middle code, or min to max."""
    import torch

    rows, columns = weight.shape
    most = 2**bits - 1
    groups = weight.float().reshape(rows, columns // group, group)
    if symmetric:
        scales = groups.abs().amax(-1) * 2 / most
        zeros = torch.full_like(scales, (most + 1) / 2)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / most
        zeros = torch.zeros_like(scales)
    # what kernels multiply with is half precision: codes are chosen for that
    scales = scales.clamp(min=2**-14).half().float()
    if not symmetric:
        zeros = (-low / scales).round().clamp(0, most)
    codes = (groups / scales[..., None] + zeros[..., None]).round_().clamp_(0, most)
    return Codes(codes=codes.int().reshape(rows, columns), scales=scales, zeros=zeros.int())


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (rows, columns / codes per word) of codes (rows, columns)."""
    import torch

    each = WORD // bits
    fields = values.reshape(values.shape[0], -1, each)
    words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=values.device)
    for place in range(each):
        words |= fields[..., place].int() << (bits * place)
    return words


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
    fields: torch.Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return fields.flatten(-2)


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(values.shape[0], -1, 8)[..., list(AWQ_ORDER)].flatten(-2)


def _straightened(values: torch.Tensor) -> torch.Tensor:
    places = sorted(range(8), key=AWQ_ORDER.__getitem__)
    return values.reshape(values.shape[0], -1, 8)[..., places].flatten(-2)


def gptq_tensors(found: Codes, bits: int) -> dict[str, torch.Tensor]:
    """qweight (inputs / codes per word, outputs), qzeros (groups, outputs / ...), scales (groups, outputs), g_idx."""
    import torch

    columns, groups = found.codes.shape[1], found.scales.shape[1]
    return {
        "qweight": _pack(found.codes, bits).T.contiguous(),
        "qzeros": _pack(found.zeros.T - 1, bits),
        "scales": found.scales.T.half().contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32, device=found.codes.device) // (columns // groups),
    }


def awq_tensors(found: Codes, bits: int) -> dict[str, torch.Tensor]:
    """qweight (inputs, outputs / codes per word), qzeros (groups, outputs / ...), scales (groups, outputs); 4 bits."""
    return {
        "qweight": _pack(_interleaved(found.codes.T), bits),
        "qzeros": _pack(_interleaved(found.zeros.T), bits),
        "scales": found.scales.T.half().contiguous(),
    }


def gptq_weight(tensors: dict[str, torch.Tensor], bits: int, *, zeros_less_one: bool = True) -> torch.Tensor:
    """The fp32 weight (outputs, inputs) that GPTQ's tensors stand for, whatever order the groups have."""
    codes = _unpack(tensors["qweight"].T.contiguous(), bits).float()
    zeros = (_unpack(tensors["qzeros"], bits) + int(zeros_less_one)).float().T
    scales, of = tensors["scales"].float().T, tensors["g_idx"].long()
    return scales[:, of] * (codes - zeros[:, of])


def awq_weight(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The fp32 weight (outputs, inputs) that AWQ's tensors stand for."""
    codes = _straightened(_unpack(tensors["qweight"], bits)).float()
    group = codes.shape[0] // tensors["qzeros"].shape[0]
    zeros = _straightened(_unpack(tensors["qzeros"], bits)).float().repeat_interleave(group, 0)
    return (tensors["scales"].float().repeat_interleave(group, 0) * (codes - zeros)).T
