"""Tables as text: terminal, plain text, Markdown, LaTeX for people; CSV and JSON with the raw numbers for programs."""

from __future__ import annotations

from collections.abc import Callable

from analysis.render.csv import to_csv
from analysis.render.json import to_json
from analysis.render.latex import to_latex
from analysis.render.markdown import to_markdown
from analysis.render.terminal import print_table, to_text
from analysis.table import Table

FORMATS: dict[str, Callable[[Table], str]] = {
    "text": to_text,
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
    "json": to_json,
}


def render(table: Table, format: str = "text") -> str:
    """The table in one of `FORMATS`, ending in a newline."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; one of {', '.join(FORMATS)}")
    return FORMATS[format](table)


__all__ = ["FORMATS", "print_table", "render", "to_csv", "to_json", "to_latex", "to_markdown", "to_text"]
