"""Stacks as a sweep lists them: texts, and products of texts, brought to their canonical spelling."""

from __future__ import annotations

from itertools import product
from typing import Any

from pydantic import ValidationError

from orchestrator.sweep_document import Location
from orchestrator.sweep_problems import Problem, refuse, shown, wording
from tasks.cell import BASELINE
from tasks.stacks import StackError, parse_stack


def stack(value: Any) -> str:
    """A stack in its canonical spelling."""
    if not isinstance(value, str):
        refuse([((), f"{shown(value)} is not a stack, such as {BASELINE} or bf16+compile")])
    try:
        return str(parse_stack(value))
    except StackError as error:
        refuse([((), str(error))])


def stacks(value: Any) -> list[str]:
    """Canonical stacks of a list of texts and of products `{product: [[baseline, bf16], [sdpa-flash, compile]]}`."""
    if not isinstance(value, list):
        refuse([((), f"optimizations must be a list of stacks, got {shown(value)}")])
    problems, result = list[Problem](), list[str]()
    for index, entry in enumerate(value):
        for text in _combinations(entry, (index,), problems):
            try:
                canonical = stack(text)
            except ValidationError as error:
                problems.append(((index,), wording(error.errors()[0], ())))
                continue
            if canonical in result:
                spelling = f"{text!r} is {canonical!r}" if text != canonical else repr(text)
                problems.append(((index,), f"{spelling}, which is in the list already"))
            result.append(canonical)
    if problems:
        refuse(problems)
    return result


def _combinations(entry: Any, location: Location, problems: list[Problem]) -> list[Any]:
    if not isinstance(entry, dict):
        return [entry]
    lists = entry.get("product")
    if list(entry) != ["product"] or not isinstance(lists, list) or not lists:
        problems.append((location, f"write a stack or {{product: [[...], [...]]}}, got {shown(entry)}"))
        return []
    for index, choices in enumerate(lists):
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            problems.append(((*location, "product", index), f"must be a list of stacks, got {shown(choices)}"))
            return []
    joined = (("+".join(part for part in parts if part != BASELINE) or BASELINE) for parts in product(*lists))
    return list(joined)
