"""A table as rows of short texts, which every renderer for people arranges in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from analysis.frames import records
from analysis.render import units
from analysis.table import Field, Table
from analysis.verdicts import FASTER, INDISTINGUISHABLE, SLOWER

Tone = Literal["plain", "good", "bad", "quiet"]
MARKS = {FASTER: "+", SLOWER: "-", INDISTINGUISHABLE: "~"}
TONES: dict[str, Tone] = {FASTER: "good", SLOWER: "bad", INDISTINGUISHABLE: "quiet"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One text in the table, and whether it deserves colour."""

    text: str
    tone: Tone = "plain"


class Header(NamedTuple):
    """Head of a column; `group` stands over neighbours that share it."""

    group: str
    text: str
    right: bool
    rank: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows under one heading."""

    heading: str
    rows: tuple[tuple[Entry, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Headers, sections of entries (one per header), and notes in the order of their numbers."""

    title: str
    headers: tuple[Header, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]


def layout(table: Table) -> Layout:
    """Arrange a table; remarks that several rows share get one number."""
    headers = tuple(
        Header(field.group, field.header, field.form not in ("text", "verdict"), field.rank) for field in table.fields
    )
    numbers: dict[str, int] = {}
    blocks: dict[tuple[str, ...], list[tuple[Entry, ...]]] = {}
    for row in records(table.frame):
        heading = tuple("" if units.is_missing(row[name]) else str(row[name]) for name in table.sections)
        marks = [numbers.setdefault(note, len(numbers) + 1) for note in (row[table.notes] if table.notes else [])]
        entries = [_entry(row, field) for field in table.fields]
        if marks:
            entries[0] = Entry(text=f"{entries[0].text} [{','.join(map(str, sorted(marks)))}]", tone=entries[0].tone)
        blocks.setdefault(heading, []).append(tuple(entries))
    sections = tuple(
        Section(heading=" | ".join(part for part in heading if part), rows=tuple(rows))
        for heading, rows in blocks.items()
    )
    return Layout(title=table.title, headers=headers, sections=sections, notes=tuple(numbers))


def _entry(row: dict[str, Any], field: Field) -> Entry:
    values = [row.get(name) for name in field.sources]
    match field.form:
        case "bytes":
            text = units.size(values[0])
        case "number":
            text = units.number(values[0])
        case "percent":
            text = units.percent(values[0])
        case "interval":
            text = units.with_interval(*values[:3])
        case "ratio":
            text = "base" if values[3] is True and units.is_missing(values[0]) else units.ratio(*values[:3])
            return Entry(text=text, tone="quiet" if text == "base" else "plain")
        case "marked_ratio":
            return _marked(values)
        case "verdict":
            return _verdict(values)
        case _:
            text = "" if units.is_missing(values[0]) else str(values[0])
    if not text and field.word and not units.is_missing(row.get(field.word)) and row[field.word] != "ok":
        return Entry(text=str(row[field.word]), tone="bad")
    if text and field.unit and not units.is_missing(row.get(field.unit)):
        text = f"{text} {row[field.unit]}"
    return Entry(text=text)


def _marked(values: list[Any]) -> Entry:
    value, verdict, equivalent, baseline = values
    if units.is_missing(value):
        return Entry(text="base  " if baseline is True else "", tone="quiet")
    word = None if units.is_missing(verdict) else str(verdict)
    mark = "=" if not units.is_missing(equivalent) and equivalent else MARKS.get(word or "", "?")
    return Entry(text=f"{units.ratio(value)} {mark}", tone=TONES.get(word or "", "quiet"))


def _verdict(values: list[Any]) -> Entry:
    verdict, equivalent, mde, baseline, ratio = values
    if units.is_missing(verdict):
        unranked = baseline is not True and not units.is_missing(ratio)
        return Entry(text="?" if unranked else "", tone="quiet")
    if verdict != INDISTINGUISHABLE:
        return Entry(text=str(verdict), tone=TONES[str(verdict)])
    if not units.is_missing(equivalent) and equivalent:
        return Entry(text="same", tone="quiet")
    found = units.percent(mde) if units.is_missing(mde) or mde < 1 else "> 100 %"
    return Entry(text=f"~ {found}", tone="quiet")
