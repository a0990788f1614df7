"""GitHub's Markdown: one table per section, remarks below."""

from __future__ import annotations

from analysis.render.layout import layout
from analysis.table import Table


def to_markdown(table: Table) -> str:
    """The table as Markdown."""
    arranged = layout(table)
    lines = [f"**{arranged.title}**", ""]
    headers = [f"{header.group} {header.text}".strip() for header in arranged.headers]
    for section in arranged.sections:
        if section.heading:
            lines += [f"`{section.heading}`", ""]
        lines.append(_row(headers))
        lines.append("|" + "|".join("---:" if header.right else ":---" for header in arranged.headers) + "|")
        lines += [_row([entry.text.strip() for entry in row]) for row in section.rows]
        lines.append("")
    lines += [f"{number}. {_escaped(note)}" for number, note in enumerate(arranged.notes, start=1)]
    if arranged.notes:
        lines.append("")
    for remark in table.remarks():
        lines += [_escaped(remark), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(texts: list[str]) -> str:
    return "| " + " | ".join(_escaped(text) for text in texts) + " |"


def _escaped(text: str) -> str:
    for character in "\\|*_<~`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
