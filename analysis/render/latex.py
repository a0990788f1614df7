"""LaTeX with booktabs: one tabular, sections as spanning rows."""

from __future__ import annotations

from analysis.render.layout import layout
from analysis.table import Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"$\sim$", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def to_latex(table: Table) -> str:
    """A `table` environment; the document needs the package booktabs."""
    arranged = layout(table)
    columns = len(arranged.headers)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(arranged.title)}}}",
        rf"\begin{{tabular}}{{{''.join('r' if header.right else 'l' for header in arranged.headers)}}}",
        r"\toprule",
    ]
    if any(header.group for header in arranged.headers):
        lines.append(_groups([header.group for header in arranged.headers]))
    lines.append(_row([header.text for header in arranged.headers]))
    for section in arranged.sections:
        lines.append(r"\midrule")
        if section.heading:
            lines.append(rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_escaped(section.heading)}}}}} \\")
        lines += [_row([entry.text.strip() for entry in row]) for row in section.rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    remarks = [f"[{number}] {note}" for number, note in enumerate(arranged.notes, start=1)]
    lines += [rf"\par\footnotesize {_escaped(remark)}" for remark in (*remarks, *table.remarks())]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _groups(groups: list[str]) -> str:
    """Headings over neighbouring columns, with rules below them."""
    cells, rules, start = [], [], 0
    for end in range(1, len(groups) + 1):
        if end < len(groups) and groups[end] == groups[start]:
            continue
        cells.append(rf"\multicolumn{{{end - start}}}{{c}}{{{_escaped(groups[start])}}}")
        if groups[start]:
            rules.append(rf"\cmidrule(lr){{{start + 1}-{end}}}")
        start = end
    return " & ".join(cells) + r" \\" + "\n" + "".join(rules)


def _row(texts: list[str]) -> str:
    return " & ".join(_escaped(text) for text in texts) + r" \\"


def _escaped(text: str) -> str:
    escaped = "".join(_SPECIAL.get(character, character) for character in text)
    return escaped.replace("+-", r"$\pm$")
