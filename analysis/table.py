"""A table as numbers: a frame, and how each of its columns is to be shown. Renderers take it from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection

    import pandas as pd

Form = Literal["text", "bytes", "number", "interval", "ratio", "marked_ratio", "verdict", "percent"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One shown column.

    `sources` are columns of the frame, as the form needs them: one value; `interval` and `ratio` value, lo, hi;
    `marked_ratio` value, verdict, equivalent, is_baseline; `verdict` verdict, equivalent, mde, is_baseline. `word` is
    the column whose text stands here when there are no numbers; `group` is a heading over neighbouring fields. `legend`
    explains the column below the table, where the column is shown.
    """

    header: str
    form: Form
    sources: tuple[str, ...]
    group: str = ""
    word: str | None = None
    unit: str | None = None  # column with a unit to append
    rank: int = 0  # where space is short, the highest goes first; 0 stays
    legend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A frame with its presentation.

    Attributes:
        title: one line.
        frame: raw numbers, one line per row of the table; this is what CSV and JSON hold.
        fields: the columns shown to people.
        sections: columns of the frame whose values head a block of rows instead of being columns.
        notes: column with a list of remarks per row, shown as numbered notes below.
        footnotes: remarks on the table as a whole; legends of the fields stand before them.
    """

    title: str
    frame: pd.DataFrame
    fields: tuple[Field, ...]
    sections: tuple[str, ...] = ()
    notes: str | None = None
    footnotes: tuple[str, ...] = ()

    def remarks(self, left_out: Collection[str] = ()) -> list[str]:
        """What stands below the notes where the columns with these headers are not shown; every text once."""
        legends = [field.legend for field in self.fields if field.legend and field.header not in left_out]
        return list(dict.fromkeys([*legends, *self.footnotes]))
