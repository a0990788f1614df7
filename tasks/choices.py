"""A user's multiple-choice questions: JSON lines in HellaSwag's published format, checked before anything is run."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tasks.cell import digest
from tasks.models.identity import file_hash
from tasks.models.text import Choice

FORM = 'one JSON object per line, such as {"ctx": "...", "endings": ["...", "..."], "label": 0}'


class ChoicesError(ValueError):
    """Questions that cannot be asked; the message says where they are and what to do."""


def read_choices(path: str | Path) -> tuple[Choice, ...]:
    """The questions of a JSONL file, in its order; blank lines are skipped. Raises `ChoicesError` with file and line.

    Keys are those of HellaSwag: `ctx`, or `ctx_a` and `ctx_b`, which it joins with a space; `endings`, two or more;
    `label`, the index of the right one as a number or as digits. Other keys are ignored. Texts are asked as written:
    what lm-eval's task `hellaswag` strikes out of them (the activity's name, "[title]") is not done here.
    """
    file = Path(path)
    try:
        modified = file.stat().st_mtime_ns
        return _read(file, modified)
    except OSError as error:
        raise ChoicesError(f"{file} cannot be read ({error.strerror}): give a file with {FORM}") from None


@cache
def _read(path: Path, _modified: int) -> tuple[Choice, ...]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                found.append(_choice(line))
            except ChoicesError as error:
                raise ChoicesError(f"{path}:{number}: {error}") from None
    if not found:
        raise ChoicesError(f"{path}:1: no question in this file: write {FORM}")
    return tuple(found)


def _choice(line: bytes) -> Choice:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ChoicesError(f"not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ChoicesError(f"not JSON ({error}): write {FORM}") from None
    if not isinstance(row, dict):
        raise ChoicesError(f"a {type(row).__name__}, not an object: write {FORM}")
    endings = row.get("endings")
    if "endings" not in row:
        raise ChoicesError(f"the key endings is missing: write {FORM}")
    if not isinstance(endings, list) or len(endings) < 2:
        raise ChoicesError("endings must be a list of two or more texts")
    texts = tuple(_text(ending, f"endings[{index}]") for index, ending in enumerate(endings))
    return Choice(context=_context(row), endings=texts, label=_label(row, len(texts)))


def _context(row: dict[str, Any]) -> str:
    if "ctx" in row:
        return _text(row["ctx"], "ctx")
    if "ctx_a" not in row:
        raise ChoicesError(f"the key ctx is missing (or ctx_a and ctx_b): write {FORM}")
    first, second = _text(row["ctx_a"], "ctx_a"), row.get("ctx_b", "")
    return f"{first} {_text(second, 'ctx_b')}" if second != "" else first


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ChoicesError(f"{name} is a {type(value).__name__}: it must be a text")
    if not value.strip():
        raise ChoicesError(f"{name} is empty: write its text, or leave the question out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ChoicesError(f"{name} holds half of a surrogate pair, which no tokenizer can read") from None
    return value


def _label(row: dict[str, Any], count: int) -> int:
    if "label" not in row:
        raise ChoicesError("the key label is missing: write the index of the right ending, from 0")
    label = row["label"]
    if isinstance(label, str) and re.fullmatch(r"[0-9]{1,9}", label, re.ASCII):
        label = int(label)
    if label == "":
        raise ChoicesError("label is empty: questions need their answers; HellaSwag's test set is published without")
    if not isinstance(label, int) or isinstance(label, bool):
        raise ChoicesError(f"label {label!r} is not a whole number: write the index of the right ending, from 0")
    if not 0 <= label < count:
        raise ChoicesError(f"label {label} is out of range: the {count} endings are numbered 0 to {count - 1}")
    return label


def content_hash(path: str) -> str | None:
    """Hash of a file, or of all files in a folder but hidden and compiled ones; None where there is nothing."""
    root = Path(path)
    if not path or not root.exists():
        return None
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    inside = [(file, file.relative_to(root)) for file in files]
    kept = [(file, name) for file, name in inside if not any(p[0] == "." or p == "__pycache__" for p in name.parts)]
    return digest([[name.as_posix(), file_hash(file, file.stat().st_mtime_ns)] for file, name in kept])
