"""4-bit weights rounded to nearest, a scale and a zero point per group of inputs, torch's int4 products (torchao)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tasks.models.identity import config_of
from tasks.optimizations._pruning import pruned_data
from tasks.optimizations._torchao import TorchAo
from tasks.stacks import option

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo

CUDA_TILE = (8, 1024)  # outputs and inputs are padded to multiples of these on CUDA
WIDTHS = ("hidden_size", "intermediate_size")


class AoInt4(TorchAo):
    """On CUDA weights are laid out for tensor cores in tiles, small models grow by the padding."""

    name = "ao-int4"
    summary = "torchao int4 weights, a scale and a zero point per group of 128 inputs"
    needs = replace(TorchAo.needs, compute_capability=(8, 0))
    options = {"group_size": 128}
    choices = {"group_size": (32, 64, 128)}
    tensor = {"cpu": "Int4OpaqueTensor", "cuda": "Int4TilePackedTo4dTensor"}
    storage = {"cpu": "uint8", "cuda": "int32"}
    bits = 4.0
    bf16_only = ("cuda",)

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        chosen = next((item for item in cell.stack.techniques if item.name == self.name), None)
        if refusal is not None or chosen is None:
            return refusal
        group = int(option(chosen, "group_size"))
        widths = [width for width in _widths(cell) if width % group]
        return f"{self.name} groups {group} inputs, {cell.model.id} has {widths[0]}" if widths else None

    def config(self, technique: Technique, on_cuda: bool) -> Any:
        group = int(option(technique, "group_size"))
        if on_cuda:
            from torchao.quantization import Int4WeightOnlyConfig

            # the default packing needs a package that does not exist
            return Int4WeightOnlyConfig(
                group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
            )
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)

    def weight_bytes(self, weight: torch.Tensor, technique: Technique) -> float:
        rows, columns = weight.shape
        if weight.device.type == "cuda":
            rows, columns = (-(-size // tile) * tile for size, tile in zip((rows, columns), CUDA_TILE, strict=True))
        groups = rows * columns / int(option(technique, "group_size"))
        return rows * columns / 2 + 2 * weight.dtype.itemsize * groups

    def kind(self, weight: Any) -> str:
        return f"{super().kind(weight)}, groups of {getattr(weight, 'block_size', [None])[-1]}"

    def wanted(self, technique: Technique) -> str:
        return f"{super().wanted(technique)}, groups of {option(technique, 'group_size')}"


def _widths(cell: Cell) -> list[int]:
    try:
        config = pruned_data(config_of(cell.model) or {}, cell)
    except (OSError, ValueError):
        return []
    return [int(config[key]) for key in WIDTHS if isinstance(config.get(key), int)]
