"""Two small things that every step from frame to frame needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def column(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    """The column, or missing values where these rows do not have it."""
    import pandas as pd

    return frame[name] if name in frame else pd.Series(pd.NA, index=frame.index, dtype="object")


def numbers(frame: pd.DataFrame, name: str) -> pd.Series[float]:
    """The column as float64, NaN where it is missing or absent."""
    import pandas as pd

    return pd.to_numeric(column(frame, name), errors="coerce").astype("float64")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict per row, keys as text."""
    names = [str(name) for name in frame.columns]
    return [dict(zip(names, values, strict=True)) for values in frame.itertuples(index=False, name=None)]
