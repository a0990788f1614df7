"""Why a cell with gptq or awq cannot work, found without torch, and which kernel it gets where it can."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.models.identity import config_of, model_type
from tasks.models.packing import Packing
from tasks.optimization import Unsupported
from tasks.optimizations._gptq_kernels import KERNELS, Kernel
from tasks.optimizations._pruning import pruned_data
from tasks.stacks import option, precision_of

if TYPE_CHECKING:
    import torch

    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo

RTN = "rtn"
WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "n_inner")
FAMILIES_BEFORE = ("distillation", "pruning")  # they make the checkpoint that this one starts from
HALF_ONLY = "multiplies in fp16 or bf16, this cell computes in {}: put bf16 into the stack"


def rounds(technique: Technique) -> bool:
    """Whether it is only rounded, without calibration."""
    return str(option(technique, "method")) == RTN


def number(technique: Technique, key: str) -> int:
    return int(str(option(technique, key)))


def starts_from_another(cell: Cell) -> bool:
    from tasks.registry import optimizations

    return any(optimizations()[name].family in FAMILIES_BEFORE for name in cell.stack.names())


def unlike(published: Packing, technique: Technique, cell: Cell) -> str | None:
    """Why a checkpoint that is quantized already is not what the stack says."""
    model, name = cell.model.id, technique.name
    if published.refusal:
        return f"{name} cannot load {model}, which is quantized already: {published.refusal}"
    if starts_from_another(cell):
        return f"{model} is quantized already: {name} must be all that its stack makes of it"
    if (published.bits, published.group) != (number(technique, "bits"), number(technique, "group_size")):
        right = f"{name}:bits={published.bits},group_size={published.group}"
        return f"{model} is quantized already ({published.description}): write {right}"
    given = [key for key in ("method", "samples", "text") if technique.option(key) is not None]
    if given:
        return f"{model} is quantized already: {name} makes nothing of its option {given[0]}"
    return None


def no_kernel(technique: Technique, bits: int, device: DeviceInfo) -> str | None:
    """Why the kernel that the stack names does not run on this device."""
    method, name = technique.name, str(option(technique, "kernel"))
    kernel = KERNELS[method].get(name)
    if name == "auto":
        return None
    if kernel is None or device.kind not in kernel.devices:
        here = [key for key, item in KERNELS[method].items() if device.kind in item.devices]
        return f"{method} has no kernel {name} on {device.kind}, it has {', '.join(here)}"
    if bits not in kernel.bits:
        return f"{method}: the kernel {name} multiplies {kernel.bits[0]}-bit weights, not {bits}-bit ones"
    if kernel.package and kernel.package not in device.packages:
        return f"{method}: the kernel {name} needs {kernel.package}: pip install {kernel.package}"
    least, has = kernel.compute_capability, device.compute_capability
    if least and has and has < least:
        return f"{method}: {name} needs compute capability {least[0]}.{least[1]}, {device.name} has {has[0]}.{has[1]}"
    return None


def unfit(technique: Technique, cell: Cell) -> str | None:
    """What the model's configuration says against it."""
    name = technique.name
    try:
        config = pruned_data(config_of(cell.model) or {}, cell)
    except (OSError, ValueError):
        config = {}
    dtype = precision_of(cell) or config.get("dtype") or config.get("torch_dtype")
    if dtype in ("fp32", "tf32", "float32"):
        return f"{name} {HALF_ONLY.format(dtype)}"
    group = number(technique, "group_size")
    odd = [config[key] for key in WIDTHS if isinstance(config.get(key), int) and config[key] % group]
    if odd:
        return f"{name} groups {group} inputs, {cell.model.id} has {odd[0]}"
    if name == "awq" and not rounds(technique) and model_type(cell.model) == "gpt2":
        return f"awq cannot scale Conv1D layers, which {cell.model.id} has: gptq can round them, awq:method=rtn too"
    if rounds(technique) and cell.model.source == "random" and model_type(cell.model) == "gpt2":
        return f"{name}:method=rtn makes random linear layers in place, {cell.model.id} has Conv1D layers"
    return None


def choose(method: str, name: str, packing: Packing, device: torch.device) -> Kernel:
    """The kernel of that name, or the first that can run here; raises `Unsupported` where there is none."""
    import torch

    reasons = []
    for key, kernel in KERNELS[method].items():
        if name not in ("auto", key):
            continue
        least = kernel.compute_capability
        if device.type not in kernel.devices:
            reasons.append(f"{key} does not run on {device.type}")
        elif packing.bits not in kernel.bits or packing.group not in kernel.groups:
            reasons.append(f"{key} has no {packing.bits} bits in groups of {packing.group}")
        elif kernel.symmetric_only and not packing.symmetric:
            reasons.append(f"{key} wants codes that are symmetric about zero")
        elif least and torch.cuda.get_device_capability(device) < least:
            reasons.append(f"{key} needs compute capability {least[0]}.{least[1]}")
        elif name == "auto" and key == "marlin" and not _compiler():
            reasons.append("marlin is compiled at its first use, and there is no nvcc")
        else:
            return kernel
    raise Unsupported(f"{method} has no kernel here: {'; '.join(reasons)}")


def _compiler() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    return shutil.which("nvcc") is not None or (CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists())
