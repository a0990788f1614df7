"""The table for a terminal, in colour when it is one, and the same as plain text when it is not."""

from __future__ import annotations

import io
import os
import sys
from itertools import groupby

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from analysis.render.layout import Layout, Section, layout
from analysis.table import Table

STYLES = {"plain": "", "good": "green", "bad": "red", "quiet": "dim"}
PLAIN_WIDTH = 120
GAP = 2
NAME_WIDTH = 22  # narrowest first column; longer names are broken after a `+`
INDENT = "  "


def print_table(table: Table, console: Console | None = None) -> None:
    """Print to `console`, by default standard output, which without a terminal is 120 columns wide.

    Where the columns do not fit, names of stacks are broken, columns of a rank are left out, which a remark says, and
    what is still too wide follows below, group by group or column by column.
    """
    console = console or _standard_output()
    if console.file is sys.stdout and not console.is_terminal:
        sys.stdout.write(to_text(table, console.width))  # nothing is padded in a file or a pipe
        return
    arranged = layout(table)
    widths, panels, left_out = _fit(arranged, console.width)
    console.print(Text(arranged.title, style="bold"))
    for section in arranged.sections:
        console.print()
        if section.heading:
            console.print(Text(section.heading, style="bold cyan"), soft_wrap=True)
        for number, panel in enumerate(panels):
            if number:
                console.print()
            console.print(_grid(arranged, section, widths, panel), soft_wrap=True)
    console.print()
    for position, note in enumerate(arranged.notes, start=1):
        console.print(_remark(f"[{position}] ", note))
    remarks = table.remarks(left_out)
    if left_out:
        remarks.append(f"Not shown for want of width: {', '.join(left_out)}.")
    for remark in remarks:
        console.print(_remark("", remark))


def to_text(table: Table, width: int = PLAIN_WIDTH) -> str:
    """Plain text without colour, at most `width` columns where the content allows."""
    stream = io.StringIO()
    print_table(table, Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _standard_output() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


def _remark(label: str, text: str) -> Text | Grid:
    if not label:
        return Text(text, style="dim")
    grid = Grid.grid(padding=0)
    grid.add_column(width=len(label), no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style="dim"), Text(text, style="dim"))
    return grid


def _fit(arranged: Layout, available: int) -> tuple[list[int], list[list[int]], list[str]]:
    """Width of every column (equal in all sections), the columns of each panel, and the headers left out."""
    rows = [row for section in arranged.sections for row in section.rows]
    widths = [max([len(header.text), *(len(row[i].text) for row in rows)]) for i, header in enumerate(arranged.headers)]
    shown = list(range(len(widths)))
    narrowest = min(widths[0], NAME_WIDTH) if widths else 0

    def total(columns: list[int], first: int) -> int:
        return first + sum(GAP + widths[i] for i in columns if i)

    left_out: list[str] = []
    if any(header.group for header in arranged.headers):
        panels: list[list[int]] = [[0]]
        for group, members in groupby(shown[1:], key=lambda i: arranged.headers[i].group):
            columns = list(members)
            widths[columns[-1]] += max(0, len(group) - total(columns, -GAP))
            if total(panels[-1] + columns, narrowest) > available and panels[-1] != [0]:
                panels.append([0])
            panels[-1] += columns
    else:
        while total(shown, narrowest) > available and any(arranged.headers[i].rank for i in shown):
            last = max(shown, key=lambda i: (arranged.headers[i].rank, i))
            shown.remove(last)
            left_out.append(arranged.headers[last].text)
        panels = [[0]]
        for i in shown[1:]:
            if total([*panels[-1], i], narrowest) > available and panels[-1] != [0]:
                panels.append([0])
            panels[-1].append(i)
    if widths:
        excess = max(total(panel, widths[0]) for panel in panels) - available
        widths[0] = max(narrowest, widths[0] - max(excess, 0))
    return widths, panels, left_out


def _grid(arranged: Layout, section: Section, widths: list[int], columns: list[int]) -> Text:
    """One panel of one section. Text rather than a rich table, so that headings may span columns."""
    headers = [arranged.headers[i] for i in columns]
    gap = " " * GAP
    lines: list[Text] = []
    if any(header.group for header in headers):
        spans = []
        for group, members in groupby(columns, key=lambda i: arranged.headers[i].group):
            inside = [widths[i] for i in members]
            width = sum(inside) + GAP * (len(inside) - 1)
            spans.append(f" {group} ".center(width, "-") if group and len(group) + 2 <= width else group.ljust(width))
        lines.append(Text(gap.join(spans), style="bold"))
    heads = [_aligned(header.text, widths[i], header.right) for i, header in zip(columns, headers, strict=True)]
    lines.append(Text(gap.join(heads), style="bold"))
    lines.append(Text("-" * len(lines[-1].plain), style="dim"))
    for row in section.rows:
        name, *rest = _broken(row[0].text, widths[0])
        line = Text(name.ljust(widths[0]), style=STYLES[row[0].tone])
        for i in columns[1:]:
            entry = row[i]
            line.append(gap).append(_aligned(entry.text, widths[i], arranged.headers[i].right), STYLES[entry.tone])
        lines += [line, *(Text(part) for part in rest)]
    return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def _aligned(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _broken(name: str, width: int) -> list[str]:
    """Lines of at most `width` where that is possible, broken after `+` and before options and a note's mark."""
    for mark in ("+", ":", ","):
        name = name.replace(mark, f"{mark}\0" if mark == "+" else f"\0{mark}")
    stack, bracket, marks = name.partition(" [")
    pieces = stack.split("\0") + ([bracket + marks.replace("\0", "")] if bracket else [])
    lines = [""]
    for piece in pieces:
        if lines[-1].strip() and len(lines[-1]) + len(piece) > width:
            lines.append(INDENT)
            piece = piece.lstrip()
        lines[-1] += piece
    return lines
