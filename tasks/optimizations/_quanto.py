"""optimum-quanto unpacks with kernels that it compiles on the spot; where no compiler is, PyTorch's shifts must do."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

KERNELS, PORTABLE = "compiled kernels", "PyTorch"
_overrides: list[Any] = []  # a registration lives as long as its library object


def unpack(packed: Any, bits: int) -> Any:
    """Numbers of `bits` bits from bytes, uint8: those in the lowest bits first, then the next, along the first axis."""
    import torch

    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])


def settle_unpacking(device: Any) -> str:
    """Make unpacking work on the device, and say how it is done."""
    import torch

    importlib.import_module("optimum.quanto")
    try:
        torch.ops.quanto.unpack(torch.zeros(8, dtype=torch.uint8, device=device), 4)
    except (RuntimeError, OSError, ImportError):
        library = torch.library.Library("quanto", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced is the purpose
            library.impl("unpack", unpack, device.type.upper(), allow_override=True)
        _overrides.append(library)
        return PORTABLE
    return PORTABLE if _overrides else KERNELS
