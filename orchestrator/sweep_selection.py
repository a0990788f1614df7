"""Parts of a sweep that add cells to the product or take cells from it, and the `--only` expression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field, field_validator, model_validator

from orchestrator.sweep_document import SweepError
from orchestrator.sweep_models import ModelEntry
from orchestrator.sweep_problems import Problem, Strict, refuse, shown
from orchestrator.sweep_workloads import WorkloadEntry, axis_values, known_workload
from tasks.cell import Cell, Scalar, Stack, WorkloadPoint
from tasks.registry import workloads
from tasks.stacks import StackError, nearest, parse_stack

CELL_KEYS = ("model", "workload", "optimization", "hardware")


def is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def text_matches(text: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(text == pattern or fnmatchcase(text, pattern) for pattern in patterns)


def scalar_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def canonical(text: str) -> str:
    """A stack in its canonical spelling; a pattern stays as it is. Raises `StackError`."""
    return text if is_pattern(text) else str(parse_stack(text))


class _Selection(Strict):
    optimization: list[str] = Field(default_factory=list)
    hardware: list[str] = Field(default_factory=list)

    @field_validator("model", "optimization", "hardware", mode="before", check_fields=False)
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _not_empty(self) -> _Selection:
        if not any(getattr(self, key) for key in type(self).model_fields):
            refuse([((), f"this entry selects nothing: give one of {', '.join(CELL_KEYS)}")])
        return self


class Include(_Selection):
    """Extra cells: the product of what is given here; what is not given is that of the sweep."""

    model: list[ModelEntry] = Field(default_factory=list)
    workload: list[WorkloadEntry] = Field(default_factory=list)

    @field_validator("model", "workload", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_validator("optimization")
    @classmethod
    def _stacks(cls, texts: list[str]) -> list[str]:
        return _each(texts, lambda text: str(parse_stack(text)))


class Exclude(_Selection):
    """Cells to leave out: those that match everything given here. Text may hold `*`, `?` and `[...]`."""

    model: list[str] = Field(default_factory=list)
    workload: dict[str, list[Scalar]] = Field(default_factory=dict)

    @field_validator("optimization")
    @classmethod
    def _stacks(cls, texts: list[str]) -> list[str]:
        return _each(texts, canonical)

    @field_validator("workload", mode="before")
    @classmethod
    def _workload(cls, value: Any) -> dict[str, Any]:
        pattern: dict[str, Any] = {"kind": value} if isinstance(value, str | list) else value
        if not isinstance(pattern, dict):
            refuse([((), f"give a kind, or a mapping of kind and axes, got {shown(value)}")])
        result, problems = dict(pattern), list[Problem]()
        kinds = list(workloads().values())
        if "kind" in pattern:
            names = pattern["kind"] if isinstance(pattern["kind"], list) else [pattern["kind"]]
            if not names:
                refuse([(("kind",), "kind is an empty list: it needs at least one workload")])
            kinds, result["kind"] = [known_workload(name) for name in names], names
        for key, given in pattern.items():
            if key != "kind":
                having = [kind for kind in kinds if key in kind.axes]
                result[key] = axis_values((having or kinds)[0], key, given, (str(key),), problems)
        if problems:
            refuse(problems)
        return result

    def matches_point(self, point: WorkloadPoint) -> bool:
        if not self.workload:
            return True
        values: dict[str, Scalar] = {"kind": point.kind, **workloads()[point.kind].values(point)}
        return all(key in values and values[key] in allowed for key, allowed in self.workload.items())

    def matches_model(self, model_id: str) -> bool:
        return not self.model or text_matches(model_id, self.model)

    def matches_stack(self, stack: Stack) -> bool:
        return not self.optimization or text_matches(str(stack), self.optimization)

    def matches_hardware(self, requested: str, resolved: str) -> bool:
        return not self.hardware or text_matches(requested, self.hardware) or text_matches(resolved, self.hardware)


def _each(texts: list[str], convert: Callable[[str], str]) -> list[str]:
    result, problems = [], list[Problem]()
    for index, text in enumerate(texts):
        try:
            result.append(convert(text))
        except StackError as error:
            problems.append(((index,), str(error)))
    if problems:
        refuse(problems)
    return result


@dataclass(frozen=True, kw_only=True)
class Clause:
    """`key=a|b` or, negated, `key!=a|b`. A cell without that workload parameter satisfies only the negation."""

    key: str
    patterns: tuple[str, ...]
    negated: bool

    def __call__(self, cell: Cell) -> bool:
        return self._matches(cell) != self.negated

    def value(self, cell: Cell) -> str | None:
        """What the cell has under this key; None for a parameter that its workload does not have."""
        match self.key:
            case "model":
                return cell.model.id
            case "workload":
                return cell.workload.kind
            case "optimization":
                return str(cell.stack)
            case "hardware":
                return cell.hardware
            case _:
                value = workloads()[cell.workload.kind].values(cell.workload).get(self.key)
                return None if value is None else scalar_text(value)

    def _matches(self, cell: Cell) -> bool:
        value = self.value(cell)
        return value is not None and text_matches(value, self.patterns)


@dataclass(frozen=True, kw_only=True)
class Only:
    """A parsed `--only` expression: true for the cells that satisfy every clause."""

    text: str
    clauses: tuple[Clause, ...]

    def __call__(self, cell: Cell) -> bool:
        return all(clause(cell) for clause in self.clauses)

    def resolved(self, word: str, tag: str) -> Only:
        """The same with a word that sweeps use for a device in the place of its tag."""
        return replace(
            self,
            clauses=tuple(
                replace(clause, patterns=tuple(tag if pattern == word else pattern for pattern in clause.patterns))
                if clause.key == "hardware"
                else clause
                for clause in self.clauses
            ),
        )

    def check(self, cells: Iterable[Cell]) -> None:
        """Raise `SweepError` for an alternative that no cell has: misspelt, or two clauses without their comma."""
        positive = [clause for clause in self.clauses if not clause.negated]
        missing = [(clause, pattern) for clause in positive for pattern in clause.patterns]
        values: dict[str, set[str]] = {clause.key: set() for clause in positive}
        for cell in cells:
            for clause in positive:
                value = clause.value(cell)
                if value is not None and value not in values[clause.key]:
                    values[clause.key].add(value)
                    missing = [
                        (other, pattern)
                        for other, pattern in missing
                        if other.key != clause.key or not text_matches(value, [pattern])
                    ]
        for clause, pattern in missing:
            hint = nearest(pattern, sorted(values[clause.key])) if values[clause.key] else ""
            raise SweepError(f"--only {self.text}: no cell of the sweep has {clause.key} {pattern!r}{hint}")


def parse_only(expression: str) -> Only:
    """Parse `model=pocket,optimization=bf16*|fp32,batch_size!=1`; raises `SweepError`.

    Comma is and, `|` is or, `!=` negates, text may hold `*`, `?` and `[...]`. Since commas separate clauses, stacks
    with several options are written as a pattern: `compile:*`.
    """
    return Only(text=expression, clauses=tuple(_clause(part.strip(), expression) for part in expression.split(",")))


def _clause(part: str, expression: str) -> Clause:
    where = f"--only {expression}"
    key, equals, value = part.partition("=")
    negated, key = key.endswith("!"), key.removesuffix("!").strip()
    if not equals or not key or not value.strip():
        raise SweepError(f"{where}: {part!r} is not key=value, such as workload=decode or batch_size!=1")
    known = [*CELL_KEYS, *dict.fromkeys(axis for workload in workloads().values() for axis in workload.axes)]
    if key not in known:
        raise SweepError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    patterns = [pattern.strip() for pattern in value.split("|")]
    if not all(patterns):
        raise SweepError(f"{where}: {part!r} has an empty alternative")
    try:
        if key == "optimization":
            patterns = [canonical(pattern) for pattern in patterns]
        elif key == "workload":
            for pattern in patterns:
                if not is_pattern(pattern) and pattern not in workloads():
                    raise StackError(f"unknown workload {pattern!r}{nearest(pattern, list(workloads()))}")
    except StackError as error:
        raise SweepError(f"{where}: {error}") from None
    return Clause(key=key, patterns=tuple(patterns), negated=negated)
