"""Which card a training cell would fit on: the smallest common memory size that holds what it really took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.frames import numbers

if TYPE_CHECKING:
    import pandas as pd

# Memory of common cards in GB of 1e9 bytes: an 8 GB card has 8 GiB, so about 7 % are left to driver and display.
SIZES_GB = (8, 16, 24, 48, 80, 141)
LEGEND = (
    f"fits: the smallest card of {', '.join(map(str, SIZES_GB[:-1]))} or {SIZES_GB[-1]} GB for the greatest reserved "
    "memory and what the process needs besides; pages of a paged optimizer may move to the host and are not counted."
)


def needed_bytes(table: pd.DataFrame) -> pd.Series[float]:
    """Device memory that a cell takes at most: reserved while measuring, or allocated before, and the context.

    NaN where it was not measured, as on a CPU.
    """
    import pandas as pd

    peaks = ("peak_reserved_bytes", "peak_allocated_bytes_load", "peak_allocated_bytes_warmup")
    reserved = pd.concat([numbers(table, name) for name in peaks], axis=1).max(axis=1)
    paged = numbers(table, "optimizer_paged_bytes").fillna(0)
    besides = numbers(table, "non_torch_bytes").sub(paged).clip(lower=0).fillna(0)
    return (reserved + besides).where(numbers(table, "peak_reserved_bytes").notna())


def fits(table: pd.DataFrame) -> list[str]:
    """`24 GB` for each training cell that was measured on a device, empty for all others and for what fits on none.

    `at least 24 GB` where a container hides what the process needs besides: the CUDA context alone is some 0.5 GB.
    """
    trained = numbers(table, "optimizer_state_bytes").notna()
    whole = numbers(table, "non_torch_bytes").notna()
    found = zip(needed_bytes(table).map(_smallest), trained, whole, strict=True)
    return [(size if known or not size else f"at least {size}") if train else "" for size, train, known in found]


def _smallest(need: Any) -> str:
    return next((f"{size} GB" for size in SIZES_GB if need <= size * 1e9), "")
