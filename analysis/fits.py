"""Which card a training cell would fit on: the smallest common memory size that holds what it really took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.frames import numbers

if TYPE_CHECKING:
    import pandas as pd

# Memory of common cards in GB of 1e9 bytes: an 8 GB card has 8 GiB, so about 7 % are left to driver and display.
SIZES_GB = (8, 16, 24, 48, 80, 141)
LEGEND = (
    f"fits: the smallest card of {', '.join(map(str, SIZES_GB[:-1]))} or {SIZES_GB[-1]} GB; where two stand, the first "
    "holds the greatest allocated memory and the CUDA context, the least that will do, and the second all that the "
    "allocator reserved, of which it gives free blocks back before it fails, where fragments let it; pages of a paged "
    "optimizer may move to the host and are not counted."
)


def needed_bytes(table: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Device memory that a cell takes at least and at most; NaN where it was not measured, as on a CPU.

    At least: what tensors held at their peak, while loading, warming up or measuring, and the context. At most: what
    the allocator had reserved instead, free blocks and all; it frees these when memory ends, so that they are no need,
    but blocks that are used in part stay.
    """
    import pandas as pd

    paged = numbers(table, "optimizer_paged_bytes").fillna(0)
    besides = numbers(table, "non_torch_bytes").sub(paged).clip(lower=0).fillna(0)
    peaks = ["peak_allocated_bytes", "peak_allocated_bytes_load", "peak_allocated_bytes_warmup"]
    allocated = pd.concat([numbers(table, name) for name in peaks], axis=1).max(axis=1)
    measured = numbers(table, "peak_allocated_bytes").notna()
    reserved = pd.concat([numbers(table, "peak_reserved_bytes"), allocated], axis=1).max(axis=1)
    known = numbers(table, "peak_reserved_bytes").notna()
    return (allocated + besides).where(measured), (reserved + besides).where(known)


def fits(table: pd.DataFrame) -> list[str]:
    """`24 GB`, or `24-48 GB` where need and reservation end on different cards, for each training cell on a device.

    Empty for all other cells and for what fits on none. `at least 24 GB` where the greater card is none of these, or
    where a container hides what the process needs besides: the CUDA context alone is some 0.5 GB.
    """
    trained = numbers(table, "optimizer_state_bytes").notna()
    whole = numbers(table, "non_torch_bytes").notna()
    least, most = (need.map(_smallest) for need in needed_bytes(table))
    found = zip(least, most, trained, whole, strict=True)
    return [_card(low, high, known) if train else "" for low, high, train, known in found]


def _card(least: int, most: int, known: bool) -> str:
    if not least:
        return ""
    if not known or not most:
        return f"at least {least} GB"
    return f"{least} GB" if least == most else f"{least}-{most} GB"


def _smallest(need: Any) -> int:
    """GB of the smallest card that holds so many bytes, 0 where none does or nobody knows."""
    return next((size for size in SIZES_GB if need <= size * 1e9), 0)
